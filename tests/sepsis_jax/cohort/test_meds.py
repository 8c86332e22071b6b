"""MEDS data sets give the episodes that the tables of MIMIC-IV give; bad maps are refused."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sepsis_jax.cohort import CohortOptions, build_cohort, items
from sepsis_jax.cohort.concepts import CONCEPTS, load_concept_map
from tests.sepsis_jax.cohort.meds_files import write_meds
from tests.sepsis_jax.cohort.tiny import (
    ADMITTED,
    CREATININE,
    LACTATE,
    NOREPINEPHRINE,
    PO2,
    SALINE,
    VASOPRESSIN,
    Tiny,
)
from tests.sepsis_jax.command_line import call, leftovers, refuse
from worldmodel.episode_files import load_episodes
from worldmodel.errors import InputError
from worldmodel.schema import INDEX, SPLITS

CONFIGS = Path(__file__).parents[3] / "configs"
MIMIC_MAP = CONFIGS / "meds_mimic_iv.yaml"
OPTIONS = CohortOptions(split=(1.0, 0.0, 0.0), threads=1, memory_limit="1GB")
DOSES = ("vasopressor_dose", "fluid_dose")


def assert_same(first, second, *, tolerance=None, but=()):
    """Equal arrays; with a tolerance those of numbers are close, and doses are close anyway."""
    for name in set(vars(first)) - set(but):
        one, other = np.asarray(getattr(first, name)), np.asarray(getattr(second, name))
        if tolerance and one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=1e-4, err_msg=name)
        elif name in DOSES:
            np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.fixture
def tiny():
    """Two patients with most of what a map can tell."""
    tiny = Tiny()
    for subject, about in {1: {}, 2: {"gender": "F", "age": 71, "died": True}}.items():
        stay = tiny.septic_stay(subject, **about)
        tiny.chart(stay, 2, 223761, 101.3)  # Fahrenheit, which nothing says
        tiny.chart(stay, 2.5, 223762, 37.5, unit="°C")
        for item in (220179, 220050):  # the same value at the same moment, from two devices
            tiny.chart(stay, 3, item, 100, unit="mmHg")
        tiny.chart(stay, 3, 220179, 130, unit="mmHg")
        for hour in (4, 7):
            tiny.chart(stay, hour, items.VENTILATOR_MODE, None, text="CMV")
        tiny.chart(stay, 9, items.OXYGEN_DEVICE, None, text="Nasal cannula")
        tiny.chart(stay, 9, 223834, 4, unit="L/min")
        tiny.chart(stay, 6, items.GCS_VERBAL, 1, text="No Response-ETT")
        tiny.chart(stay, 1, items.WEIGHT_ADMIT, 82.5, unit="kg")
        tiny.lab(stay, 3, PO2, 80.0, unit="mm Hg", arterial=True)
        tiny.lab(stay, 3.5, LACTATE, None, text="GREATER THAN 12", comments="GREATER THAN 12")
        tiny.lab(stay, 4, CREATININE, 1.1, unit="mg/dL")
        tiny.pressor(stay, 2, 6, NOREPINEPHRINE, 0.1 * subject)
        tiny.pressor(stay, 3, 5, VASOPRESSIN, 2.4, unit="units/hour")
        tiny.infuse(stay, 1, 7, SALINE, amount=600.0, unit="ml", rate=100, rate_unit="mL/hour")
        tiny.infuse(stay, 3, 3.1, SALINE, amount=250.0, unit="ml")
        tiny.output(stay, 3, 150.5)
        tiny.diagnosis(stay, "I509")
        tiny.diagnosis(stay, "0701", version=9)
    return tiny


@pytest.mark.parametrize("timing", ["known-before", "same-step"])
def test_a_hospital_written_as_meds_gives_the_same_episodes(tmp_path, tiny, timing):
    options = replace(OPTIONS, timing=timing, step_hours=2)
    mimic = tiny.write(tmp_path / "mimic")
    native = build_cohort(mimic, tmp_path / "native", options)
    for number in ("FLOAT", "DOUBLE"):
        data = write_meds(mimic, tmp_path / number, number=number)
        concepts = load_concept_map(MIMIC_MAP)
        report = build_cohort(data, tmp_path / "out", options, concepts=concepts)
        assert report.consort == native.consort and report.counts == native.counts
        assert_same(load_episodes(tmp_path / "native"), load_episodes(tmp_path / "out"))
    assert report.manifest["source"] == "meds"
    assert report.manifest["release"]["name"] == "MIMIC-IV"
    assert report.manifest["release"]["map"]["file"] == MIMIC_MAP.name
    assert {line["file"] for line in report.manifest["inputs"]} == {
        "train/0.parquet", "train/1.parquet",
    }  # fmt: skip
    episodes = load_episodes(tmp_path / "out")
    assert int(episodes.ventilated[0].sum()) and float(episodes.vasopressor_dose[0].max()) > 0.1


@pytest.mark.demo_data
def test_the_demo_written_as_meds_gives_the_same_episodes(demo, tmp_path):
    """Numbers of 64 bits: equal. Of 32 bits, as the standard has them: doses differ in the last
    digit of float32, since MIMIC-IV records rates and amounts with 17 digits."""
    native = build_cohort(demo, tmp_path / "native")
    first = load_episodes(tmp_path / "native")
    for number in ("DOUBLE", "FLOAT"):
        data = write_meds(demo, tmp_path / number, number=number)
        report = build_cohort(data, tmp_path / "out", concepts=load_concept_map(MIMIC_MAP))
        assert report.consort == native.consort and report.counts == native.counts
        assert report.stays == native.stays >= 36
        second = load_episodes(tmp_path / "out")
        assert_same(first, second)
        if number == "DOUBLE":
            for name in DOSES:
                np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    everyone = CohortOptions(stays="all", require_sepsis=False, step_hours=1, seed=3)
    build_cohort(demo, tmp_path / "native", everyone)
    build_cohort(data, tmp_path / "out", everyone, concepts=load_concept_map(MIMIC_MAP))
    assert_same(load_episodes(tmp_path / "native"), load_episodes(tmp_path / "out"))


# Another hospital, with its own codes and units and no numbers of stays


OTHER_MAP = {
    "columns": {"unit": "unit", "route": "route?"},
    "stays": {"icu_admission": "IN", "icu_discharge": "OUT"},
    "patients": {"age": "AGE", "male": "SEX M", "female": "SEX F", "death": "MEDS_DEATH"},
    "infection": {
        "antibiotics": {"code": "ATC/J01XA01", "drug": "vancomycin"}, "cultures": "CULTURE//*",
    },
    "diagnoses": {"icd": {"code": "ICD10/<icd>", "version": 10}},
    "chart": {
        "heart_rate": "LOINC/8867-4",
        "meanbp": {"code": "MAP", "unit": "kPa"},
        "temp_c": {"code": "TEMP <unit>"},
        "weight": {"code": "WEIGHT", "unit": "lbs"},
        "ventilation": [
            {"code": "AIRWAY", "texts": {"tube": "InvasiveVent", "room air": "None"}},
            {"code": "NIV", "status": "NonInvasiveVent"},
        ],
    },
    "laboratory": {
        "creatinine": {"code": "CREA", "unit": "umol/L"},
        "pao2": {"code": "PAO2", "unit": "kPa", "arterial": True},
    },
    "output": {"urine": "URINE"},
    "vasoactives": {
        "norepinephrine": {"rate": "NORAD", "unit": "mcg/min"},
        "vasopressin": {"start": "AVP ON", "end": "AVP OFF", "rate_unit": "units/min"},
    },
    "fluids": {
        "sodium_chloride_0.9": [
            {"start": "SALINE ON", "end": "SALINE OFF", "rate_unit": "mL/h"},
            {"bolus": "SALINE BOLUS", "unit": "mL"},
        ],
    },
}  # fmt: skip


class Events:
    """Events of MEDS with times in hours from ICU admission."""

    def __init__(self, subject: int) -> None:
        self.subject, self.rows = subject, []

    def add(self, hour, code, value=None, text=None, unit=None):
        time = None if hour is None else ADMITTED + pd.Timedelta(hours=hour)
        self.rows.append(
            {"subject_id": self.subject, "time": time, "code": code, "numeric_value": value,
             "text_value": text, "unit": unit}
        )  # fmt: skip


def write_events(folder, *patients, splits=None, concepts=OTHER_MAP):
    """A MEDS folder and a map beside it."""
    for part in ("data", "metadata"):
        (folder / part).mkdir(parents=True)
    for shard, events in enumerate(patients):
        frame = pd.DataFrame(events.rows).astype(
            {"numeric_value": "float32", "text_value": "string", "unit": "string",
             "time": "datetime64[us]"}
        )  # fmt: skip
        frame.to_parquet(folder / "data" / f"{shard}.parquet")
    codes = pd.DataFrame({"code": ["pulse"], "parent_codes": [["LOINC/8867-4"]]})
    codes.to_parquet(folder / "metadata" / "codes.parquet")
    if splits:
        frame = pd.DataFrame({"subject_id": splits.keys(), "split": splits.values()})
        frame.to_parquet(folder / "metadata" / "subject_splits.parquet")
    file = folder / "map.yaml"
    file.write_text(yaml.safe_dump(concepts))
    return load_concept_map(file)


def other_patient(subject, *, sex="M", age=60, died=False):
    events = Events(subject)
    events.add(None, f"SEX {sex}")
    events.add(0, "AGE", age)
    events.add(0, "IN")
    events.add(24, "OUT")
    if died:
        events.add(24, "MEDS_DEATH")
    for hour in range(24):
        events.add(hour, "pulse", 90)
        events.add(hour, "MAP", 65 / 7.50062)
    events.add(2, "TEMP degF", 101.3)
    events.add(1, "WEIGHT", 80 / 0.45359237)
    events.add(1, "CREA", 2.5 * 10000 / 113.12)
    events.add(3, "PAO2", 80 / 7.50062)
    events.add(2, "ATC/J01XA01")
    events.add(1, "CULTURE//blood")
    events.add(24, "ICD10/I50.9")
    events.add(4, "AIRWAY", text="tube")
    events.add(7, "AIRWAY", text="not told")
    events.add(12, "AIRWAY", text="room air")
    events.add(20, "NIV")
    events.add(3, "URINE", 0.1505, unit="L")
    events.add(2, "NORAD", 8)
    events.add(4, "NORAD", 16)
    events.add(6, "NORAD", 0)
    events.add(3, "AVP ON", 0.04)
    events.add(5, "AVP OFF")
    events.add(8, "AVP ON", 0.02)
    events.add(9, "AVP OFF")
    events.add(1, "SALINE ON", 100)
    events.add(7, "SALINE OFF")
    events.add(3, "SALINE BOLUS", 250)
    return events


def same_patient(tiny, subject, **about):
    """What `other_patient` tells, in the tables of MIMIC-IV."""
    stay = tiny.septic_stay(subject, **about)
    tiny.chart(stay, 2, 223761, 101.3)
    tiny.lab(stay, 3, PO2, 80.0, unit="mm Hg", arterial=True)
    tiny.chart(stay, 4, items.VENTILATOR_MODE, None, text="CMV")
    tiny.chart(stay, 12, items.OXYGEN_DEVICE, None, text="None")
    tiny.chart(stay, 12, 223834, 0)
    tiny.chart(stay, 20, items.HAMILTON_MODE, None, text="NIV")
    tiny.pressor(stay, 2, 4, NOREPINEPHRINE, 0.1)
    tiny.pressor(stay, 4, 6, NOREPINEPHRINE, 0.2)
    tiny.pressor(stay, 3, 5, VASOPRESSIN, 2.4, unit="units/hour")
    tiny.pressor(stay, 8, 9, VASOPRESSIN, 1.2, unit="units/hour")
    tiny.infuse(stay, 1, 7, SALINE, amount=600.0, unit="ml", rate=100, rate_unit="mL/hour")
    tiny.infuse(stay, 3, 3.1, SALINE, amount=250.0, unit="ml")
    tiny.output(stay, 3, 150.5)
    tiny.diagnosis(stay, "I509")


def test_another_hospital_with_its_own_codes_and_units_gives_the_same_episodes(tmp_path):
    tiny = Tiny()
    same_patient(tiny, 1)
    same_patient(tiny, 2, gender="F", age=71, died=True)
    build_cohort(tiny.write(tmp_path / "mimic"), tmp_path / "native", OPTIONS)
    patients = other_patient(1), other_patient(2, sex="F", age=71, died=True)
    concepts = write_events(tmp_path / "meds", *patients)
    report = build_cohort(tmp_path / "meds", tmp_path / "out", OPTIONS, concepts=concepts)
    first, second = load_episodes(tmp_path / "native"), load_episodes(tmp_path / "out")
    assert_same(first, second, tolerance=2e-5, but=("stay_id",))
    assert second.stay_id.tolist() == [1, 2]  # numbered, since the data do not
    assert second.died_90d.tolist() == [False, True]
    assert float(second.dynamic[0, 1, INDEX["temp_c"]]) == pytest.approx(38.5, abs=1e-4)
    assert any("lactate" in note for note in report.notes)
    assert "The data have no column route (route)." in report.notes


def test_two_codes_of_one_concept_both_count(tmp_path, feature):
    patient = other_patient(1)
    for code, value in (("pulse", 60), ("HR", 60), ("HR", 60)):  # the last is a repeated row
        patient.add(0.5, code, value)
    names = {"heart_rate": ["LOINC/8867-4", "HR"]}
    changed = OTHER_MAP | {"chart": OTHER_MAP["chart"] | names}
    concepts = write_events(tmp_path / "meds", patient, concepts=changed)
    report = build_cohort(tmp_path / "meds", tmp_path / "out", OPTIONS, concepts=concepts)
    # Four hours of 90 and twice 60.
    assert feature(load_episodes(tmp_path / "out"), "heart_rate")[1] == 80
    assert report.counts["charts"]["repeated rows"] == 1


def test_hospital_stays_are_found_by_time(tmp_path):
    """The ICU stay that began before the patient was registered; diagnoses coded afterwards."""
    patient = other_patient(1)
    patient.rows = [row for row in patient.rows if row["code"] != "ICD10/I50.9"]
    for begin, end in ((-900, -800), (0.2, 70)):
        patient.add(begin, "REGISTERED")
        patient.add(end, "LEFT")
    patient.add(-10, "MAP", 9.0)
    patient.add(-790, "ICD10/N18")  # of the earlier stay: Charlson index 2
    patient.add(71, "ICD10/I50.9")
    patient.add(900, "ICD10/C78")
    names = {"hospital_admission": "REGISTERED", "hospital_discharge": "LEFT"}
    concepts = write_events(tmp_path / "meds", patient, concepts=changed("stays", **names))
    report = build_cohort(tmp_path / "meds", tmp_path / "out", OPTIONS, concepts=concepts)
    # Age 60 gives two points of its own, heart failure one.
    assert load_episodes(tmp_path / "out").static.tolist() == [[60.0, 1.0, 3.0]]
    assert report.counts["stays"] == {
        "events of chart in no stay": 1, "events of diagnoses in no hospital stay": 1,
    }  # fmt: skip


def test_a_number_that_is_not_finite_is_none(tmp_path):
    patient = other_patient(1)
    concepts = write_events(tmp_path / "meds", patient)
    build_cohort(tmp_path / "meds", tmp_path / "first", OPTIONS, concepts=concepts)
    times = pa.array([ADMITTED + pd.Timedelta(hours=5)] * 2, pa.timestamp("us"))
    numbers = pa.array(np.array([np.nan, np.inf], np.float32))
    names = ("subject_id", "time", "code", "numeric_value")
    table = pa.table([pa.array([1, 1]), times, pa.array(["URINE", "SALINE BOLUS"]), numbers], names)
    pq.write_table(table, tmp_path / "meds" / "data" / "more.parquet")
    build_cohort(tmp_path / "meds", tmp_path / "second", OPTIONS, concepts=concepts)
    assert_same(load_episodes(tmp_path / "first"), load_episodes(tmp_path / "second"))


SPLITS_OF_MEDS = {"train": "train", "tuning": "validation", "held_out": "test"}


def test_the_splits_of_the_data_can_be_kept(tmp_path):
    concepts = write_events(
        tmp_path / "meds", other_patient(1), other_patient(2), other_patient(3),
        splits={1: "held_out", 2: "train", 3: "tuning"},
        concepts=OTHER_MAP | {"splits": SPLITS_OF_MEDS},
    )  # fmt: skip
    build_cohort(tmp_path / "meds", tmp_path / "out", OPTIONS, concepts=concepts)
    episodes = load_episodes(tmp_path / "out")
    assert [SPLITS[i] for i in episodes.split.tolist()] == ["test", "train", "validation"]


# What is refused


BAD_MAPS = {
    "no such file": (None, "no such file; begin with configs/meds_template.yaml"),
    "not YAML": ("chart: [", "not readable YAML"),
    "empty": ("", "has no codes"),
    "section": ("charts: {}", "section 'charts' is unknown; expected one of columns, stays"),
    "concept": ("chart: {hart_rate: HR}", "chart: concept 'hart_rate' is unknown.*heart_rate"),
    "unit": ("chart: {temp_c: {code: T, unit: furlong}}", "chart.temp_c: unit: 'furlong'.*k"),
    "rate unit": (
        "vasoactives: {norepinephrine: {rate: N, unit: mL/hour}}",
        "norepinephrine: unit: 'mL/hour' is unknown",
    ),
    "key": ("chart: {spo2: {code: S, units: '%'}}", "spo2: key 'units' is unknown.*unit"),
    "no code": ("chart: {spo2: {unit: '%'}}", "chart.spo2: has no code"),
    "number": ("chart: {spo2: 220277}", "chart.spo2: got 220277, expected a code as text"),
    "placeholder": ("chart: {spo2: S//<units>}", "'S//<units>' names <units>.*<unit>"),
    "half an infusion": ("fluids: {solution: {start: A}}", "got start; give start and end"),
    "bolus": ("vasoactives: {dopamine: D}", "dopamine: a bolus has no rate; give start and end"),
    "version": ("diagnoses: {icd: D//<icd>}", "version: got None, expected 9 or 10"),
    "status": (
        "chart: {ventilation: {code: V, status: tube}}", "status 'tube'.*InvasiveVent",
    ),
    "no status": ("chart: {ventilation: V}", "give status, or texts"),
    "column": ("columns: {stays: x}", "column 'stays' is unknown; expected one of stay, "),
    "split": ("splits: {held_out: testing}", "splits.held_out: got 'testing', expected one of tr"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MAPS)
def test_bad_maps_are_refused_in_one_line(tmp_path, case):
    text, message = BAD_MAPS[case]
    file = tmp_path / "map.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_concept_map(file)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(file))


def changed(section, **concepts):
    return OTHER_MAP | {section: OTHER_MAP[section] | concepts}


BAD_DATA = {
    "no folder": (
        lambda folder: (folder / "data").rename(folder / "events"), OTHER_MAP,
        r"meds/data: no \.parquet file",
    ),
    "damaged": (
        lambda folder: (folder / "data" / "0.parquet").write_bytes(b"PAR1 and nothing"), OTHER_MAP,
        r"meds/data: unreadable",
    ),
    "missing column": (
        lambda folder: None, changed("columns", stay="visit"),
        r"meds/data: column visit missing, which .*map\.yaml names for stay \(it has subject_id",
    ),
    "needed concept": (
        lambda folder: None, changed("stays", icu_admission="ADMISSION"),
        r"map\.yaml: stays\.icu_admission: no event in .*data has such a code .*ADMISSION.*mend",
    ),
    "unit of the data": (
        lambda folder: None, changed("chart", spo2="URINE"),
        r"meds/data: column unit has unit 'L' for spo2 code URINE in 1 rows.*unknown_units",
    ),
    "split": (
        lambda folder: None, OTHER_MAP | {"splits": {"train": "train"}},
        r"subject_splits\.parquet: no such file; leave splits out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_refused_in_one_line(tmp_path, case):
    spoil, names, message = BAD_DATA[case]
    concepts = write_events(tmp_path / "meds", other_patient(1), concepts=names)
    spoil(tmp_path / "meds")
    with pytest.raises(InputError, match=message) as caught:
        build_cohort(tmp_path / "meds", tmp_path / "out" / "cohort", OPTIONS, concepts=concepts)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").glob("*")) == []


def test_stays_that_are_no_numbers_are_refused(tmp_path):
    concepts = write_events(
        tmp_path / "meds", other_patient(1), concepts=changed("columns", stay="text_value")
    )
    with pytest.raises(
        InputError, match=r"meds/data: a value does not fit.*'tube'.*out of the map"
    ):
        build_cohort(tmp_path / "meds", tmp_path / "out", OPTIONS, concepts=concepts)


# The files in configs/ and the command


def test_the_template_names_every_concept():
    concepts = load_concept_map(CONFIGS / "meds_template.yaml")
    told = {(code.section, code.concept) for code in concepts.codes}
    assert told == {(section, name) for section, names in CONCEPTS.items() for name in names}
    assert set(concepts.splits.values()) == set(SPLITS)


def test_the_map_of_mimic_iv_names_its_items():
    concepts = load_concept_map(MIMIC_MAP)
    patterns = {code.pattern for code in concepts.codes}
    needed = {f"LAB//{item}//<unit>" for item in items.CHART_ITEMS}
    needed |= {f"LAB//RESULT//{item}//<unit>" for item in items.LAB_ITEMS}
    needed |= {f"SUBJECT_FLUID_OUTPUT//{item}//<unit>" for item in items.URINE_ITEMS}
    infused = [*items.FLUIDS]
    for drugs in (items.VASOACTIVES, items.EXTENDED_VASOACTIVES):
        infused += [item for numbers, *_ in drugs.values() for item in numbers]
    needed |= {f"INFUSION_{part}//{item}" for item in infused for part in ("START", "END")}
    assert needed <= patterns
    tonicity = {
        code.pattern: items.FLUIDS[code.item] for code in concepts.codes if code.section == "fluids"
    }
    assert tonicity == {
        f"INFUSION_{part}//{item}": share
        for item, share in items.FLUIDS.items() for part in ("START", "END")
    }  # fmt: skip


def test_the_command(capsys, tmp_path):
    write_events(tmp_path / "meds", other_patient(1), other_patient(2))
    arguments = ("cohort", "meds", "--data", tmp_path / "meds", "--map")
    split = ("--option", "split=[1.0, 0.0, 0.0]")
    out = tmp_path / "out"
    result = call(capsys, *arguments, tmp_path / "meds" / "map.yaml", "--out", out, *split)
    assert result.status == 0, result.err
    assert "2 stays" in result.out
    assert "No event has a code of patients.death, patients.female." in result.out
    assert json.loads((out / "manifest.json").read_text())["source"] == "meds"
    result = call(capsys, *arguments, tmp_path / "none.yaml", "--out", tmp_path / "other")
    refuse(result, "none.yaml: no such file")
    assert leftovers(tmp_path) == ["meds", "out"]


def test_midnight_is_a_date_alone(tmp_path):
    """A culture and a death that are dated to the day count as MIMIC-IV's without a time."""
    patient = other_patient(1)
    patient.rows = [row for row in patient.rows if row["code"] != "CULTURE//blood"]
    day = (datetime(ADMITTED.year, ADMITTED.month, ADMITTED.day) - ADMITTED) / pd.Timedelta(hours=1)
    patient.add(day, "CULTURE//blood")
    patient.add(day + 24, "MEDS_DEATH")
    concepts = write_events(tmp_path / "meds", patient)
    build_cohort(tmp_path / "meds", tmp_path / "out", OPTIONS, concepts=concepts)
    episodes = load_episodes(tmp_path / "out")
    # Until 08:00 on the day of death, when the stay ends, all rows are kept.
    assert episodes.died_90d.tolist() == episodes.died_in_hospital.tolist() == [True]
    assert episodes.length.tolist() == [6]
