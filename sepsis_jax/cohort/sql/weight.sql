-- Weight in force: each charted weight until the next one; the first admission weight, or the
-- first weight of any kind, holds from two hours before ICU admission.
CREATE TABLE weight_durations AS
WITH charted AS (
    SELECT
        c.stay_id,
        CASE
            WHEN getvariable('mimic_code') = 'before' THEN c.valuenum ELSE round(c.valuenum, 3)
        END AS weight,
        CASE WHEN c.itemid = getvariable('weight_admit') THEN 'admit' ELSE 'daily' END
            AS weight_type,
        c.charttime,
        s.intime,
        s.outtime,
        row_number() OVER (PARTITION BY c.stay_id, c.itemid ORDER BY c.charttime) AS nth
    FROM chart AS c
    INNER JOIN stays AS s USING (stay_id)
    WHERE c.itemid IN (getvariable('weight_admit'), getvariable('weight_daily'))
        AND c.valuenum > 0
        AND (getvariable('mimic_code') = 'before' OR c.valuenum < 1500)
),

dated AS (
    SELECT
        *,
        CASE
            WHEN weight_type = 'admit' AND nth = 1 THEN intime - INTERVAL 2 HOUR
            ELSE charttime
        END AS starttime
    FROM charted
),

chained AS (
    SELECT
        *,
        coalesce(lead(starttime) OVER stay, outtime + INTERVAL 2 HOUR) AS endtime,
        row_number() OVER stay AS place
    FROM dated
    WINDOW stay AS (PARTITION BY stay_id ORDER BY starttime)
)

SELECT stay_id, starttime, endtime, weight, weight_type FROM chained
UNION ALL
SELECT stay_id, intime - INTERVAL 2 HOUR, starttime, weight, weight_type
FROM chained
WHERE place = 1 AND intime < starttime;
