"""Records are used once and as they are meant, or they are counted; nothing is made up."""

import time
from datetime import timedelta

import numpy as np
import pytest

from sepsis_jax.cohort import CohortOptions, build_cohort, items
from tests.sepsis_jax.cohort.tiny import (
    ADMITTED,
    EPINEPHRINE,
    NOREPINEPHRINE,
    PHENYLEPHRINE,
    SALINE,
    Tiny,
)
from worldmodel.episode_files import load_episodes
from worldmodel.errors import InputError
from worldmodel.schema import INDEX

BILIRUBIN, PLATELET, GLUCOSE, PT = 50885, 51265, 50931, 51274
RESP_RATE, CELSIUS, FAHRENHEIT, FIO2 = 220210, 223762, 223761, 223835


def row(episodes, name, stay=0):
    return np.asarray(episodes.dynamic)[stay, : int(episodes.length[stay]), INDEX[name]]


def seen(episodes, name, stay=0):
    return np.asarray(episodes.measured)[stay, :, INDEX[name]].tolist()


def test_vasopressors_that_were_not_given(build):
    tiny = Tiny()
    stays = [tiny.septic_stay(subject) for subject in range(4)]
    tiny.pressor(stays[0], 0, 4, NOREPINEPHRINE, 0.5, status="Rewritten")
    tiny.pressor(stays[0], 0, 4, NOREPINEPHRINE, 0.05)
    tiny.pressor(stays[1], 0, 4, EPINEPHRINE, -0.5)  # takes nothing away from the other drug
    tiny.pressor(stays[1], 0, 4, NOREPINEPHRINE, 0.3)
    tiny.pressor(stays[2], 6, 4, NOREPINEPHRINE, 0.3)  # ends before it starts
    tiny.pressor(stays[2], 8, 12, NOREPINEPHRINE, 0.3)
    tiny.tables["inputevents"][-1]["endtime"] = None
    tiny.infuse(stays[3], 0, 1, SALINE, amount=500.0, unit="ml", status=" REWRITTEN")
    tiny.infuse(stays[3], 0, 1, SALINE, amount=300.0, unit="ml")
    tiny.tables["inputevents"][-1]["starttime"] = None
    episodes, report = build(tiny)
    doses = np.asarray(episodes.vasopressor_dose)
    assert doses[:, 0] == pytest.approx([0.05, 0.3, 0, 0])
    assert not doses[:, 1:].any() and not np.asarray(episodes.fluid_dose).any()
    # 3 points for a small dose, 4 for a large one, 1 for the pressure; creatinine makes 2.
    assert episodes.sofa[:, 0].tolist() == [5, 6, 3, 3]
    assert report.counts["treatments"] == {
        "unknown_units": [],
        "fluid rows marked as rewritten": 1,
        "fluid rows without a start": 1,
        "vasoactive rows marked as rewritten": 1,
        "vasoactive rows that end before they start": 1,
        "vasoactive rows with a rate of zero or less": 1,
        "vasoactive rows without a start or an end": 1,
    }


def test_a_rate_per_patient_is_divided_by_a_plausible_weight(build):
    tiny = Tiny()
    weights = {None: 80.0, 0.0: 80.0, 1.0: 80.0, 9999.0: 80.0, 100.0: 80.0, -80.0: None}
    for subject, (weight, charted) in enumerate(weights.items()):
        stay = tiny.septic_stay(subject)
        tiny.pressor(stay, 4, 8, NOREPINEPHRINE, 8.0, "mcg/min", weight=weight)
        if charted:
            tiny.chart(stay, 3, items.WEIGHT_ADMIT, charted)
            tiny.chart(stay, 9, items.WEIGHT_DAILY, 40.0)  # charted later
    episodes, report = build(tiny)
    assert np.asarray(episodes.vasopressor_dose)[:, 1] == pytest.approx([0.1] * 4 + [0.08, 0])
    assert report.counts["treatments"] == {
        "unknown_units": [],
        "vasoactive rows divided by a charted weight": 4,
        "vasoactive rows per patient without a plausible weight": 1,
    }


