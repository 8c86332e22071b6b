"""Codes of MIMIC-IV: items with units, ranges and factors, and diagnoses of the Charlson index.

Item numbers and limits agree with mimic-code where it defines the concept; the extra numbers of
the same laboratory test (`FEATURE_LABS`) are used for features only, never for Sepsis-3.

The Charlson comorbidity index is that of ICD-9 and ICD-10 diagnosis codes of the hospital stay:
codes after Quan et al. (Medical Care 2005), weights after Charlson et al. (1987), as mimic-code
combines them. The codes are given at discharge: they are not known at admission.
"""

from __future__ import annotations

import math
from itertools import product

HEART_RATE = 220045

# feature -> items of chartevents.
FEATURE_CHART: dict[str, tuple[int, ...]] = {
    "heart_rate": (HEART_RATE,),
    "sysbp": (220179, 220050, 225309),
    "diabp": (220180, 220051, 225310),
    "meanbp": (220181, 220052, 225312),
    "resp_rate": (220210, 224690),
    "spo2": (220277,),
    # Taken by hand, from a catheter in the blood, and by two kinds of cooling devices.
    "temp_c": (223762, 223761, 226329, 227632, 227634),
    "fio2": (223835,),
    "glucose": (225664, 220621, 226537),
}
# Units of items without a recorded unit, where they are not the schema's.
CHART_UNITS: dict[int, str] = {223761: "F"}
GCS_MOTOR, GCS_VERBAL, GCS_EYES = 223901, 223900, 220739
FIO2_CHART = 223835
WEIGHT_ADMIT, WEIGHT_DAILY = 226512, 224639
PLAUSIBLE_WEIGHT = (20.0, 500.0)  # kg, of adults; another weight divides no dose
VENTILATOR_MODE, HAMILTON_MODE = 223849, 229314
OXYGEN_DEVICE = 226732
OXYGEN_FLOW = (223834, 227582, 227287)

# Chart items whose text matters; for the others the number is enough.
TEXT_ITEMS = (GCS_VERBAL, VENTILATOR_MODE, HAMILTON_MODE, OXYGEN_DEVICE)
CHART_ITEMS = tuple(
    sorted(
        {item for numbers in FEATURE_CHART.values() for item in numbers}
        | {GCS_MOTOR, GCS_VERBAL, GCS_EYES, WEIGHT_ADMIT, WEIGHT_DAILY, VENTILATOR_MODE}
        | {HAMILTON_MODE, OXYGEN_DEVICE, *OXYGEN_FLOW}
    )
)

# feature -> items of labevents.
FEATURE_LABS: dict[str, tuple[int, ...]] = {
    "albumin": (50862,),
    "alt": (50861,),
    "ast": (50878,),
    "base_excess": (50802,),
    "bicarbonate": (50882,),
    "bilirubin_total": (50885,),
    "bun": (51006, 52647),
    "calcium_free": (50808,),
    "calcium_total": (50893,),
    "chloride": (50902, 50806),
    "creatinine": (50912, 52546),
    "glucose": (50931, 50809),
    "hemoglobin": (51222, 50811),
    "hematocrit": (51221, 50810),
    "inr": (51237,),
    "lactate": (50813, 52442, 53154),
    "magnesium": (50960,),
    "paco2": (50818,),
    "pao2": (50821,),
    "ph": (50820,),
    "platelet": (51265,),
    "potassium": (50971, 50822),
    "pt": (51274,),
    "ptt": (51275,),
    "sodium": (50983, 50824),
    "total_co2": (50804,),
    "wbc": (51301, 51300),
}
SPECIMEN_TYPE, LAB_FIO2 = 52033, 50816
# mimic-code's limits of what SOFA scores: above 0, and MAP below 300.
MIMIC_CODE_LIMITS: dict[str, tuple[float, float]] = {
    "meanbp": (math.ulp(0.0), math.nextafter(300.0, 0.0)),
    "creatinine": (math.ulp(0.0), 150.0),
    "bilirubin_total": (math.ulp(0.0), math.inf),
    "platelet": (math.ulp(0.0), math.inf),
}
LAB_ITEMS = tuple(
    sorted({item for items in FEATURE_LABS.values() for item in items} | {SPECIMEN_TYPE, LAB_FIO2})
)
ARTERIAL_FEATURES = ("paco2", "pao2", "ph")

