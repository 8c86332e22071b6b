"""Features, urine, ventilation and SOFA per step, by hand."""

import numpy as np
import pytest

from sepsis_jax.cohort import items
from tests.sepsis_jax.cohort.tiny import BASE_EXCESS, CREATININE, LACTATE, PO2, Tiny
from worldmodel.schema import INDEX

STAY = 30_000_011


@pytest.fixture
def tiny():
    tiny = Tiny()
    tiny.septic_stay(1)
    return tiny


def measured(episodes, name):
    return episodes.measured[0, :, INDEX[name]].tolist()


def test_a_step_holds_the_mean_of_its_values(build, tiny, feature):
    tiny.chart(STAY, 0, 220210, 10)
    tiny.chart(STAY, 3.9, 224690, 20)
    tiny.chart(STAY, 4, 220210, 30)  # the end of a step belongs to the next one
    episodes, _ = build(tiny)
    assert feature(episodes, "resp_rate")[:3] == pytest.approx([15, 30, 30])
    assert measured(episodes, "resp_rate") == [True, True, False, False, False, False]


@pytest.mark.parametrize("step_hours", [1, 2, 4, 8])
def test_steps_of_every_width(build, tiny, feature, step_hours):
    for hour in range(24):
        tiny.chart(STAY, hour, 220210, 10 + hour)
    episodes, report = build(tiny, step_hours=step_hours)
    expected = np.arange(10, 34).reshape(-1, step_hours).mean(1)
    assert feature(episodes, "resp_rate") == pytest.approx(expected.tolist())
    assert report.manifest["options"]["step_hours"] == step_hours


def test_units_become_those_of_the_schema(build, tiny, feature):
    tiny.chart(STAY, 0, 223761, 98.6)
    tiny.chart(STAY, 4, 223762, 38.0)
    tiny.chart(STAY, 0, 223835, 0.5)
    tiny.chart(STAY, 4, 223835, 60)
    episodes, _ = build(tiny)
    assert feature(episodes, "temp_c")[:2] == pytest.approx([37, 38], abs=1e-4)
    assert feature(episodes, "fio2")[:2] == pytest.approx([50, 60])


def test_values_outside_the_range_are_left_out_and_counted(build, tiny, feature):
    tiny.chart(STAY, 0, 220052, -27)
    tiny.lab(STAY, 2, LACTATE, 999_999.0, unit="mmol/L")
    tiny.lab(STAY, 2, LACTATE, 4.0, unit="mmol/L")
    episodes, report = build(tiny)
    assert feature(episodes, "lactate")[0] == 4
    assert measured(episodes, "lactate")[:2] == [True, False]
    assert report.counts["values_left_out"] == {"outside range": {"meanbp": 1, "lactate": 1}}


@pytest.mark.parametrize(("choice", "steps"), [("keep", [-1, -3]), ("positive-only", [2, None])])
def test_base_excess_sign(build, tiny, feature, choice, steps):
    for hour, value in ((0, 2.0), (1, -4.0), (4, -3.0)):
        tiny.lab(STAY, hour, BASE_EXCESS, value, unit="mEq/L")
    episodes, report = build(tiny, base_excess=choice)
    values, seen = feature(episodes, "base_excess"), measured(episodes, "base_excess")
    assert [value if there else None for value, there in zip(values, seen, strict=True)][
        :2
    ] == steps
    dropped = report.counts["values_left_out"].get("not positive", {})
    assert dropped == ({"base_excess": 2} if choice == "positive-only" else {})


@pytest.mark.parametrize(("choice", "parts"), [("raw", (1, 1, 4)), ("mimic-code", (4, 5, 6))])
def test_coma_scale_of_an_intubated_patient(build, tiny, feature, choice, parts):
    tiny.chart(STAY, 1, items.GCS_EYES, 1)
    tiny.chart(STAY, 1, items.GCS_VERBAL, 1, text="No Response-ETT")
    tiny.chart(STAY, 1, items.GCS_MOTOR, 4)
    episodes, _ = build(tiny, gcs_intubated=choice)
    found = tuple(feature(episodes, f"gcs_{part}")[0] for part in ("eye", "verbal", "motor"))
    assert found == parts
    # The hourly SOFA follows mimic-code either way: 15 points, so creatinine and pressure only.
    assert episodes.sofa[0, 0] == 3