def test_a_row_counts_once(build):
    tiny = Tiny()
    stay = tiny.septic_stay(1)
    for table in ("patients", "admissions", "icustays"):
        tiny.repeat(table)
    tiny.infuse(stay, 0, 2, SALINE, amount=500.0, unit="ml", rate=250, rate_unit="mL/hour")
    tiny.repeat("inputevents", 2)
    tiny.infuse(stay, 5, 6, SALINE, amount=250.0, unit="ml", order=1)
    tiny.infuse(stay, 5, 6, SALINE, amount=250.0, unit="ml", order=2)  # another order
    tiny.output(stay, 1, 300)
    tiny.repeat("outputevents")
    tiny.chart(stay, 1, RESP_RATE, 20)
    tiny.repeat("chartevents")
    tiny.chart(stay, 2, RESP_RATE, 30)
    tiny.lab(stay, 1, PLATELET, 100, unit="K/uL")
    tiny.repeat("labevents")
    tiny.lab(stay, 2, PLATELET, 200, unit="K/uL")
    episodes, report = build(tiny)
    assert report.consort[0]["remaining"] == report.stays == 1
    assert episodes.fluid_dose[0].tolist() == [500, 500, 0, 0, 0, 0]
    assert row(episodes, "output_4hourly")[0] == 300
    assert (row(episodes, "resp_rate")[0], row(episodes, "platelet")[0]) == (25, 150)
    counts = report.counts
    assert counts["stays"] == {
        f"repeated rows of {name}": 1 for name in ("icustays", "admissions", "patients")
    }
    repeated = [counts[name]["repeated rows"] for name in ("treatments", "outputs", "charts")]
    assert [*repeated, counts["laboratory"]["repeated rows"]] == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("table", "column", "value", "message"),
    [
        ("patients", "gender", "F", "patients.parquet: subject_id 1 stands in 2 rows that differ"),
        (
            "icustays",
            "outtime",
            ADMITTED + timedelta(hours=9),
            "icustays.*: stay_id 30000011 stand",
        ),
        ("admissions", "deathtime", ADMITTED, "admissions.*: hadm_id 20000011 stands in 2 rows"),
        ("icustays", "stay_id", None, "icustays.*: column stay_id is empty in 1 rows"),
    ],
)
def test_rows_that_contradict_each_other_are_refused(build, table, column, value, message):
    tiny = Tiny()
    tiny.septic_stay(1)
    tiny.repeat(table)
    tiny.tables[table][-1][column] = value
    with pytest.raises(InputError, match=message):
        build(tiny)


def test_numbers_of_patients_keep_every_digit(build):
    tiny = Tiny()
    for subject in (7, 8):
        tiny.septic_stay(subject)
    far = {"stay_id": {30_000_071: 3_000_000_011}, "subject_id": {8: 2**32 + 7}}
    for rows in tiny.tables.values():
        for record in rows:
            for column, changes in far.items():
                record |= (
                    {column: changes.get(record[column], record[column])}
                    if (column in record)
                    else {}
                )
    episodes, report = build(tiny)
    assert episodes.stay_id.tolist() == [30_000_081, 3_000_000_011]
    assert episodes.subject_id.tolist() == [2**32 + 7, 7]
    assert report.patients == 2


def test_results_without_a_number(build):
    tiny = Tiny()
    stay = tiny.septic_stay(1)
    tiny.lab(stay, 1, BILIRUBIN, None, comments="<0.2.  ", unit="mg/dL")
    tiny.lab(stay, 5, BILIRUBIN, None, text="> 30", unit="mg/dL")
    tiny.lab(stay, 1, PLATELET, None, text="150", unit="K/uL")
    tiny.lab(stay, 1, GLUCOSE, None, text="___", comments="GREATER THAN 1,000.  VERIFIED.")
    tiny.lab(stay, 1, PT, None, text="ERROR", comments="UNABLE TO REPORT; NORMAL IS >9", unit="sec")
    tiny.chart(stay, 1, RESP_RATE, None, text="not done")
    episodes, report = build(tiny)
    found = (row(episodes, name)[0] for name in ("bilirubin_total", "platelet", "glucose"))
    assert list(found) == pytest.approx([0.2, 150, 1000])
    assert row(episodes, "bilirubin_total")[1] == 30 and not any(seen(episodes, "pt"))
    assert report.counts["values_at_a_limit"] == {"bilirubin_total": 2, "glucose": 1}
    assert report.counts["values_left_out"] == {"no number": {"pt": 1, "resp_rate": 1}}
    # SOFA sees the limit as well: bilirubin above 30 is 4 points more; mimic-code does not.
    assert episodes.sofa[0, :2].tolist() == [3, 7]
    assert build(tiny, sofa_values="mimic-code")[0].sofa[0, :2].tolist() == [3, 3]


def test_every_item_of_temperature_counts(build):
    tiny = Tiny()
    stay = tiny.septic_stay(1, hours=40)
    for step, item in enumerate((226329, 227632, 227634)):
        tiny.chart(stay, 4 * step, item, 38.9)
    for hour, value in enumerate((97.2, 99.0, 98.9)):
        tiny.chart(stay, 12 + hour, CELSIUS, value)  # no such temperatures in Celsius
    tiny.chart(stay, 15, FAHRENHEIT, 37.0)
    tiny.chart(stay, 20, CELSIUS, 100.4, unit="°F")  # the unit is believed, not the item
    tiny.chart(stay, 24, FAHRENHEIT, 38.5, unit="°C")
    for hour, value in enumerate((1, 0.5, 1000, 10, 21)):
        tiny.chart(stay, 4 * hour, FIO2, value)
    episodes, report = build(tiny)
    assert row(episodes, "temp_c")[[0, 1, 2, 5, 6]] == pytest.approx([38.9] * 3 + [38, 38.5])
    assert seen(episodes, "temp_c") == [True] * 3 + [False] * 2 + [True] * 2 + [False] * 3
    assert row(episodes, "fio2")[[0, 1, 4]] == pytest.approx([100, 50, 21])
    assert seen(episodes, "fio2")[:5] == [True, True, False, False, True]
    assert report.counts["values_left_out"] == {"outside range": {"temp_c": 4, "fio2": 2}}


