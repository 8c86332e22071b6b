"""Charlson comorbidity index from ICD-9 and ICD-10 diagnosis codes of the hospital stay.

Codes after Quan et al. (Medical Care 2005), weights after Charlson et al. (1987), as mimic-code
combines them. The codes are given at discharge: they are not known at admission.
"""

from __future__ import annotations

from itertools import product

# condition -> weight.
WEIGHTS: dict[str, int] = {
    "myocardial_infarct": 1,
    "congestive_heart_failure": 1,
    "peripheral_vascular_disease": 1,
    "cerebrovascular_disease": 1,
    "dementia": 1,
    "chronic_pulmonary_disease": 1,
    "rheumatic_disease": 1,
    "peptic_ulcer_disease": 1,
    "mild_liver_disease": 1,
    "diabetes_without_cc": 1,
    "diabetes_with_cc": 2,
    "paraplegia": 2,
    "renal_disease": 2,
    "malignant_cancer": 2,
    "severe_liver_disease": 3,
    "metastatic_solid_tumor": 6,
    "aids": 6,
}
# The milder form counts only where the severer one does not.
SUPERSEDED_BY: dict[str, str] = {
    "mild_liver_disease": "severe_liver_disease",
    "diabetes_without_cc": "diabetes_with_cc",
    "malignant_cancer": "metastatic_solid_tumor",
}


def _diabetes(last_digits: str) -> str:
    return " ".join(f"E{kind}{digit}" for kind, digit in product(range(10, 15), last_digits))


# condition -> (ICD-9, ICD-10): codes compare on as many characters as they have; `a-b` is every
# code from a to b.
CODES: dict[str, tuple[str, str]] = {
    "myocardial_infarct": ("410 412", "I21 I22 I252"),
    "congestive_heart_failure": (
        "428 39891 40201 40211 40291 40401 40403 40411 40413 40491 40493 4254-4259",
        "I43 I50 I099 I110 I130 I132 I255 I420 I425 I426 I427 I428 I429 P290",
    ),
    "peripheral_vascular_disease": (
        "440 441 0930 4373 4471 5571 5579 V434 4431-4439",
        "I70 I71 I731 I738 I739 I771 I790 I792 K551 K558 K559 Z958 Z959",
    ),
    "cerebrovascular_disease": ("430-438 36234", "G45 G46 I60-I69 H340"),
    "dementia": ("290 2941 3312", "F00 F01 F02 F03 G30 F051 G311"),
    "chronic_pulmonary_disease": (
        "490-505 4168 4169 5064 5081 5088",
        "J40-J47 J60-J67 I278 I279 J684 J701 J703",
    ),
    "rheumatic_disease": (
        "725 4465 7100 7101 7102 7103 7104 7140 7141 7142 7148",
        "M05 M06 M32 M33 M34 M315 M351 M353 M360",
    ),
    "peptic_ulcer_disease": ("531 532 533 534", "K25 K26 K27 K28"),
    "mild_liver_disease": (
        "570 571 0706 0709 5733 5734 5738 5739 V427 07022 07023 07032 07033 07044 07054",
        "B18 K73 K74 K700 K701 K702 K703 K709 K713 K714 K715 K717 K760 K762 K763 K764 K768 K769 "
        "Z944",
    ),
    "diabetes_without_cc": ("2500 2501 2502 2503 2508 2509", _diabetes("01689")),
    "diabetes_with_cc": ("2504 2505 2506 2507", _diabetes("23457")),
    "paraplegia": (
        "342 343 3341 3440 3441 3442 3443 3444 3445 3446 3449",
        "G81 G82 G041 G114 G801 G802 G830 G831 G832 G833 G834 G839",
    ),
    "renal_disease": (
        "582 585 586 V56 5880 V420 V451 5830-5837 40301 40311 40391 40402 40403 40412 40413 40492 "
        "40493",
        "N18 N19 I120 I131 N032 N033 N034 N035 N036 N037 N052 N053 N054 N055 N056 N057 N250 Z490 "
        "Z491 Z492 Z940 Z992",
    ),
    "malignant_cancer": (
        "140-172 1740-1958 200-208 2386",
        "C43 C88 C00-C26 C30-C34 C37-C41 C45-C58 C60-C76 C81-C85 C90-C97",
    ),
    "severe_liver_disease": (
        "4560 4561 4562 5722-5728",
        "I850 I859 I864 I982 K704 K711 K721 K729 K765 K766 K767",
    ),
    "metastatic_solid_tumor": ("196 197 198 199", "C77 C78 C79 C80"),
    "aids": ("042 043 044", "B20 B21 B22 B24"),
}


def code_ranges() -> list[tuple[str, int, int, str, str]]:
    """Rows of (condition, ICD version, compared characters, first code, last code)."""
    rows = []
    for condition, versions in CODES.items():
        for version, codes in zip((9, 10), versions, strict=True):
            for code in codes.split():
                first, _, last = code.partition("-")
                rows.append((condition, version, len(first), first, last or first))
    return rows


def index_sql() -> str:
    """SQL sum of the weights over columns named like the conditions (0 or 1)."""
    terms = []
    for condition, weight in WEIGHTS.items():
        if condition in SUPERSEDED_BY:
            severe = SUPERSEDED_BY[condition]
            terms.append(f"greatest({weight} * {condition}, {WEIGHTS[severe]} * {severe})")
        elif condition not in SUPERSEDED_BY.values():
            terms.append(f"{weight} * {condition}")
    return " + ".join(terms)
