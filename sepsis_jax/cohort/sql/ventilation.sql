-- Moments of respiratory support, from ventilator modes and oxygen devices.
CREATE TABLE ventilation_moments AS
WITH modes AS (
    SELECT subject_id, max(stay_id) AS stay_id, charttime, itemid, max(value) AS term
    FROM chart
    WHERE itemid IN (getvariable('ventilator_mode'), getvariable('hamilton_mode'))
        AND stay_id IS NOT NULL AND value IS NOT NULL
    GROUP BY subject_id, charttime, itemid
),

-- mimic-code sees a device only where an oxygen flow was charted at the same moment. Of several
-- devices it takes the one stored last; until July 2026 the first in alphabetical order, a
-- missing text before all others.
devices AS (
    SELECT
        subject_id,
        max(stay_id) AS stay_id,
        charttime,
        getvariable('oxygen_device') AS itemid,
        CASE
            WHEN getvariable('mimic_code') <> 'before' THEN
                first(value ORDER BY storetime DESC NULLS LAST, value DESC NULLS LAST)
                    FILTER (WHERE itemid = getvariable('oxygen_device'))
            ELSE
                first(value ORDER BY value ASC NULLS FIRST)
                    FILTER (WHERE itemid = getvariable('oxygen_device'))
        END AS term
    FROM chart
    WHERE itemid = getvariable('oxygen_device')
        OR (list_contains(getvariable('oxygen_flow'), itemid) AND has_value)
    GROUP BY subject_id, charttime
    HAVING bool_or(itemid <> getvariable('oxygen_device'))
)

SELECT charted.stay_id, charted.charttime, min(t.rank) AS rank
FROM (SELECT * FROM modes UNION ALL SELECT * FROM devices) AS charted
INNER JOIN ventilation_terms AS t
    ON charted.itemid = t.itemid AND charted.term = t.term
GROUP BY charted.stay_id, charted.charttime;

-- Spells of one kind of support.
CREATE TABLE ventilation AS
WITH linked AS (
    SELECT
        stay_id,
        charttime,
        rank,
        lag(rank) OVER stay AS previous_rank,
        lead(charttime) OVER stay AS next_time,
        lag(charttime) OVER (PARTITION BY stay_id, rank ORDER BY charttime) AS same_time
    FROM ventilation_moments
    WINDOW stay AS (PARTITION BY stay_id ORDER BY charttime)
),

numbered AS (
    SELECT
        *,
        count_if(
            previous_rank IS DISTINCT FROM rank
            OR hours_between(same_time, charttime) >= 14
        ) OVER (PARTITION BY stay_id ORDER BY charttime) AS spell
    FROM linked
)

SELECT
    n.stay_id,
    min(n.charttime) AS starttime,
    max(
        CASE
            WHEN hours_between(n.charttime, n.next_time) < 14 THEN n.next_time
            ELSE n.charttime
        END
    ) AS endtime,
    any_value(s.status) AS ventilation_status
FROM numbered AS n
INNER JOIN ventilation_statuses AS s USING (rank)
GROUP BY n.stay_id, n.spell
HAVING min(n.charttime) <> max(n.charttime);