def test_drugs_outside_mimic_codes_lists_are_read_or_counted(build):
    tiny = Tiny()
    newer = ("Ertapenem", "DAPTOmycin", "Imipenem-Cilastatin", "Tigecycline", "Colistin")
    stays = [tiny.septic_stay(subject) for subject in range(1 + len(newer))]
    tiny.tables["prescriptions"].clear()
    tiny.antibiotic(stays[0], 2)
    tiny.pressor(stays[0], 0, 4, 229630, 0.5)
    for stay, drug in zip(stays[1:], newer, strict=True):
        tiny.antibiotic(stay, 2, drug=drug)
    episodes, report = build(tiny)
    assert episodes.stay_id.tolist() == stays[:1] and episodes.vasopressor_dose[0, 0] == 0
    assert report.counts["infections"] == {
        f"orders of {name} left out (extended_antibiotics)": 1
        for name in ("ertapenem", "daptomycin", "imipenem", "tigecycline", "colisti")
    }
    left = "phenylephrine item 229630 rows left out (extended_vasopressors)"
    assert report.counts["treatments"] == {"unknown_units": [], left: 1}
    episodes, report = build(tiny, extended_vasopressors=True, extended_antibiotics=True)
    assert episodes.stay_id.tolist() == stays
    assert episodes.vasopressor_dose[0, 0] == pytest.approx(0.05)
    assert report.counts["infections"] == {}


def aware(frame, columns, offset):
    """The frame with times that tell their zone."""
    return frame.assign(
        **{name: frame[name].dt.tz_localize("UTC").dt.tz_convert(offset) for name in columns}
    )


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_times_with_a_zone_are_utc_wherever_the_program_runs(tmp_path, monkeypatch, form):
    tiny = Tiny()
    stay = tiny.septic_stay(1)
    tiny.lab(stay, 5, 50813, 4.0, unit="mmol/L")
    data = tiny.write(tmp_path / "data", form)
    for (module, name), frame in tiny.frames().items():
        times = [column for column in frame if column.endswith("time")]
        if module == "hosp" and times:
            moved = aware(frame, times, "Asia/Tokyo")
            file = data / module / f"{name}.{form}"
            moved.to_parquet(file) if form == "parquet" else moved.to_csv(file, index=False)
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        build_cohort(data, tmp_path / "out", CohortOptions(split=(1, 0, 0), threads=1))
    finally:
        monkeypatch.undo()
        time.tzset()
    episodes = load_episodes(tmp_path / "out")
    assert seen(episodes, "lactate") == [False, False, True, False, False, False]


def test_two_lines_of_a_drug_and_other_known_troubles(build):
    tiny = Tiny()
    first = tiny.septic_stay(1, age=91, admitted=ADMITTED.replace(year=ADMITTED.year + 3))
    tiny.pressor(first, 0, 3.8, NOREPINEPHRINE, 0.42)
    tiny.pressor(first, 2.6, 12, NOREPINEPHRINE, 0.20)
    second = tiny.septic_stay(2)
    tiny.chart(second, 1, items.GCS_EYES, 2)
    tiny.chart(second, 1, items.GCS_VERBAL, 2)
    tiny.chart(second, 1, items.GCS_MOTOR, 4)
    tiny.chart(second, 30_000, RESP_RATE, 20)  # years after the stay
    tiny.pressor(second, 0, 4, PHENYLEPHRINE, 0.0)
    tiny.infuse(second, 0, 4, SALINE, amount=-500.0, unit="ml")
    episodes, report = build(tiny)
    assert episodes.static[0, 0] == 94
    assert episodes.vasopressor_dose[0, :4].tolist() == pytest.approx([0.42, 0.2, 0.2, 0])
    parts = [row(episodes, f"gcs_{name}", 1)[0] for name in ("eye", "verbal", "motor")]
    assert parts == [2, 2, 4]
    assert not np.asarray(episodes.fluid_dose).any() and not seen(episodes, "resp_rate", 1)[5]
    assert report.counts["treatments"] == {
        "unknown_units": [],
        "fluid rows without a positive amount": 1,
        "vasoactive rows with a rate of zero or less": 1,
    }
