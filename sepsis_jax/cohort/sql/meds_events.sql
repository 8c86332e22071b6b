-- MEDS events as the tables that are read of MIMIC-IV.
CREATE TEMP VIEW raw_diagnoses_icd AS
SELECT hospital_stay AS hadm_id, upper(replace(icd, '.', '')) AS icd_code, version AS icd_version
FROM meds_rows
WHERE concept = 'icd';

CREATE TEMP VIEW raw_prescriptions AS
SELECT
    subject_id,
    hospital_stay AS hadm_id,
    time AS starttime,
    'MAIN' AS drug_type,
    coalesce(drug, code) AS drug,
    coalesce(route, 'not told') AS route
FROM meds_rows
WHERE concept = 'antibiotics';

-- A time of midnight is a date alone; a specimen without a number is that of its moment and code.
CREATE TEMP VIEW raw_microbiologyevents AS
SELECT
    subject_id,
    CAST(coalesce(specimen, hash(subject_id, time, code) >> 1) AS BIGINT) AS micro_specimen_id,
    date_trunc('day', time) AS chartdate,
    CASE WHEN time > date_trunc('day', time) THEN time END AS charttime,
    code AS spec_type_desc,
    CAST(NULL AS BIGINT) AS org_itemid,
    CAST(NULL AS VARCHAR) AS org_name
FROM meds_rows
WHERE concept = 'cultures' AND time IS NOT NULL;

-- A specimen without a number is that of its moment.
CREATE TEMP VIEW raw_labevents AS
WITH results AS (
    SELECT
        subject_id,
        hospital_stay AS hadm_id,
        CAST(coalesce(specimen, hash(subject_id, time) >> 1) AS BIGINT) AS specimen_id,
        item AS itemid,
        time AS charttime,
        text AS value,
        value AS valuenum,
        unit AS valueuom,
        comments,
        code,
        arterial
    FROM meds_rows
    WHERE section = 'laboratory'
)

SELECT * EXCLUDE (arterial) FROM results
UNION ALL BY NAME
SELECT DISTINCT
    subject_id, hadm_id, specimen_id, charttime,
    CAST(getvariable('specimen_type') AS INTEGER) AS itemid, 'ART.' AS value
FROM results
WHERE arterial;

CREATE TEMP VIEW raw_chartevents AS
SELECT
    subject_id,
    stay AS stay_id,
    time AS charttime,
    CAST(NULL AS TIMESTAMP) AS storetime,
    item AS itemid,
    coalesce(text, CAST(value AS VARCHAR)) AS value,
    value AS valuenum,
    unit AS valueuom,
    code
FROM meds_rows
WHERE section = 'chart';

CREATE TEMP VIEW raw_outputevents AS
SELECT
    stay AS stay_id, time AS charttime, item AS itemid, value, unit AS valueuom, code
FROM meds_rows
WHERE section = 'output';

CREATE TABLE meds_infusions AS
WITH begun AS (SELECT * FROM meds_rows WHERE part = 'start'),

ended AS (SELECT * FROM meds_rows WHERE part = 'end'),

paired AS (
    -- By the number of the order, or each start with the next end.
    SELECT
        coalesce(b.subject_id, e.subject_id) AS subject_id,
        coalesce(b.stay, e.stay) AS stay,
        coalesce(b.item, e.item) AS item,
        coalesce(b.section, e.section) AS section,
        b.time AS starttime,
        e.time AS endtime,
        e.value AS amount,
        e.unit AS amountuom,
        b.value AS rate,
        b.unit AS rateuom,
        coalesce(e.status, b.status) AS status,
        coalesce(b.order_id, e.order_id) AS order_id
    FROM (FROM begun WHERE order_id IS NOT NULL) AS b
    FULL JOIN (FROM ended WHERE order_id IS NOT NULL) AS e
        ON b.subject_id = e.subject_id AND b.entry = e.entry AND b.order_id = e.order_id
    UNION ALL
    SELECT
        b.subject_id, b.stay, b.item, b.section, b.time, e.time, e.value, e.unit, b.value, b.unit,
        coalesce(e.status, b.status), NULL
    FROM (FROM begun WHERE order_id IS NULL) AS b
    ASOF LEFT JOIN (FROM ended WHERE order_id IS NULL) AS e
        ON b.subject_id = e.subject_id AND b.entry = e.entry AND b.time < e.time
    UNION ALL
    -- A rate is in force until the next one, and no longer than the stay.
    SELECT
        r.subject_id, r.stay, r.item, r.section, r.time,
        coalesce(
            lead(r.time) OVER (PARTITION BY r.stay, r.entry ORDER BY r.time), i.outtime
        ),
        NULL, NULL, r.value, r.unit, r.status, r.order_id
    FROM meds_rows AS r
    INNER JOIN meds_icu AS i ON r.stay = i.stay_id
    WHERE r.part = 'rate'
    UNION ALL
    SELECT
        subject_id, stay, item, section, time, time, value, unit, NULL, NULL, status, order_id
    FROM meds_rows
    WHERE part = 'bolus'
)

SELECT
    p.* EXCLUDE (amount, amountuom),
    CASE
        WHEN t.seconds IS NULL THEN p.amount
        ELSE p.rate * epoch(p.endtime - p.starttime) / t.seconds
    END AS amount,
    coalesce(t.amountuom, p.amountuom) AS amountuom,
    w.weight
FROM paired AS p
-- Of fluids that tell their rate alone, the amount is that of the time.
LEFT JOIN meds_rate_times AS t
    ON p.rateuom = t.rateuom AND p.amount IS NULL AND p.section = 'fluids'
LEFT JOIN (
    SELECT subject_id, time, max(value) AS weight
    FROM meds_rows
    WHERE concept = 'weight_at_infusion'
    GROUP BY subject_id, time
) AS w ON p.subject_id = w.subject_id AND p.starttime = w.time;

CREATE TEMP VIEW raw_inputevents AS
SELECT
    stay AS stay_id,
    starttime,
    endtime,
    item AS itemid,
    amount,
    amountuom,
    rate,
    rateuom,
    weight AS patientweight,
    status AS statusdescription,
    order_id AS orderid
FROM meds_infusions;
