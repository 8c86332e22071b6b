-- Urine, ventilation and SOFA per step.
CREATE TABLE urine_steps AS
WITH placed AS (
    SELECT c.row, c.steps, epoch(u.charttime - c.intime) AS second, u.urineoutput AS volume
    FROM usable_urine AS u
    INNER JOIN cohort AS c USING (stay_id)
),

own AS (
    SELECT row, floor(second / getvariable('step_seconds')) AS step, sum(volume) AS volume
    FROM placed
    WHERE second >= 0 AND second < steps * getvariable('step_seconds')
    GROUP BY ALL
),

-- A record counts for the 24 h after it, at the ends of steps.
day AS (
    SELECT row, step, sum(volume) AS volume
    FROM (
        SELECT
            row,
            steps,
            volume,
            unnest(generate_series(
                CAST(greatest(floor(second / getvariable('step_seconds')), 0) AS BIGINT),
                CAST(least(
                    floor((second + 86400) / getvariable('step_seconds')), steps
                ) AS BIGINT) - 1
            )) AS step
        FROM placed
    )
    GROUP BY row, step
)

SELECT
    coalesce(own.row, day.row) AS row,
    CAST(coalesce(own.step, day.step) AS SMALLINT) AS step,
    own.volume AS volume,
    day.volume AS volume_24h
FROM own
FULL JOIN day ON own.row = day.row AND own.step = day.step;

CREATE TABLE ventilated_steps AS
SELECT DISTINCT row, CAST(step AS SMALLINT) AS step
FROM (
    SELECT
        c.row,
        unnest(generate_series(
            CAST(greatest(
                floor(epoch(v.starttime - c.intime) / getvariable('step_seconds')), 0
            ) AS BIGINT),
            CAST(least(
                ceil(epoch(v.endtime - c.intime) / getvariable('step_seconds')), c.steps
            ) AS BIGINT) - 1
        )) AS step
    FROM ventilation AS v
    INNER JOIN cohort AS c USING (stay_id)
    WHERE list_contains(getvariable('invasive_statuses'), v.ventilation_status)
);

-- An hour belongs to the step in which it ends.
CREATE TABLE sofa_steps AS
SELECT
    c.row,
    CAST(ceil(epoch(s.endtime - c.intime) / getvariable('step_seconds')) AS SMALLINT) - 1 AS step,
    arg_max(s.sofa_24hours, s.endtime) AS rolling,
    coalesce(max(s.respiration), 0) + coalesce(max(s.coagulation), 0)
    + coalesce(max(s.liver), 0) + coalesce(max(s.cardiovascular), 0)
    + coalesce(max(s.cns), 0) + coalesce(max(s.renal), 0) AS within
FROM sofa AS s
INNER JOIN cohort AS c USING (stay_id)
WHERE s.endtime > c.intime
    AND s.endtime <= c.intime + to_seconds(c.steps * getvariable('step_seconds'))
GROUP BY ALL;
