"""Doses per step, by hand."""

import pytest

from sepsis_jax.cohort import CohortOptions
from tests.sepsis_jax.cohort.tiny import (
    ALBUMIN_25,
    DOPAMINE,
    EPINEPHRINE,
    HALF_SALINE,
    NOREPINEPHRINE,
    PHENYLEPHRINE,
    SALINE,
    VASOPRESSIN,
    Tiny,
)
from worldmodel.errors import InputError


@pytest.fixture
def tiny():
    tiny = Tiny()
    tiny.septic_stay(1)
    return tiny


def doses(episodes):
    return episodes.vasopressor_dose[0].tolist()


def fluids(episodes):
    return episodes.fluid_dose[0].tolist()


STAY = 30_000_011

GOLDEN = [
    (NOREPINEPHRINE, 0.1, "mcg/kg/min"),
    (EPINEPHRINE, 0.1, "mcg/kg/min"),
    (PHENYLEPHRINE, 1.0, "mcg/kg/min"),
    (DOPAMINE, 10.0, "mcg/kg/min"),
    (VASOPRESSIN, 2.4, "units/hour"),
]


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ("mimic-code", [0.1, 0.1, 0.1, 0.1, 0.1, 0]),
        ("ai-clinician", [0.1, 0.1, 0.45, 0.1, 0.2, 0]),
    ],
)
def test_norepinephrine_equivalents(build, tiny, factors, expected):
    for step, (item, rate, unit) in enumerate(GOLDEN):
        tiny.pressor(STAY, 4 * step, 4 * step + 2, item, rate, unit)
    episodes, _ = build(tiny, vasopressor_factors=factors)
    assert doses(episodes) == pytest.approx(expected)


def test_drugs_at_the_same_time_add_up_and_lines_of_one_drug_do_not(build, tiny):
    tiny.pressor(STAY, 0, 4, NOREPINEPHRINE, 0.1)
    tiny.pressor(STAY, 1, 2, NOREPINEPHRINE, 0.3)  # second line of the same drug: the higher one
    tiny.pressor(STAY, 1, 3, VASOPRESSIN, 2.4, "units/hour")
    # By the hour: 0.1, 0.3 + 0.1, 0.1 + 0.1, 0.1.
    assert doses(build(tiny)[0])[0] == pytest.approx(0.4)
    weighted = doses(build(tiny, vasopressor_dose="time-weighted")[0])
    assert weighted[0] == pytest.approx((0.1 + 0.4 + 0.2 + 0.1) / 4)


def test_an_infusion_is_split_between_steps_and_a_pause_gives_nothing(build, tiny):
    # 3-5 h, then paused, then 13-14 h: rows of one order with a gap of a whole step between.
    tiny.pressor(STAY, 3, 5, NOREPINEPHRINE, 0.2, status="Paused")
    tiny.pressor(STAY, 13, 14, NOREPINEPHRINE, 0.2)
    assert doses(build(tiny)[0]) == pytest.approx([0.2, 0.2, 0, 0.2, 0, 0])
    weighted = doses(build(tiny, vasopressor_dose="time-weighted")[0])
    assert weighted == pytest.approx([0.05, 0.05, 0, 0.05, 0, 0])


def test_an_infusion_that_ends_with_a_step_does_not_touch_the_next(build, tiny):
    tiny.pressor(STAY, 0, 4, NOREPINEPHRINE, 0.2)
    assert doses(build(tiny)[0]) == pytest.approx([0.2, 0, 0, 0, 0, 0])


def test_units_are_converted(build, tiny):
    tiny.pressor(STAY, 0, 1, NOREPINEPHRINE, 0.0002, "mg/kg/min")
    tiny.pressor(STAY, 4, 5, NOREPINEPHRINE, 0.2, "mg/kg/min", weight=1.0)  # mistyped unit
    tiny.pressor(STAY, 8, 9, PHENYLEPHRINE, 80.0, "mcg/min", weight=80.0)
    tiny.pressor(STAY, 12, 13, VASOPRESSIN, 0.04, "units/min")
    assert doses(build(tiny)[0]) == pytest.approx([0.2, 0.2, 0.1, 0.1, 0, 0])


def test_unknown_units_stop_or_are_counted(build, tiny):
    tiny.pressor(STAY, 0, 1, NOREPINEPHRINE, 3.0, "drops/min")
    with pytest.raises(InputError, match=r"inputevents.*rateuom.*'drops/min'.*norepinephrine.*1"):
        build(tiny)
    episodes, report = build(tiny, unknown_units="drop")
    assert doses(episodes) == [0] * 6
    assert report.counts["treatments"]["unknown_units"] == [
        {"column": "rateuom", "item": "norepinephrine", "unit": "drops/min", "rows": 1}
    ]


