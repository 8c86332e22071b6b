-- Urine per moment (irrigant put in counts against it) and the sums of the last 24 h.
CREATE TABLE urine_output AS
SELECT
    stay_id,
    charttime,
    sum(CASE WHEN itemid = getvariable('irrigant_in') THEN -abs(value) ELSE value END)
        AS urineoutput
FROM urine_rows
GROUP BY stay_id, charttime;

-- covered_minutes: time since the previous record, or since the first heart rate near the stay.
CREATE TABLE urine_24h AS
WITH starts AS (
    SELECT s.stay_id, min(c.charttime) AS first_heart_rate
    FROM stays AS s
    INNER JOIN chart AS c
        ON s.stay_id = c.stay_id AND c.itemid = getvariable('heart_rate')
        AND c.charttime > s.intime - INTERVAL 1 MONTH
        AND c.charttime < s.outtime + INTERVAL 1 MONTH
    GROUP BY s.stay_id
),

spaced AS (
    SELECT
        u.*,
        minutes_between(
            coalesce(
                lag(u.charttime) OVER (PARTITION BY u.stay_id ORDER BY u.charttime),
                s.first_heart_rate
            ),
            u.charttime
        ) AS covered_minutes
    FROM urine_output AS u
    INNER JOIN starts AS s USING (stay_id)
)

SELECT
    stay_id,
    charttime,
    sum(urineoutput) OVER day AS urineoutput_24hr,
    -- Rounded as mimic-code does, since limits are drawn on the rounded figure.
    round(CAST(sum(covered_minutes) OVER day / 60.0 AS DECIMAL(18, 3)), 2) AS uo_tm_24hr
FROM spaced
WINDOW day AS (
    PARTITION BY stay_id ORDER BY charttime
    RANGE BETWEEN INTERVAL 23 HOUR PRECEDING AND CURRENT ROW
);