URINE_ITEMS = (
    226559, 226560, 226561, 226584, 226563, 226564, 226565, 226567, 226557, 226558, 227488, 227489,
)  # fmt: skip
IRRIGANT_IN = 227488  # volume put in, so it counts against the urine that comes out

# drug -> (items, unit of the rate, cap in that unit). Rates above the cap are charting errors:
# the caps are about ten times usual maximal doses.
VASOACTIVES: dict[str, tuple[tuple[int, ...], str, float]] = {
    "norepinephrine": ((221906,), "mcg/kg/min", 10.0),
    "epinephrine": ((221289,), "mcg/kg/min", 10.0),
    "phenylephrine": ((221749,), "mcg/kg/min", 100.0),
    "dopamine": ((221662,), "mcg/kg/min", 100.0),
    "vasopressin": ((222315,), "units/hour", 100.0),
    "dobutamine": ((221653,), "mcg/kg/min", 100.0),
    "milrinone": ((221986,), "mcg/kg/min", 10.0),
}
# What mimic-code leaves out; `extended_vasopressors` adds them, else their rows are counted.
EXTENDED_VASOACTIVES: dict[str, tuple[tuple[int, ...], str, float]] = {
    "phenylephrine": ((229630, 229631, 229632, 229789), "mcg/kg/min", 100.0),
    "angiotensin": ((229709, 229764), "mcg/kg/min", 1.0),
}
# Norepinephrine equivalents, mcg/kg/min per unit of the drug's rate. mimic-code after Goradia
# et al. 2021; AI Clinician after Komorowski et al. 2018 (vasopressin 5 per unit/min).
NE_FACTORS: dict[str, dict[str, float]] = {
    "mimic-code": {
        "norepinephrine": 1.0,
        "epinephrine": 1.0,
        "phenylephrine": 0.1,
        "dopamine": 0.01,
        "vasopressin": 2.5 / 60,
        "angiotensin": 10.0,
    },
    "ai-clinician": {
        "norepinephrine": 1.0,
        "epinephrine": 1.0,
        "phenylephrine": 0.45,
        "dopamine": 0.01,
        "vasopressin": 5 / 60,
        "angiotensin": 10.0,
    },
}

