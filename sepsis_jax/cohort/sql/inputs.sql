-- Vasoactive and fluid rows in the units of items.py, and what had to be set aside.
CREATE TABLE vasoactive_matched AS
SELECT i.*, v.drug, v.unit, v.cap, u.factor, u.divide_by_weight
FROM inputs AS i
INNER JOIN vasoactive_items AS v USING (itemid)
LEFT JOIN rate_units AS u ON v.unit = u.unit AND trim(i.rateuom) = u.rateuom;

CREATE TABLE vasoactive_rows AS
WITH converted AS (
    SELECT
        stay_id,
        drug,
        starttime,
        endtime,
        cap,
        CASE
            -- As mimic-code: with a weight of 1 kg the unit of such a row was mistyped.
            WHEN trim(rateuom) = 'mg/kg/min' AND patientweight = 1 THEN rate
            WHEN divide_by_weight THEN rate * factor / nullif(greatest(patientweight, 0), 0)
            ELSE rate * factor
        END AS rate
    FROM vasoactive_matched
    WHERE rate IS NULL OR factor IS NOT NULL
)

SELECT
    * EXCLUDE (cap),
    CASE
        WHEN rate IS NOT NULL AND getvariable('cap_vasopressors') THEN least(rate, cap)
        ELSE rate
    END AS dose_rate
FROM converted;

CREATE TABLE fluid_matched AS
SELECT i.*, f.isotonic, u.factor
FROM inputs AS i
INNER JOIN fluid_items AS f USING (itemid)
LEFT JOIN fluid_units AS u
    ON i.itemid = u.itemid AND lower(trim(i.amountuom)) = u.amountuom;

CREATE TABLE fluid_rows AS
SELECT
    stay_id,
    starttime,
    endtime,
    amount * factor * isotonic AS volume,
    rate IS NOT NULL AND endtime > starttime AS infused
FROM fluid_matched
WHERE amount > 0 AND factor IS NOT NULL AND statusdescription IS DISTINCT FROM 'Rewritten';

CREATE TABLE unknown_units AS
SELECT
    'rateuom' AS source_column, drug AS item, coalesce(rateuom, '') AS unit, count(*) AS rows
FROM vasoactive_matched
WHERE rate IS NOT NULL AND factor IS NULL
GROUP BY ALL
UNION ALL
SELECT 'amountuom', 'fluid item ' || itemid, coalesce(amountuom, ''), count(*)
FROM fluid_matched
WHERE amount > 0 AND factor IS NULL
GROUP BY ALL;

CREATE TABLE input_counts AS
SELECT 'vasoactive rows without rate' AS name, count(*) AS rows
FROM vasoactive_matched WHERE rate IS NULL
UNION ALL
SELECT 'vasoactive rows with a rate of zero or less', count(*)
FROM vasoactive_matched WHERE rate <= 0
UNION ALL
SELECT 'vasoactive rows that end before they start', count(*)
FROM vasoactive_matched WHERE endtime <= starttime
UNION ALL
SELECT drug || ' rates above the cap', count(*)
FROM vasoactive_rows INNER JOIN (SELECT DISTINCT drug, cap FROM vasoactive_items) USING (drug)
WHERE rate > cap
GROUP BY drug
UNION ALL
SELECT 'fluid rows without a positive amount', count(*)
FROM fluid_matched WHERE amount IS NULL OR amount <= 0
UNION ALL
SELECT 'fluid rows marked as rewritten', count(*)
FROM fluid_matched WHERE statusdescription = 'Rewritten';
