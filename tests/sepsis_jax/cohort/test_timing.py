"""What a row may know: only what was recorded before its treatment began."""

import copy
from datetime import timedelta

import numpy as np
import pytest

from sepsis_jax.cohort import items
from tests.sepsis_jax.cohort.tiny import (
    ADMITTED,
    CREATININE,
    LACTATE,
    NOREPINEPHRINE,
    SALINE,
    Tiny,
)
from worldmodel.clinical import sofa
from worldmodel.schema import INDEX, URINE

STAY = 30_000_011
KNOWN_BEFORE = {"timing": "known-before", "sofa": "row"}


@pytest.fixture
def tiny():
    tiny = Tiny()
    tiny.septic_stay(1)
    return tiny


def test_a_vasopressor_is_scored_in_the_row_after_it(build):
    tiny = Tiny()
    tiny.septic_stay(1)
    for row in tiny.tables["chartevents"]:
        if row["itemid"] == 220052:
            row["valuenum"] = 80.0
    tiny.pressor(STAY, 5, 7, NOREPINEPHRINE, 0.2)
    without, _ = build(tiny, **KNOWN_BEFORE)
    assert np.flatnonzero(np.asarray(without.vasopressor_dose)[0]).tolist() == [1]
    tiny.tables["inputevents"].clear()
    never, _ = build(tiny, **KNOWN_BEFORE)
    points = np.asarray(without.sofa)[0] - np.asarray(never.sofa)[0]
    assert points.tolist() == [0, 0, 4, 0, 0, 0]
    # As published, the row of the treatment already knows it, and mimic-code remembers it a day.
    never, _ = build(tiny)
    tiny.pressor(STAY, 5, 7, NOREPINEPHRINE, 0.2)
    points = np.asarray(build(tiny)[0].sofa)[0] - np.asarray(never.sofa)[0]
    assert points.tolist() == [0, 4, 4, 4, 4, 4]


def test_rows_hold_the_step_that_ended(build, tiny, feature):
    tiny.chart(STAY, 0, 220210, 10)
    tiny.chart(STAY, 3.9, 224690, 20)
    tiny.chart(STAY, 4, 220210, 30)
    episodes, _ = build(tiny, **KNOWN_BEFORE)
    assert feature(episodes, "resp_rate")[1:4] == pytest.approx([15, 30, 30])
    assert episodes.measured[0, :, INDEX["resp_rate"]].tolist() == [False, True, True] + 3 * [False]


def test_measurements_before_admission_are_held(build, tiny, feature):
    tiny.lab(STAY, -2, LACTATE, 5.0, unit="mmol/L")
    tiny.lab(STAY, -6, CREATININE, 3.0, unit="mg/dL")
    tiny.lab(STAY, -40, CREATININE, 9.0, unit="mg/dL")  # no longer held
    episodes, _ = build(tiny, **KNOWN_BEFORE)
    assert feature(episodes, "lactate")[:3] == pytest.approx([5, 5, 5])
    assert feature(episodes, "creatinine")[:2] == pytest.approx([3.0, 2.5])
    assert episodes.measured[0, :2, INDEX["creatinine"]].tolist() == [False, True]


def test_urine_of_the_first_row_is_the_median_unless_charted(build, tiny, feature):
    tiny.output(STAY, 1, 300)
    tiny.output(STAY, 9, 500)
    episodes, _ = build(tiny, **KNOWN_BEFORE)
    # Rows 1 to 5 hold 300, 0, 500, 0, 0 mL.
    assert feature(episodes, "output_4hourly") == [0, 300, 0, 500, 0, 0]
    tiny.output(STAY, -1, 80)
    assert feature(build(tiny, **KNOWN_BEFORE)[0], "output_4hourly")[0] == 80


