"""Every layout gives the same episodes; bad input gives one clear error and no output."""

import gzip

import jax
import numpy as np
import pytest

from sepsis_jax.cohort import CohortOptions, build_cohort
from tests.sepsis_jax.cohort.tiny import NOREPINEPHRINE, SALINE, Tiny
from worldmodel.errors import InputError


@pytest.fixture
def tiny():
    tiny = Tiny()
    for subject in (1, 2, 3):
        stay = tiny.septic_stay(subject, age=50 + subject)
        tiny.pressor(stay, subject, 6, NOREPINEPHRINE, 0.05 * subject)
        tiny.infuse(stay, 1, 7, SALINE, amount=600.0, unit="ml", rate=100, rate_unit="mL/hour")
        tiny.output(stay, 3, 150.5)
        tiny.antibiotic(stay, 3, drug='Vancomycin, "IV"\nbag')
        tiny.diagnosis(stay, "0701", version=9)  # a number with a leading zero is not a number
    return tiny


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_every_layout_gives_the_same_episodes(build, tiny):
    expected, _ = build(tiny, form="csv.gz")
    for form in ("csv", "parquet", "parts", "duckdb"):
        assert_equal(build(tiny, form=form)[0], expected)


def test_the_order_of_rows_does_not_matter(build, tiny):
    split = {"split": (0.4, 0.3, 0.3), "seed": 5}
    assert_equal(build(tiny.shuffled(1), **split)[0], build(tiny, **split)[0])


def spoil_bytes(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def spoil_text(file, old, new):
    text = gzip.decompress(file.read_bytes()).decode()
    assert old in text
    file.write_bytes(gzip.compress(text.replace(old, new, 1).encode()))


BAD = {
    "no table": (
        lambda data: (data / "icu/outputevents.csv.gz").unlink(),
        r"outputevents.*no outputevents\.csv\.gz.*PhysioNet",
    ),
    "no folder": (
        lambda data: (data / "icu").rename(data / "intensive"),
        r"has no folder icu/",
    ),
    "column renamed": (
        lambda data: spoil_text(data / "hosp/labevents.csv.gz", "valuenum", "value_num"),
        r"labevents\.csv\.gz: column valuenum missing \(it has subject_id",
    ),
    "truncated": (
        lambda data: spoil_bytes(data / "icu/chartevents.csv.gz", 0.7),
        r"chartevents\.csv\.gz: unreadable or truncated.*download it again",
    ),
    "not gzip": (
        lambda data: (data / "hosp/patients.csv.gz").write_text("subject_id"),
        r"patients\.csv\.gz: unreadable \(Not a gzipped file",
    ),
    "empty": (
        lambda data: (data / "hosp/patients.csv.gz").write_bytes(b""),
        r"patients\.csv\.gz: empty",
    ),
    "not a number": (
        lambda data: spoil_text(data / "icu/outputevents.csv.gz", "150.5", "much"),
        r'outputevents\.csv\.gz: a value does not fit.*Line: 2.*"value".*much.*download it again',
    ),
    "short line": (
        lambda data: spoil_text(data / "icu/icustays.csv.gz", ",2150-03-02 08:00:00", ""),
        r"icustays\.csv\.gz: a value does not fit.*Expected Number of Columns: 5 Found: 4",
    ),
    "strangers": (
        lambda data: spoil_bytes(data / "hosp/admissions.csv.gz", 0) or
        (data / "hosp/admissions.csv.gz").write_bytes(gzip.compress(
            b"subject_id,hadm_id,admittime,dischtime,deathtime,hospital_expire_flag\n")),
        r"icustays\.csv\.gz: no stay matches patients and admissions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_and_leaves_nothing(tmp_path, tiny, case):
    spoil, message = BAD[case]
    data = tiny.write(tmp_path / "data", "csv.gz")
    spoil(data)
    with pytest.raises(InputError, match=message) as caught:
        build_cohort(data, tmp_path / "out" / "cohort", CohortOptions(memory_limit="1GB"))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").glob("*")) == list((tmp_path / "out").glob(".*")) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("no database"), "not a readable DuckDB file"),
        (lambda path: Tiny().write(path, "duckdb") and spoil_bytes(path, 0.3), "not a readable"),
        (lambda path: None, "no such file or folder.*PhysioNet"),
    ],
)
def test_bad_duckdb_file(tmp_path, make, message):
    make(tmp_path / "mimic.duckdb")
    with pytest.raises(InputError, match=message):
        build_cohort(tmp_path / "mimic.duckdb", tmp_path / "out")


def test_duckdb_file_without_a_table(tmp_path, tiny):
    import duckdb

    path = tiny.write(tmp_path / "mimic.duckdb", "duckdb")
    with duckdb.connect(str(path)) as connection:
        connection.execute("DROP TABLE mimiciv_icu.inputevents")
    with pytest.raises(InputError, match="no table inputevents in schema mimiciv_icu, icu or main"):
        build_cohort(path, tmp_path / "out")


def test_damaged_parquet(tmp_path, tiny):
    data = tiny.write(tmp_path / "data", "parquet")
    spoil_bytes(data / "hosp" / "labevents.parquet", 0.5)
    with pytest.raises(InputError, match=r"labevents\.parquet: unreadable"):
        build_cohort(data, tmp_path / "out")


def test_text_in_a_parquet_number(tmp_path, tiny):
    data = tiny.write(tmp_path / "data", "parquet")
    frames = tiny.frames()
    frame = frames["icu", "outputevents"].astype({"value": object})
    frame.loc[0, "value"] = "much"
    frame.astype({"value": "string"}).to_parquet(data / "icu" / "outputevents.parquet")
    with pytest.raises(InputError, match=r"outputevents\.parquet: a value does not fit.*'much'"):
        build_cohort(data, tmp_path / "out")
