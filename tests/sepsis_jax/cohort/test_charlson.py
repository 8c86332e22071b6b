"""Charlson index: age bands and diagnosis codes."""

import pytest

from sepsis_jax.cohort import items
from tests.sepsis_jax.cohort.tiny import Tiny

AGES = (49, 50, 51, 60, 70, 80, 81)


@pytest.mark.parametrize(
    ("bands", "points"),
    [("2026-07", [0, 1, 1, 2, 3, 4, 4]), ("before", [0, 0, 1, 1, 2, 3, 4])],
)
def test_age_bands(build, bands, points):
    tiny = Tiny()
    for subject, age in enumerate(AGES):
        tiny.septic_stay(subject, age=age)
    episodes, _ = build(tiny, charlson_age_bands=bands)
    assert episodes.static[:, 0].tolist() == list(AGES)
    assert episodes.static[:, 2].tolist() == points


def test_diagnoses(build):
    cases = {
        ("I219",): 1,  # heart attack
        ("I219", "I252"): 1,  # counted once
        ("E119",): 1,
        ("E119", "E112"): 2,  # diabetes with damage supersedes
        ("K703", "K704"): 3,  # severe liver disease supersedes mild
        ("C50", "C780"): 6,  # metastasis supersedes cancer
        ("C50",): 2,
        ("N186", "G8191"): 4,
        ("Z992", "B20"): 8,
        ("Z000",): 0,
        ("C44",): 0,  # skin cancer other than melanoma
    }
    tiny = Tiny()
    for subject, codes in enumerate(cases):
        stay = tiny.septic_stay(subject, age=40, gender="F")
        for code in codes:
            tiny.diagnosis(stay, code)
    old = tiny.septic_stay(99, age=40)
    for code in ("4280", "0701", "V427", "1961"):  # heart failure 1, mild liver 1, metastasis 6
        tiny.diagnosis(old, code, version=9)
    episodes, _ = build(tiny)
    assert episodes.static[:, 2].tolist() == [*cases.values(), 8]
    assert episodes.static[:, 1].tolist() == [0] * len(cases) + [1]


def test_every_condition_has_codes_and_a_weight():
    assert set(items.CHARLSON_CODES) == set(items.CHARLSON_WEIGHTS)
    assert set(items.CHARLSON_SUPERSEDED_BY) | set(items.CHARLSON_SUPERSEDED_BY.values()) <= set(
        items.CHARLSON_CODES
    )
