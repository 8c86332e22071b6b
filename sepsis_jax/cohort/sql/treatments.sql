-- Vasopressor exposure per step: norepinephrine equivalents of the segments that overlap it.
CREATE TABLE vasopressor_steps AS
WITH overlapping AS (
    SELECT
        c.row,
        c.intime,
        v.norepinephrine_equivalent AS dose,
        greatest(epoch(v.starttime - c.intime), 0) AS first_second,
        least(epoch(v.endtime - c.intime), c.steps * getvariable('step_seconds')) AS last_second
    FROM vasoactive AS v
    INNER JOIN cohort AS c USING (stay_id)
    WHERE v.norepinephrine_equivalent > 0 AND v.endtime > v.starttime
        AND v.endtime > c.intime
        AND v.starttime < c.intime + to_seconds(c.steps * getvariable('step_seconds'))
),

stepped AS (
    SELECT
        *,
        unnest(generate_series(
            CAST(floor(first_second / getvariable('step_seconds')) AS BIGINT),
            CAST(ceil(last_second / getvariable('step_seconds')) AS BIGINT) - 1
        )) AS step
    FROM overlapping
)

SELECT
    row,
    CAST(step AS SMALLINT) AS step,
    max(dose) AS largest,
    sum(dose * (
        least(last_second, (step + 1) * getvariable('step_seconds'))
        - greatest(first_second, step * getvariable('step_seconds'))
    )) / getvariable('step_seconds') AS weighted
FROM stepped
GROUP BY row, step;

-- Fluid per step: a row with a rate is spread evenly over its time, a row without one is a bolus
-- at its start.
CREATE TABLE fluid_steps AS
WITH placed AS (
    SELECT
        c.row,
        c.steps,
        f.volume,
        epoch(f.starttime - c.intime) AS first_second,
        CASE WHEN f.infused THEN epoch(f.endtime - c.intime) END AS last_second
    FROM fluid_rows AS f
    INNER JOIN cohort AS c USING (stay_id)
),

boluses AS (
    SELECT
        row, steps, floor(first_second / getvariable('step_seconds')) AS step, volume
    FROM placed
    WHERE last_second IS NULL AND first_second >= 0
),

infusions AS (
    SELECT
        *,
        unnest(generate_series(
            CAST(floor(greatest(first_second, 0) / getvariable('step_seconds')) AS BIGINT),
            CAST(ceil(
                least(last_second, steps * getvariable('step_seconds'))
                / getvariable('step_seconds')
            ) AS BIGINT) - 1
        )) AS step
    FROM placed
    WHERE last_second > 0 AND first_second < steps * getvariable('step_seconds')
),

shares AS (
    SELECT row, steps, step, volume FROM boluses
    UNION ALL
    SELECT
        row,
        steps,
        step,
        volume * (
            least(last_second, (step + 1) * getvariable('step_seconds'))
            - greatest(first_second, step * getvariable('step_seconds'))
        ) / (last_second - first_second)
    FROM infusions
)

SELECT row, CAST(step AS SMALLINT) AS step, sum(volume) AS volume
FROM shares
WHERE step < steps
GROUP BY row, step;
