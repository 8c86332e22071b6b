-- Suspected infection: every antibiotic order with its culture, if one was taken in time.
-- Needs: orders (antibiotic prescriptions), cultures (one row per specimen).
CREATE TABLE suspicion AS
WITH paired AS (
    SELECT
        o.order_id,
        c.culture_time,
        c.specimen,
        c.positive_culture,
        -- The culture came first (up to 72 h before), or the antibiotic did (up to 24 h before);
        -- cultures without a time are compared by day.
        CASE
            WHEN c.charttime IS NOT NULL
                THEN o.antibiotic_time > c.charttime
                AND o.antibiotic_time <= c.charttime + INTERVAL 72 HOUR
            ELSE o.antibiotic_day BETWEEN c.chartdate AND c.chartdate + INTERVAL 3 DAY
        END AS culture_first,
        CASE
            WHEN c.charttime IS NOT NULL
                THEN o.antibiotic_time < c.charttime
                AND o.antibiotic_time >= c.charttime - INTERVAL 24 HOUR
            ELSE o.antibiotic_day BETWEEN c.chartdate - INTERVAL 1 DAY AND c.chartdate
        END AS antibiotic_first,
        struct_pack(
            day := c.chartdate,
            moment := coalesce(c.charttime, TIMESTAMP 'infinity'),
            negative := NOT c.positive_culture,
            id := c.micro_specimen_id
        ) AS rank
    FROM orders AS o
    INNER JOIN cultures AS c USING (subject_id)
),

earliest AS (
    SELECT
        order_id,
        arg_min(struct_pack(culture_time, specimen, positive_culture), rank)
            FILTER (WHERE culture_first) AS before,
        arg_min(struct_pack(culture_time, specimen, positive_culture), rank)
            FILTER (WHERE antibiotic_first) AS after
    FROM paired
    WHERE culture_first OR antibiotic_first
    GROUP BY order_id
)

SELECT
    o.subject_id,
    o.hadm_id,
    o.stay_id,
    o.antibiotic,
    o.antibiotic_time,
    e.order_id IS NOT NULL AS suspected_infection,
    CASE
        WHEN e.order_id IS NOT NULL THEN coalesce(e.before.culture_time, o.antibiotic_time)
    END AS suspected_infection_time,
    coalesce(e.before.culture_time, e.after.culture_time) AS culture_time,
    coalesce(e.before.specimen, e.after.specimen) AS specimen,
    coalesce(e.before.positive_culture, e.after.positive_culture) AS positive_culture
FROM orders AS o
LEFT JOIN earliest AS e USING (order_id);
