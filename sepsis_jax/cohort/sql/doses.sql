-- Vasoactive rates and fluid volumes, and what had to be set aside.
-- A charted weight holds until the next one; the first of a stay also before it was charted.
CREATE TABLE charted_weights AS
SELECT
    stay_id,
    CASE
        WHEN row_number() OVER (PARTITION BY stay_id ORDER BY charttime) = 1
            THEN TIMESTAMP '0001-01-01' ELSE charttime
    END AS since,
    weight
FROM (
    SELECT stay_id, charttime, max(valuenum) AS weight
    FROM chart
    WHERE itemid IN (getvariable('weight_admit'), getvariable('weight_daily'))
        AND stay_id IS NOT NULL
        AND valuenum BETWEEN getvariable('lowest_weight') AND getvariable('highest_weight')
    GROUP BY stay_id, charttime
);

CREATE TABLE vasoactive_weighted AS
SELECT
    m.* EXCLUDE (rewritten),
    coalesce(m.rewritten, false) AS rewritten,
    -- As mimic-code: with a weight of 1 kg the unit of such a row was mistyped.
    m.factor = 1000 AND m.weight_power = 0 AND m.patientweight = 1 AS mistyped,
    coalesce(
        m.patientweight BETWEEN getvariable('lowest_weight') AND getvariable('highest_weight'),
        false
    ) AS plausible,
    m.rate > 0 AND m.weight_power <> 0 AS by_weight,
    CASE WHEN plausible THEN m.patientweight ELSE w.weight END AS weight
FROM vasoactive_matched AS m
ASOF LEFT JOIN charted_weights AS w ON m.stay_id = w.stay_id AND m.starttime >= w.since;

CREATE TABLE vasoactive_rows AS
WITH converted AS (
    SELECT
        stay_id,
        drug,
        starttime,
        endtime,
        cap,
        CASE
            WHEN mistyped OR rate = 0 THEN rate
            WHEN by_weight THEN rate * factor * pow(weight, weight_power)
            ELSE rate * factor
        END AS rate
    FROM vasoactive_weighted
    WHERE NOT unlisted AND NOT rewritten
        AND starttime IS NOT NULL AND endtime IS NOT NULL
        AND (rate IS NULL OR rate = 0 OR (rate > 0 AND factor IS NOT NULL))
        AND NOT (coalesce(by_weight, false) AND weight IS NULL)
)

SELECT
    * EXCLUDE (cap),
    CASE
        WHEN rate IS NOT NULL AND getvariable('cap_vasopressors') THEN least(rate, cap)
        ELSE rate
    END AS dose_rate
FROM converted;

CREATE TABLE fluid_rows AS
SELECT
    stay_id,
    starttime,
    endtime,
    amount * factor * isotonic AS volume,
    rate IS NOT NULL AND endtime > starttime AS infused
FROM fluid_matched
WHERE amount > 0 AND factor IS NOT NULL AND starttime IS NOT NULL
    AND NOT coalesce(rewritten, false);

CREATE TABLE input_counts AS
SELECT 'vasoactive rows without rate' AS name, count(*) AS rows
FROM vasoactive_weighted WHERE rate IS NULL
UNION ALL
SELECT 'vasoactive rows with a rate of zero or less', count(*)
FROM vasoactive_weighted WHERE rate <= 0
UNION ALL
SELECT 'vasoactive rows that end before they start', count(*)
FROM vasoactive_weighted WHERE endtime <= starttime
UNION ALL
SELECT 'vasoactive rows without a start or an end', count(*)
FROM vasoactive_weighted WHERE starttime IS NULL OR endtime IS NULL
UNION ALL
SELECT 'vasoactive rows marked as rewritten', count(*)
FROM vasoactive_weighted WHERE rewritten
UNION ALL
SELECT 'vasoactive rows per patient without a plausible weight', count(*)
FROM vasoactive_weighted WHERE by_weight AND weight IS NULL AND NOT rewritten AND NOT unlisted
UNION ALL
SELECT 'vasoactive rows divided by a charted weight', count(*)
FROM vasoactive_weighted
WHERE by_weight AND NOT plausible AND weight IS NOT NULL AND NOT rewritten AND NOT unlisted
UNION ALL
SELECT drug || ' item ' || itemid || ' rows left out (extended_vasopressors)', count(*)
FROM vasoactive_weighted WHERE unlisted
GROUP BY drug, itemid
UNION ALL
SELECT drug || ' rates above the cap', count(*)
FROM vasoactive_rows
INNER JOIN (SELECT drug, max(cap) AS cap FROM vasoactive_items GROUP BY drug) USING (drug)
WHERE rate > cap
GROUP BY drug
UNION ALL
SELECT 'fluid rows without a positive amount', count(*)
FROM fluid_matched WHERE amount IS NULL OR amount <= 0
UNION ALL
SELECT 'fluid rows without a start', count(*)
FROM fluid_matched WHERE starttime IS NULL
UNION ALL
SELECT 'fluid rows marked as rewritten', count(*)
FROM fluid_matched WHERE rewritten;