def test_implausible_rates_are_capped_and_counted(build, tiny):
    tiny.pressor(STAY, 0, 1, NOREPINEPHRINE, 359.0)
    tiny.pressor(STAY, 4, 5, VASOPRESSIN, 2400.0, "units/hour")
    episodes, report = build(tiny)
    assert doses(episodes)[:2] == pytest.approx([10.0, 100 * 2.5 / 60])
    assert report.counts["treatments"]["norepinephrine rates above the cap"] == 1
    assert report.counts["treatments"]["vasopressin rates above the cap"] == 1
    episodes, _ = build(tiny, cap_vasopressors=False)
    assert doses(episodes)[:2] == pytest.approx([359.0, 100.0])


def test_extended_drug_list(build, tiny):
    tiny.pressor(STAY, 0, 1, 229630, 1.0)
    tiny.pressor(STAY, 4, 5, 229709, 20.0, "ng/kg/min")
    assert doses(build(tiny)[0])[:2] == [0, 0]
    assert doses(build(tiny, extended_vasopressors=True)[0])[:2] == pytest.approx([0.1, 0.2])


def test_fluid_rates_are_spread_and_boluses_are_not(build, tiny):
    tiny.infuse(STAY, 2, 10, SALINE, amount=800.0, unit="ml", rate=100.0, rate_unit="mL/hour")
    tiny.infuse(STAY, 3, 5, SALINE, amount=500.0, unit="ml")  # no rate: all at hour 3
    assert fluids(build(tiny)[0]) == pytest.approx([200 + 500, 400, 200, 0, 0, 0])


def test_fluids_count_by_tonicity(build, tiny):
    tiny.infuse(STAY, 0, 1, HALF_SALINE, amount=1.0, unit="L", rate=1000, rate_unit="mL/hour")
    tiny.infuse(STAY, 4, 5, ALBUMIN_25, amount=100.0, unit="ml", rate=100, rate_unit="mL/hour")
    tiny.infuse(STAY, 8, 9, 220995, amount=50.0, unit="mEq")
    tiny.infuse(STAY, 12, 13, 228341, amount=120.0, unit="mEq")  # 30 mL of NaCl 23.4%
    assert fluids(build(tiny)[0])[:4] == pytest.approx([500, 500, 333, 240])


def test_a_unit_that_does_not_fit_the_fluid_is_unknown(build, tiny):
    tiny.infuse(STAY, 0, 1, SALINE, amount=50.0, unit="mEq")
    with pytest.raises(InputError, match=r"column amountuom has unit 'mEq' for fluid item 225158"):
        build(tiny)


def test_fluid_before_admission_and_after_the_window_is_left_out(build, tiny):
    tiny.infuse(STAY, -2, 2, SALINE, amount=400.0, unit="ml", rate=100.0, rate_unit="mL/hour")
    tiny.infuse(STAY, -1, -0.5, SALINE, amount=1000.0, unit="ml")
    tiny.infuse(STAY, 22, 26, SALINE, amount=400.0, unit="ml", rate=100.0, rate_unit="mL/hour")
    assert fluids(build(tiny)[0]) == pytest.approx([200, 0, 0, 0, 0, 200])


def test_levels_are_quartiles_of_the_training_doses(build, tiny):
    for step, rate in enumerate([0.1, 0.2, 0.3, 0.4]):
        tiny.pressor(STAY, 4 * step, 4 * step + 1, NOREPINEPHRINE, rate)
    episodes, report = build(tiny)
    assert episodes.vasopressor[0].tolist() == [1, 2, 3, 4, 0, 0]
    assert report.counts["dose_edges_defaulted"] == ["fluid"]


@pytest.mark.parametrize("step_hours", [1, 2, 4, 8])
def test_total_volume_does_not_depend_on_the_step(build, tiny, step_hours):
    tiny.infuse(STAY, 1.25, 9.5, SALINE, amount=777.0, unit="ml", rate=94.2, rate_unit="mL/hour")
    tiny.infuse(STAY, 11, 12, SALINE, amount=250.0, unit="ml")
    episodes, _ = build(tiny, step_hours=step_hours)
    assert len(fluids(episodes)) == 24 // step_hours
    assert sum(fluids(episodes)) == pytest.approx(1027, rel=1e-5)


def test_options_name_the_choices():
    with pytest.raises(InputError, match="vasopressor_dose: 'mean' is unknown; choose one of max"):
        CohortOptions(vasopressor_dose="mean")