# Fluids: item -> equivalent volume of isotonic fluid per mL (AI Clinician).
FLUIDS: dict[int, float] = {
    225158: 1.0,  # NaCl 0.9%
    225828: 1.0,  # lactated Ringer's
    225943: 1.0,  # solution
    226089: 1.0,  # piggyback
    225168: 1.0,  # packed red cells
    225170: 1.0,  # platelets
    225171: 1.0,  # cryoprecipitate
    220970: 1.0,  # fresh frozen plasma
    220864: 1.0,  # albumin 5%
    225825: 1.0,  # dextrose 5% in NaCl 0.9%
    225827: 1.0,  # dextrose 5% in lactated Ringer's
    225941: 1.0,  # dextrose 5% in NaCl 0.225%
    225823: 0.5,  # dextrose 5% in NaCl 0.45%
    225159: 0.5,  # NaCl 0.45%
    227531: 2.75,  # mannitol
    225161: 3.0,  # NaCl 3%
    220862: 5.0,  # albumin 25%
    220995: 6.66,  # sodium bicarbonate 8.4%
    227533: 6.66,  # sodium bicarbonate 8.4% (ampoule)
    228341: 8.0,  # NaCl 23.4%
}
# One item of each kind of fluid, by the name that concept maps have for it.
FLUID_NAMES: dict[str, int] = {
    "sodium_chloride_0.9": 225158,
    "sodium_chloride_0.45": 225159,
    "sodium_chloride_3": 225161,
    "sodium_chloride_23.4": 228341,
    "lactated_ringer": 225828,
    "solution": 225943,
    "piggyback": 226089,
    "red_cells": 225168,
    "platelets": 225170,
    "cryoprecipitate": 225171,
    "plasma": 220970,
    "albumin_5": 220864,
    "albumin_25": 220862,
    "dextrose_5_in_sodium_chloride_0.9": 225825,
    "dextrose_5_in_sodium_chloride_0.45": 225823,
    "dextrose_5_in_sodium_chloride_0.225": 225941,
    "dextrose_5_in_lactated_ringer": 225827,
    "mannitol": 227531,
    "sodium_bicarbonate_8.4": 220995,
}
# Parts of antibiotic names, as lower case; drugs for eyes, ears and skin are left out by route
# and form.
_ANTIBIOTIC_NAMES = """
    adoxa ala-tet alodox amikacin amikin amoxicill amphotericin ampicillin ancef anidulafungin
    augmentin avelox avidoxy axetil azactam azithromycin aztreonam bactocill bactrim bactroban
    bethkis biaxin bicillin_l-a cayston cedax cefaclor cefadroxil cefazolin cefdinir cefditoren
    cefepime cefotan cefotaxime cefotetan cefoxitin cefpirome cefpodoxime cefprozil ceftaroline
    ceftazidime ceftibuten ceftin ceftriaxone cefuroxime cephalexin cephalothin cephapririn
    chloramphenicol cipro claforan clarithromycin clavulanate cleocin clindamycin cubicin
    dirithromycin doryx doxycy duricef dynacin ery-tab eryc eryped erythrocin erythromycin
    factive flagyl fortaz furadantin garamycin gentamicin kanamycin keflex kefzol ketek levaquin
    lincocin linezolid macrobid macrodantin maxipime mefoxin meropenem methicillin metronidazole
    minocin minocycline monodox monurol morgidox moxatag moxifloxacin mupirocin myrac nafcillin
    neomycin nicazel_doxy_30 nitrofurantoin norfloxacin noroxin ocudox ofloxacin omnicef oracea
    oraxyl oxacillin panixine pc_pen_vk pce_dispertab pediazole penicillin periostat pfizerpen
    piperacillin primsol proquin raniclor rifadin rifampin rocephin septra smz-tmp solodyn
    spectracef streptomycin sulfadiazine sulfamethoxazole sulfatrim sulfisoxazole suprax
    synercid tazicef tazobactam tetracycline timentin tobramycin trimethoprim unasyn vancocin
    vancomycin vantin vibativ vibra-tabs vibramycin zinacef zithromax zosyn zyvox
"""
ANTIBIOTICS: tuple[str, ...] = tuple(name.replace("_", " ") for name in _ANTIBIOTIC_NAMES.split())
# Antibiotics that mimic-code's list lacks; `extended_antibiotics` adds them, else their orders
# are counted.
_EXTENDED_NAMES = """
    cefiderocol cefoperazone ceftobiprole ceftolozane colisti coly-mycin dalbavancin
    dalvance daptomycin delafloxacin dicloxacillin doripenem doribax eravacycline ertapenem
    fetroja fidaxomicin flucloxacillin fosfomycin fusidic gemifloxacin imipenem invanz omadacycline
    oritavancin orbactiv plazomicin polymyxin primaxin quinupristin rifaximin sivextro
    tedizolid teicoplanin telavancin telithromycin ticarcillin tigecycline tygacil xerava zerbaxa
"""
EXTENDED_ANTIBIOTICS: tuple[str, ...] = tuple(_EXTENDED_NAMES.split())
TOPICAL_ROUTES = ("OU", "OS", "OD", "AU", "AS", "AD", "TP")
TOPICAL_ROUTE_PARTS = ("ear", "eye")
TOPICAL_DRUG_PARTS = ("cream", "desensitization", "ophth oint", "gel")

