-- Every ICU stay with what is known of the patient and the hospital stay.
CREATE TABLE people AS
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
    least(CAST(p.dod AS DATE), CAST(a.deathtime AS DATE)) AS death_day,
    coalesce(a.hospital_expire_flag, 0) = 1 AS died_in_hospital,
    row_number() OVER (PARTITION BY s.subject_id ORDER BY s.intime, s.stay_id) AS nth_stay
FROM stays AS s
INNER JOIN admissions AS a USING (hadm_id)
INNER JOIN patients AS p ON s.subject_id = p.subject_id;
