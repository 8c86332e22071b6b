"""Writes tables of MIMIC-IV as a MEDS data set, with the codes of its public conversion.

Beyond that conversion it writes cultures, and the columns `specimen_id` and `comments`; laboratory
results have the time of the sample.
"""

from __future__ import annotations

import json
from pathlib import Path

import duckdb

from sepsis_jax.cohort.source import attach_source

# SELECTs of events by table; a column that one lacks is empty.
EVENTS = {
    "patients": """
        SELECT subject_id, NULL AS time, 'GENDER//' || gender AS code FROM raw_patients
        UNION ALL BY NAME
        SELECT subject_id, make_timestamp(anchor_year - anchor_age, 1, 1, 0, 0, 0) AS time,
            'MEDS_BIRTH' AS code FROM raw_patients
        UNION ALL BY NAME
        SELECT subject_id, coalesce(min(deathtime), min(dod)) AS time, 'MEDS_DEATH' AS code
        FROM raw_patients LEFT JOIN raw_admissions USING (subject_id)
        GROUP BY subject_id HAVING time IS NOT NULL""",
    "admissions": """
        SELECT subject_id, admittime AS time, 'HOSPITAL_ADMISSION//URGENT//UNK' AS code, hadm_id
        FROM raw_admissions
        UNION ALL BY NAME
        SELECT subject_id, dischtime AS time, 'HOSPITAL_DISCHARGE//'
            || CASE WHEN hospital_expire_flag = 1 THEN 'DIED' ELSE 'HOME' END AS code, hadm_id
        FROM raw_admissions""",
    "diagnoses_icd": """
        SELECT subject_id, dischtime AS time, 'DIAGNOSIS//ICD//' || icd_version || '//' || icd_code
            AS code, hadm_id
        FROM raw_diagnoses_icd INNER JOIN raw_admissions USING (hadm_id)""",
    "prescriptions": """
        SELECT subject_id, starttime AS time, 'MEDICATION//START//' || drug AS code, hadm_id, route
        FROM raw_prescriptions WHERE drug_type <> 'BASE'""",
    "microbiologyevents": """
        SELECT subject_id, coalesce(charttime, chartdate) AS time,
            'MICROBIOLOGY//' || spec_type_desc AS code, hadm_id, micro_specimen_id AS specimen_id
        FROM raw_microbiologyevents""",
    "labevents": """
        SELECT subject_id, charttime AS time, 'LAB//RESULT//' || itemid || '//'
            || coalesce(valueuom, 'UNK') AS code, valuenum AS numeric_value, value AS text_value,
            hadm_id, specimen_id, comments
        FROM raw_labevents""",
    "icustays": """
        SELECT subject_id, intime AS time, 'ICU_ADMISSION//MICU' AS code, hadm_id,
            stay_id AS icustay_id
        FROM raw_icustays
        UNION ALL BY NAME
        SELECT subject_id, outtime AS time, 'ICU_DISCHARGE//MICU' AS code, hadm_id,
            stay_id AS icustay_id
        FROM raw_icustays""",
    "chartevents": """
        SELECT subject_id, charttime AS time, 'LAB//' || itemid || '//' || coalesce(valueuom, 'UNK')
            AS code, valuenum AS numeric_value, value AS text_value, stay_id AS icustay_id
        FROM raw_chartevents""",
    "inputevents": """
        SELECT subject_id, starttime AS time, 'INFUSION_START//' || itemid AS code,
            rate AS numeric_value, rateuom AS unit, stay_id AS icustay_id, orderid AS order_id
        FROM ordered
        UNION ALL BY NAME
        SELECT subject_id, endtime AS time, 'INFUSION_END//' || itemid AS code,
            amount AS numeric_value, amountuom AS unit, stay_id AS icustay_id,
            orderid AS order_id, statusdescription
        FROM ordered
        UNION ALL BY NAME
        SELECT DISTINCT subject_id, starttime AS time, 'SUBJECT_WEIGHT_AT_INFUSION//KG' AS code,
            patientweight AS numeric_value
        FROM ordered WHERE patientweight IS NOT NULL""",
    "outputevents": """
        SELECT subject_id, charttime AS time, 'SUBJECT_FLUID_OUTPUT//' || itemid || '//'
            || coalesce(valueuom, 'UNK') AS code, value AS numeric_value, stay_id AS icustay_id
        FROM raw_outputevents INNER JOIN raw_icustays USING (stay_id)""",
}
TYPES = {
    "subject_id": "BIGINT", "time": "TIMESTAMP", "code": "VARCHAR", "numeric_value": "FLOAT",
    "text_value": "VARCHAR", "hadm_id": "BIGINT", "icustay_id": "BIGINT", "order_id": "BIGINT",
    "unit": "VARCHAR", "statusdescription": "VARCHAR", "route": "VARCHAR", "specimen_id": "BIGINT",
    "comments": "VARCHAR",
}  # fmt: skip


def write_meds(mimic: Path, path: Path, *, number: str = "FLOAT", shards: int = 2) -> Path:
    """Writes MIMIC-IV as MEDS, patients apart in `shards` files.

    Args:
      mimic: folder with hosp/ and icu/.
      path: folder to write.
      number: type of `numeric_value`, which the standard gives 32 bits.
      shards: number of files.
    """
    with duckdb.connect() as connection:
        attach_source(connection, mimic)
        connection.execute(
            "CREATE VIEW ordered AS SELECT i.*, s.subject_id FROM (SELECT * REPLACE (coalesce("
            "orderid, row_number() OVER ()) AS orderid) FROM raw_inputevents) AS i "
            "INNER JOIN raw_icustays AS s USING (stay_id)"
        )
        types = TYPES | {"numeric_value": number}
        columns = ", ".join(f"{name} {kind}" for name, kind in types.items())
        connection.execute(f"CREATE TABLE events ({columns})")
        for select in EVENTS.values():
            connection.execute(f"INSERT INTO events BY NAME ({select})")
        (path / "data" / "train").mkdir(parents=True)
        (path / "metadata").mkdir()
        for shard in range(shards):
            connection.execute(
                f"COPY (FROM events WHERE subject_id % {shards} = {shard} "
                "ORDER BY subject_id, time NULLS FIRST) "
                f"TO '{path / 'data' / 'train' / f'{shard}.parquet'}' (FORMAT parquet)"
            )
        connection.execute(
            "COPY (SELECT DISTINCT code, NULL::VARCHAR AS description, "
            f"[]::VARCHAR[] AS parent_codes FROM events) "
            f"TO '{path / 'metadata' / 'codes.parquet'}' (FORMAT parquet)"
        )
    about = {"dataset_name": "MIMIC-IV", "dataset_version": "3.1", "meds_version": "0.4.1"}
    (path / "metadata" / "dataset.json").write_text(json.dumps(about))
    return path