def test_blood_gases_of_veins(build, tiny, feature):
    tiny.lab(STAY, 1, PO2, 40.0, unit="mm Hg")
    tiny.lab(STAY, 1.5, PO2, 90.0, unit="mm Hg", arterial=True)
    assert feature(build(tiny)[0], "pao2")[0] == 90
    assert feature(build(tiny, blood_gas="all")[0], "pao2")[0] == 65


def test_urine(build, tiny, feature):
    tiny.output(STAY, 1, 300)
    tiny.output(STAY, 2, 200, item=226560)
    tiny.output(STAY, 3, 100, item=items.IRRIGANT_IN)
    tiny.output(STAY, 9, 6000)  # more than one record can hold
    tiny.output(STAY, 13, 50, item=items.IRRIGANT_IN)
    episodes, report = build(tiny)
    assert feature(episodes, "output_4hourly") == [400, 0, 0, 0, 0, 0]
    # As in simulation: of the last 24 h of rows, scaled up in the first day.
    day = [2400, 1200, 800, 600, 480, 400]
    assert episodes.urine_24h[0].tolist() == pytest.approx(day)
    assert report.counts["urine"] == {
        "urine records above the cap": 1,
        "steps with negative urine set to 0 mL": 1,
        "steps above 4000 mL set to the limit": 0,
        "steps without a urine record": 4,
    }


def test_steps_without_urine_may_be_imputed(build, tiny, feature):
    tiny.output(STAY, 1, 300)
    tiny.output(STAY, 9, 500)
    episodes, _ = build(tiny, missing_urine="impute")
    # Held for one step, then the median of 300 and 500.
    assert feature(episodes, "output_4hourly") == [300, 300, 500, 500, 400, 400]


def test_urine_of_a_day_forgets_older_urine(build):
    tiny = Tiny()
    tiny.septic_stay(1, hours=40)
    tiny.output(STAY, 1, 300)
    tiny.output(STAY, 30, 70)
    episodes, _ = build(tiny)
    first_day = [1800, 900, 600, 450, 360, 300]
    assert episodes.urine_24h[0].tolist() == pytest.approx([*first_day, 0, 70, 70, 70])


def test_ventilation(build, tiny):
    for hour, device in ((5, "Endotracheal tube"), (9, "Endotracheal tube"), (13, "Nasal cannula")):
        tiny.chart(STAY, hour, items.OXYGEN_DEVICE, None, text=device)
        tiny.chart(STAY, hour, 223834, 4)
    tiny.chart(STAY, 17, items.OXYGEN_DEVICE, None, text="Trach mask ")
    tiny.chart(STAY, 17, 223834, 4)
    tiny.chart(STAY, 18, items.OXYGEN_DEVICE, None, text="Trach mask ")
    tiny.chart(STAY, 18, 223834, 4)
    # Invasive from 5 h until the cannula at 13 h; tracheostomy from 17 to 18 h.
    assert build(tiny)[0].ventilated[0].tolist() == [False, True, True, True, False, False]
    either = build(tiny, ventilation="invasive-or-tracheostomy")[0].ventilated[0].tolist()
    assert either == [False, True, True, True, True, False]


def test_sofa_of_the_last_day_or_of_the_step(build, tiny):
    tiny.lab(STAY, 9, CREATININE, 6.0, unit="mg/dL")
    # Creatinine 2.5 (2 points) in the first step, 6.0 (4) in the third; pressure always 1.
    assert build(tiny)[0].sofa[0].tolist() == [3, 3, 5, 5, 5, 5]
    assert build(tiny, sofa="step")[0].sofa[0].tolist() == [3, 1, 5, 1, 1, 1]


def test_holding_without_limit(build, tiny, feature):
    tiny.chart(STAY, 0, 220210, 12)
    tiny.chart(STAY, 20, 220210, 30)
    # Respiratory rate is held for one step of 4 h, then the median 21 stands in.
    assert feature(build(tiny)[0], "resp_rate") == [12, 12, 21, 21, 21, 30]
    assert feature(build(tiny, carry_forever=True)[0], "resp_rate") == [12] * 5 + [30]