def test_ventilation_is_the_newest_status(build, tiny):
    for hour, device in ((5, "Endotracheal tube"), (9, "Endotracheal tube"), (13, "Nasal cannula")):
        tiny.chart(STAY, hour, items.OXYGEN_DEVICE, None, text=device)
        tiny.chart(STAY, hour, 223834, 4)
    ventilated = build(tiny, **KNOWN_BEFORE)[0].ventilated[0].tolist()
    assert ventilated == [False, False, True, True, False, False]


def busy(seed):
    """A patient whose every kind of record changes with the hour."""
    rng = np.random.default_rng(seed)
    tiny = Tiny()
    for subject in (1, 2):
        stay = tiny.septic_stay(subject)
        for hour in np.arange(0, 24, 1.5):
            tiny.chart(stay, hour, 220052, 50 + rng.integers(50))
            tiny.chart(stay, hour, 220210, 10 + rng.integers(20))
            tiny.lab(stay, hour, CREATININE, 1.0 + 5 * rng.random(), unit="mg/dL")
            tiny.output(stay, hour, float(rng.integers(200)))
            device = ("Endotracheal tube", "Nasal cannula")[rng.integers(2)]
            tiny.chart(stay, hour, items.OXYGEN_DEVICE, None, text=device)
            tiny.chart(stay, hour, 223834, 4)
            if rng.random() < 0.5:
                tiny.pressor(stay, hour, hour + 1, NOREPINEPHRINE, 0.05 + 0.3 * rng.random())
            tiny.infuse(stay, hour, hour + 0.5, SALINE, amount=100 * rng.random(), unit="ml")
    return tiny


@pytest.mark.parametrize("step", [0, 2, 4])
def test_nothing_after_a_moment_changes_the_rows_up_to_it(build, step):
    tiny = busy(0)
    moment = ADMITTED + timedelta(hours=4 * step)
    later = copy.deepcopy(tiny)
    other = busy(1)
    for table, column in (
        ("chartevents", "charttime"),
        ("labevents", "charttime"),
        ("outputevents", "charttime"),
        ("inputevents", "starttime"),
    ):
        # What decides on sepsis stays, and the first patient, from whom all medians come.
        kept = [row for row in tiny.tables[table] if row[column] < moment or not mine(row)]
        changed = [row for row in other.tables[table] if row[column] >= moment and mine(row)]
        later.tables[table] = kept + changed
    split = {"split": (0.5, 0.25, 0.25), "seed": seed_that_parts()}
    before, after = (build(one, **KNOWN_BEFORE, **split)[0] for one in (tiny, later))
    known = slice(0, step + 1)
    for name in ("dynamic", "measured", "ventilated", "sofa", "urine_24h"):
        one, two = (np.asarray(getattr(found, name))[1] for found in (before, after))
        np.testing.assert_array_equal(one[known], two[known], err_msg=name)
        if name in ("dynamic", "urine_24h"):
            assert (one[step + 1 :] != two[step + 1 :]).any(), name


def mine(row):
    return row.get("subject_id", 0) == 2 or row.get("stay_id", 0) == 30_000_021


def seed_that_parts():
    """A seed that puts the first patient into the training split and the second elsewhere."""
    from sepsis_jax.cohort.build import split_of

    patients, shares = np.array([1, 2]), (0.5, 0.25, 0.25)
    return next(s for s in range(100) if (split_of(patients, shares, s) > 0).tolist() == [0, 1])


def test_sofa_of_a_row_is_that_of_its_own_values(build):
    episodes, _ = build(busy(3), **KNOWN_BEFORE)
    given = np.pad(np.asarray(episodes.vasopressor_dose), ((0, 0), (1, 0)))[:, :-1]
    urine = sofa.urine_24h(episodes.dynamic[..., URINE])
    np.testing.assert_allclose(episodes.urine_24h, urine, rtol=1e-6)
    score = sofa.standard(
        episodes.dynamic,
        ventilated=episodes.ventilated,
        vasopressor_dose=given,
        urine_24h=urine,
    )
    np.testing.assert_array_equal(episodes.sofa, score.total)
