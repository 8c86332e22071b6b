-- Until July 2026 mimic-code's DuckDB tables measured exact time spans; since then they count
-- the hours and minutes of the clock that begin in between, as BigQuery does.
CREATE MACRO hours_between(earlier, later) AS
    CASE
        WHEN getvariable('mimic_code') = 'before' THEN
            (epoch_us(later) - epoch_us(earlier)) / 3600000000.0
        ELSE date_diff('hour', earlier, later)
    END;

CREATE MACRO minutes_between(earlier, later) AS
    CASE
        WHEN getvariable('mimic_code') = 'before' THEN
            (epoch_us(later) - epoch_us(earlier)) / 60000000.0
        ELSE date_diff('minute', earlier, later)
    END;

-- What the hourly SOFA scores: numbers within the limits of the option `sofa_values`.
CREATE VIEW scored_chart AS
SELECT c.*, l.name
FROM chart AS c
INNER JOIN sofa_limits AS l USING (itemid)
WHERE c.valuenum BETWEEN l.low AND l.high AND (l.limits_too OR NOT c.censored);

CREATE VIEW scored_lab AS
SELECT e.*, l.name
FROM lab AS e
INNER JOIN sofa_limits AS l USING (itemid)
WHERE e.valuenum BETWEEN l.low AND l.high AND (l.limits_too OR NOT e.censored);

-- The hours of each stay, counted from the first heart rate, as mimic-code does: hour h ends h
-- full hours after the first whole hour.
CREATE TABLE clock AS
SELECT
    s.subject_id,
    s.hadm_id,
    s.stay_id,
    min(c.charttime) AS first_heart_rate,
    max(c.charttime) AS last_heart_rate,
    date_trunc('hour', min(c.charttime) + INTERVAL 1 HOUR - INTERVAL 1 MICROSECOND) AS hour_zero,
    CAST(ceil(hours_between(min(c.charttime), max(c.charttime))) AS INTEGER) AS last_hour
FROM stays AS s
INNER JOIN chart AS c ON s.stay_id = c.stay_id AND c.itemid = getvariable('heart_rate')
GROUP BY ALL;

CREATE TABLE hours AS
SELECT
    stay_id,
    CAST(hr AS INTEGER) AS hr,
    hour_zero + to_hours(hr) AS endtime
FROM (SELECT stay_id, hour_zero, unnest(generate_series(-24, last_hour)) AS hr FROM clock);

-- The hour that holds a moment: (end of hour - 1 h, end of hour].
CREATE MACRO hour_of(moment, hour_zero) AS
    CAST(ceil((epoch_us(moment) - epoch_us(hour_zero)) / 3600000000.0) AS INTEGER);

-- The row that holds what is recorded at a moment, and the one that holds what lasts until a
-- moment; steps are (start, end] for ends.
CREATE MACRO row_step(moment, intime) AS
    CAST(floor(epoch(moment - intime) / getvariable('step_seconds')) AS INTEGER)
    + getvariable('lead_steps');

CREATE MACRO row_step_end(moment, intime) AS
    CAST(ceil(epoch(moment - intime) / getvariable('step_seconds')) AS INTEGER) - 1
    + getvariable('lead_steps');
