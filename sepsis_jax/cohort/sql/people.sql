-- Every ICU stay with what is known of the patient and the hospital stay.
CREATE TABLE dated AS
SELECT
    s.*,
    p.gender,
    CASE getvariable('age')
        WHEN 'years' THEN p.anchor_age + year(a.admittime) - p.anchor_year
        ELSE p.anchor_age + (
            epoch_us(a.admittime) - epoch_us(make_timestamp(p.anchor_year, 1, 1, 0, 0, 0))
        ) / 31556908800000.0
    END AS age,
    CASE getvariable('death_clock')
        WHEN 'icu-admission' THEN CAST(s.intime AS DATE)
        ELSE CAST(a.admittime AS DATE)
    END AS day_zero,
    coalesce(a.hospital_expire_flag, 0) = 1 AS flagged,
    flagged OR a.deathtime IS NOT NULL AS died_in_hospital,
    a.deathtime,
    CAST(p.dod AS DATE) AS dod,
    -- Who died in hospital was dead at discharge.
    CASE WHEN flagged THEN CAST(a.dischtime AS DATE) END AS discharged_dead,
    -- A time of midnight, or a date alone, is taken as the end of that day.
    CASE
        WHEN a.deathtime > date_trunc('day', a.deathtime) THEN a.deathtime
        ELSE date_trunc('day', a.deathtime) + INTERVAL 1 DAY
    END AS death_moment,
    CAST(CAST(p.dod AS DATE) AS TIMESTAMP) + INTERVAL 1 DAY AS dod_end,
    CASE WHEN flagged AND a.deathtime IS NULL AND a.dischtime > s.intime THEN a.dischtime END
        AS undated_death
FROM stays AS s
INNER JOIN admissions AS a ON s.hadm_id = a.hadm_id AND s.subject_id = a.subject_id
INNER JOIN patients AS p ON s.subject_id = p.subject_id;

-- The earliest date of death that is not before day zero, which would be an error. No row of a
-- stay begins after its `end_of_stay`.
CREATE TABLE people AS
SELECT
    * EXCLUDE (flagged, dod, discharged_dead, death_moment, dod_end, undated_death, deathtime),
    least(
        CASE WHEN CAST(deathtime AS DATE) >= day_zero THEN CAST(deathtime AS DATE) END,
        CASE WHEN dod >= day_zero THEN dod END,
        CASE WHEN discharged_dead >= day_zero THEN discharged_dead END
    ) AS death_day,
    least(outtime, death_moment, undated_death, CASE WHEN dod_end > intime THEN dod_end END)
        AS end_of_stay,
    row_number() OVER (PARTITION BY subject_id ORDER BY intime, stay_id) AS nth_stay
FROM dated;

CREATE TABLE people_counts AS
SELECT 'stays that begin after the death of the patient' AS name, count(*) AS rows
FROM people WHERE end_of_stay <= intime
UNION ALL
SELECT 'deaths in hospital without a date of death', count(*)
FROM dated WHERE flagged AND deathtime IS NULL AND dod IS NULL
UNION ALL
SELECT 'deaths in hospital that hospital_expire_flag does not tell', count(*)
FROM dated WHERE NOT flagged AND deathtime IS NOT NULL
UNION ALL
SELECT 'dates of death before ICU admission, taken as errors', count(*)
FROM dated WHERE dod_end <= intime;
