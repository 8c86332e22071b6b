-- ICU and hospital stays of MEDS events: by their numbers where the data have them, else each
-- beginning with the next end of the patient.
CREATE TABLE meds_icu AS
WITH begun AS (SELECT * FROM meds_moves WHERE concept = 'icu_admission' AND time IS NOT NULL),

ended AS (SELECT * FROM meds_moves WHERE concept = 'icu_discharge' AND time IS NOT NULL)

SELECT b.subject_id, b.stay AS stay_id, b.hospital_stay, b.time AS intime, e.time AS outtime
FROM begun AS b
LEFT JOIN ended AS e ON b.subject_id = e.subject_id AND b.stay = e.stay
WHERE getvariable('told_stay')
UNION ALL
SELECT
    subject_id,
    row_number() OVER (ORDER BY subject_id, intime) AS stay_id,
    hospital_stay,
    intime,
    outtime
FROM (
    -- Of admissions that end with the same discharge the first is the stay.
    SELECT b.subject_id, min(b.hospital_stay) AS hospital_stay, min(b.time) AS intime,
        e.time AS outtime
    FROM begun AS b
    ASOF JOIN ended AS e ON b.subject_id = e.subject_id AND b.time <= e.time
    GROUP BY b.subject_id, e.time
)
WHERE NOT getvariable('told_stay');

-- Without any admission to hospital the ICU stay is all that is known of the hospital stay.
CREATE TABLE meds_hospital AS
WITH begun AS (SELECT * FROM meds_moves WHERE concept = 'hospital_admission' AND time IS NOT NULL),

ended AS (SELECT * FROM meds_moves WHERE concept = 'hospital_discharge' AND time IS NOT NULL)

SELECT b.subject_id, b.hospital_stay AS hadm_id, b.time AS admittime, e.time AS dischtime
FROM begun AS b
LEFT JOIN ended AS e ON b.subject_id = e.subject_id AND b.hospital_stay = e.hospital_stay
WHERE getvariable('told_hospital_stay')
UNION ALL
SELECT
    subject_id, row_number() OVER (ORDER BY subject_id, admittime) AS hadm_id, admittime, dischtime
FROM (
    SELECT b.subject_id, min(b.time) AS admittime, e.time AS dischtime
    FROM begun AS b
    ASOF JOIN ended AS e ON b.subject_id = e.subject_id AND b.time <= e.time
    GROUP BY b.subject_id, e.time
)
WHERE NOT getvariable('told_hospital_stay')
UNION ALL
SELECT subject_id, stay_id, intime, outtime
FROM meds_icu
WHERE NOT EXISTS (FROM begun);

-- Without a number an ICU stay is part of the hospital stay that it shares most time with.
CREATE TEMP VIEW raw_icustays AS
SELECT subject_id, hospital_stay AS hadm_id, stay_id, intime, outtime
FROM meds_icu
WHERE getvariable('told_hospital_stay')
UNION ALL
SELECT i.subject_id, h.hadm_id, i.stay_id, i.intime, i.outtime
FROM meds_icu AS i
LEFT JOIN meds_hospital AS h
    ON i.subject_id = h.subject_id AND i.intime < h.dischtime AND i.outtime > h.admittime
WHERE NOT getvariable('told_hospital_stay')
QUALIFY
    row_number() OVER (
        PARTITION BY i.stay_id
        ORDER BY least(i.outtime, h.dischtime) - greatest(i.intime, h.admittime) DESC NULLS LAST,
            h.hadm_id
    ) = 1;

CREATE TABLE meds_deaths AS
SELECT subject_id, min(time) AS time FROM meds_moves
WHERE concept = 'death' AND time IS NOT NULL
GROUP BY subject_id;

-- A death within a hospital stay, or of one whose discharge tells of it.
CREATE TEMP VIEW raw_admissions AS
WITH told AS (
    SELECT DISTINCT h.hadm_id
    FROM meds_hospital AS h
    INNER JOIN meds_moves AS m
        ON h.subject_id = m.subject_id AND h.dischtime = m.time AND m.concept = 'died_in_hospital'
)

SELECT
    h.subject_id,
    h.hadm_id,
    h.admittime,
    h.dischtime,
    CASE
        -- A time of midnight is a date alone.
        WHEN d.time > date_trunc('day', d.time) AND d.time >= h.admittime
            AND (t.hadm_id IS NOT NULL OR d.time <= h.dischtime) THEN d.time
    END AS deathtime,
    CAST(t.hadm_id IS NOT NULL OR d.time BETWEEN h.admittime AND h.dischtime AS INTEGER)
        AS hospital_expire_flag
FROM meds_hospital AS h
LEFT JOIN meds_deaths AS d ON h.subject_id = d.subject_id
LEFT JOIN told AS t ON h.hadm_id = t.hadm_id;

-- Age is counted in calendar years from the year of birth, or from an age at a moment.
CREATE TEMP VIEW raw_patients AS
WITH sexes AS (
    SELECT DISTINCT subject_id, CASE concept WHEN 'male' THEN 'M' ELSE 'F' END AS gender
    FROM meds_moves WHERE concept IN ('male', 'female')
),

births AS (
    SELECT subject_id, min(time) AS time FROM meds_moves WHERE concept = 'birth' GROUP BY subject_id
),

ages AS (
    SELECT m.subject_id, arg_min(m.value, m.time) AS value, min(m.time) AS time
    FROM meds_moves AS m
    WHERE m.concept = 'age' AND m.value IS NOT NULL AND m.time IS NOT NULL
    GROUP BY m.subject_id
)

SELECT
    i.subject_id,
    s.gender,
    CAST(CASE WHEN b.time IS NOT NULL THEN 0 ELSE floor(a.value) END AS INTEGER) AS anchor_age,
    CAST(year(coalesce(b.time, a.time)) AS INTEGER) AS anchor_year,
    date_trunc('day', d.time) AS dod
FROM (SELECT DISTINCT subject_id FROM meds_icu) AS i
LEFT JOIN sexes AS s ON i.subject_id = s.subject_id
LEFT JOIN births AS b ON i.subject_id = b.subject_id
LEFT JOIN ages AS a ON i.subject_id = a.subject_id
LEFT JOIN meds_deaths AS d ON i.subject_id = d.subject_id;
