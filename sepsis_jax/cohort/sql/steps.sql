-- Urine, ventilation and SOFA per row: of the step that ended before it, or of its own step.
CREATE TABLE urine_steps AS
SELECT row, CAST(step AS SMALLINT) AS step, sum(volume) AS volume
FROM (
    SELECT
        c.row,
        c.steps,
        floor(epoch(u.charttime - c.intime) / getvariable('step_seconds'))
        + getvariable('lead_steps') AS step,
        u.urineoutput AS volume
    FROM usable_urine AS u
    INNER JOIN cohort AS c USING (stay_id)
)
WHERE step >= 0 AND step < steps
GROUP BY row, step;

-- What is known before a row is the newest status, which lasts up to 14 h as in mimic-code; the
-- spell around it would also tell when the next status is charted.
CREATE TABLE ventilated_steps AS
WITH rows_of_stays AS (
    SELECT
        row,
        stay_id,
        step,
        intime + to_seconds(step * getvariable('step_seconds')) AS moment
    FROM (SELECT row, stay_id, intime, unnest(generate_series(0, steps - 1)) AS step FROM cohort)
),

newest AS (
    SELECT r.row, r.step, s.status
    FROM rows_of_stays AS r
    ASOF JOIN ventilation_moments AS m ON r.stay_id = m.stay_id AND r.moment > m.charttime
    INNER JOIN ventilation_statuses AS s USING (rank)
    WHERE hours_between(m.charttime, r.moment) < 14
),

spells AS (
    SELECT
        c.row,
        unnest(generate_series(
            greatest(row_step(v.starttime, c.intime), 0),
            least(row_step_end(v.endtime, c.intime), c.steps - 1)
        )) AS step,
        v.ventilation_status AS status
    FROM ventilation AS v
    INNER JOIN cohort AS c USING (stay_id)
)

SELECT DISTINCT row, CAST(step AS SMALLINT) AS step
FROM (
    SELECT row, step, status FROM newest WHERE getvariable('lead_steps') > 0
    UNION ALL
    SELECT row, step, status FROM spells WHERE getvariable('lead_steps') = 0
)
WHERE list_contains(getvariable('invasive_statuses'), status);

-- An hour belongs to the step in which it ends.
CREATE TABLE sofa_steps AS
SELECT
    c.row,
    CAST(row_step_end(s.endtime, c.intime) AS SMALLINT) AS step,
    arg_max(s.sofa_24hours, s.endtime) AS rolling,
    coalesce(max(s.respiration), 0) + coalesce(max(s.coagulation), 0)
    + coalesce(max(s.liver), 0) + coalesce(max(s.cardiovascular), 0)
    + coalesce(max(s.cns), 0) + coalesce(max(s.renal), 0) AS within
FROM sofa AS s
INNER JOIN cohort AS c USING (stay_id)
WHERE row_step_end(s.endtime, c.intime) BETWEEN 0 AND c.steps - 1
GROUP BY ALL;