# Ventilation statuses, most invasive first; the first that applies to a moment wins.
VENTILATION_STATUSES = (
    "Tracheostomy", "InvasiveVent", "NonInvasiveVent", "HFNC", "SupplementalOxygen", "None",
)  # fmt: skip
# Text of a ventilator mode that names the status itself, of sources that tell it.
STATUS_TEXT = "status: {}"
# item -> status -> charted texts. Some texts end in a blank in MIMIC-IV.
VENTILATION_TERMS: dict[int, dict[str, tuple[str, ...]]] = {
    OXYGEN_DEVICE: {
        "Tracheostomy": ("Tracheostomy tube", "Trach mask "),
        "InvasiveVent": ("Endotracheal tube",),
        "NonInvasiveVent": ("Bipap mask ", "CPAP mask "),
        "HFNC": ("High flow nasal cannula",),
        "SupplementalOxygen": (
            "Non-rebreather", "Face tent", "Aerosol-cool", "Venti mask ", "Medium conc mask ",
            "Ultrasonic neb", "Vapomist", "Oxymizer", "High flow neb", "Nasal cannula",
        ),
        "None": ("None",),
    },
    VENTILATOR_MODE: {
        "InvasiveVent": (
            "(S) CMV", "APRV", "APRV/Biphasic+ApnPress", "APRV/Biphasic+ApnVol", "APV (cmv)",
            "Ambient", "Apnea Ventilation", "CMV", "CMV/ASSIST", "CMV/ASSIST/AutoFlow",
            "CMV/AutoFlow", "CPAP/PPS", "CPAP/PSV", "CPAP/PSV+Apn TCPL", "CPAP/PSV+ApnPres",
            "CPAP/PSV+ApnVol", "MMV", "MMV/AutoFlow", "MMV/PSV", "MMV/PSV/AutoFlow", "P-CMV",
            "PCV+", "PCV+/PSV", "PCV+Assist", "PRES/AC", "PRVC/AC", "PRVC/SIMV", "PSV/SBT", "SIMV",
            "SIMV/AutoFlow", "SIMV/PRES", "SIMV/PSV", "SIMV/PSV/AutoFlow", "SIMV/VOL",
            "SYNCHRON MASTER", "SYNCHRON SLAVE", "VOL/AC",
        ),
    },
    HAMILTON_MODE: {
        "InvasiveVent": (
            "APRV", "APV (cmv)", "Ambient", "(S) CMV", "P-CMV", "SIMV", "APV (simv)", "P-SIMV",
            "VS", "ASV",
        ),
        "NonInvasiveVent": ("DuoPaP", "NIV", "NIV-ST"),
    },
}  # fmt: skip


# condition -> weight.
CHARLSON_WEIGHTS: dict[str, int] = {
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
CHARLSON_SUPERSEDED_BY: dict[str, str] = {
    "mild_liver_disease": "severe_liver_disease",
    "diabetes_without_cc": "diabetes_with_cc",
    "malignant_cancer": "metastatic_solid_tumor",
}


def _diabetes(last_digits: str) -> str:
    return " ".join(f"E{kind}{digit}" for kind, digit in product(range(10, 15), last_digits))


# condition -> (ICD-9, ICD-10): codes compare on as many characters as they have; `a-b` is every
# code from a to b.
CHARLSON_CODES: dict[str, tuple[str, str]] = {
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


def charlson_code_ranges() -> list[tuple[str, int, int, str, str]]:
    """Rows of (condition, ICD version, compared characters, first code, last code)."""
    rows = []
    for condition, versions in CHARLSON_CODES.items():
        for version, codes in zip((9, 10), versions, strict=True):
            for code in codes.split():
                first, _, last = code.partition("-")
                rows.append((condition, version, len(first), first, last or first))
    return rows


def charlson_index_sql() -> str:
    """SQL sum of the weights over columns named like the conditions (0 or 1)."""
    terms = []
    for condition, weight in CHARLSON_WEIGHTS.items():
        if condition in CHARLSON_SUPERSEDED_BY:
            severe = CHARLSON_SUPERSEDED_BY[condition]
            terms.append(f"greatest({weight} * {condition}, {CHARLSON_WEIGHTS[severe]} * {severe})")
        elif condition not in CHARLSON_SUPERSEDED_BY.values():
            terms.append(f"{weight} * {condition}")
    return " + ".join(terms)
