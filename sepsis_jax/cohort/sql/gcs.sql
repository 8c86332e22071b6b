-- Glasgow Coma Scale. A verbal part that cannot be told for a tube makes the total 15; a missing
-- part is taken from the previous record of the last 6 h, else it counts as normal.
CREATE TABLE gcs AS
WITH charted AS (
    -- "No Response-ETT" counts whatever number stands beside it.
    SELECT
        subject_id,
        stay_id,
        charttime,
        max(valuenum) FILTER (WHERE itemid = getvariable('gcs_motor')) AS motor,
        max(CASE WHEN value = 'No Response-ETT' THEN 0 ELSE valuenum END)
            FILTER (WHERE itemid = getvariable('gcs_verbal')) AS verbal,
        max(valuenum) FILTER (WHERE itemid = getvariable('gcs_eyes')) AS eyes,
        bool_or(itemid = getvariable('gcs_verbal') AND coalesce(value, '') = 'No Response-ETT')
            AS unable
    FROM (
        FROM scored_chart
        UNION ALL BY NAME
        FROM chart WHERE itemid = getvariable('gcs_verbal') AND value = 'No Response-ETT'
    )
    WHERE stay_id IS NOT NULL
        AND itemid IN (
            getvariable('gcs_motor'), getvariable('gcs_verbal'), getvariable('gcs_eyes')
        )
    GROUP BY subject_id, stay_id, charttime
),

chained AS (
    SELECT
        *,
        coalesce(lag(charttime) OVER stay > charttime - INTERVAL 6 HOUR, false) AS recent,
        CASE WHEN recent THEN lag(motor) OVER stay END AS previous_motor,
        CASE WHEN recent THEN lag(verbal) OVER stay END AS previous_verbal,
        CASE WHEN recent THEN lag(eyes) OVER stay END AS previous_eyes
    FROM charted
    WINDOW stay AS (PARTITION BY stay_id ORDER BY charttime)
)

SELECT
    subject_id,
    stay_id,
    charttime,
    CASE
        WHEN coalesce(verbal, previous_verbal) = 0 THEN 15
        -- After a tube nothing is carried over.
        WHEN previous_verbal = 0 THEN coalesce(motor, 6) + verbal + coalesce(eyes, 4)
        ELSE coalesce(motor, previous_motor, 6) + coalesce(verbal, previous_verbal, 5)
            + coalesce(eyes, previous_eyes, 4)
    END AS gcs,
    coalesce(motor, previous_motor) AS gcs_motor,
    coalesce(verbal, previous_verbal) AS gcs_verbal,
    coalesce(eyes, previous_eyes) AS gcs_eyes,
    unable AS gcs_unable
FROM chained;
