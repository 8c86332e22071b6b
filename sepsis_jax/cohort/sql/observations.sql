-- Everything charted or measured within the kept part of each stay, as (row, step, feature,
-- value) in the schema's units; `problem` names why a value is not used. Steps below 0 are before
-- the first row.
CREATE TABLE observations AS
WITH window_of_stay AS (
    SELECT
        *,
        intime - to_seconds(
            getvariable('step_seconds') * (getvariable('past_steps') + getvariable('lead_steps'))
        ) AS first_moment,
        least(
            endtime,
            intime + to_seconds(getvariable('step_seconds') * (steps - getvariable('lead_steps')))
        ) AS last_moment
    FROM cohort
),

charted AS (
    SELECT
        c.row,
        row_step(e.charttime, c.intime) AS step,
        i.feature,
        CASE
            WHEN i.is_fio2 AND e.valuenum > 0 AND e.valuenum <= 1 THEN e.valuenum * 100
            ELSE e.valuenum
        END AS value,
        e.problem,
        e.censored
    FROM chart AS e
    INNER JOIN feature_chart AS i USING (itemid)
    INNER JOIN window_of_stay AS c
        ON e.stay_id = c.stay_id AND e.charttime >= c.first_moment
        AND e.charttime < c.last_moment
    WHERE e.valuenum IS NOT NULL OR e.problem IS NOT NULL
),

conscious AS (
    SELECT
        c.row,
        row_step(g.charttime, c.intime) AS step,
        g.part AS feature,
        g.value,
        NULL AS problem,
        false AS censored
    FROM gcs_parts AS g
    INNER JOIN window_of_stay AS c
        ON g.stay_id = c.stay_id AND g.charttime >= c.first_moment
        AND g.charttime < c.last_moment
    WHERE g.value IS NOT NULL
),

measured AS (
    SELECT
        c.row,
        row_step(e.charttime, c.intime) AS step,
        i.feature,
        e.valuenum AS value,
        e.problem,
        e.censored
    FROM lab AS e
    INNER JOIN feature_labs AS i USING (itemid)
    INNER JOIN window_of_stay AS c
        ON e.subject_id = c.subject_id AND e.charttime >= c.first_moment
        AND e.charttime < c.last_moment
    WHERE (e.valuenum IS NOT NULL OR e.problem IS NOT NULL)
        AND (
            NOT i.arterial_only
            OR e.specimen_id IN (
                SELECT specimen_id FROM lab
                WHERE itemid = getvariable('specimen_type') AND value = 'ART.'
            )
        )
)

SELECT
    o.row,
    CAST(o.step AS SMALLINT) AS step,
    CAST(f.index AS TINYINT) AS feature,
    CAST(o.value AS FLOAT) AS value,
    CASE
        WHEN o.problem IS NOT NULL THEN o.problem
        WHEN o.value < f.low OR o.value > f.high THEN 'outside range'
        WHEN f.positive_only AND o.value <= 0 THEN 'not positive'
    END AS problem,
    o.censored
FROM (FROM charted UNION ALL FROM conscious UNION ALL FROM measured) AS o
INNER JOIN feature_limits AS f ON o.feature = f.name;
