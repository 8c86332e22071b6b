-- Vasoactive and fluid rows with the meaning of their units, and the units that are not known.
CREATE TABLE vasoactive_matched AS
SELECT
    i.*,
    v.drug,
    v.unit,
    v.cap,
    v.extended AND NOT getvariable('extended_vasopressors') AS unlisted,
    u.factor,
    u.weight_power
FROM inputs AS i
INNER JOIN vasoactive_items AS v USING (itemid)
LEFT JOIN rate_units AS u ON v.unit = u.unit AND i.rateuom = u.rateuom;

CREATE TABLE fluid_matched AS
SELECT i.*, f.isotonic, u.factor
FROM inputs AS i
INNER JOIN fluid_items AS f USING (itemid)
LEFT JOIN fluid_units AS u ON i.itemid = u.itemid AND i.amountuom = u.amountuom;

CREATE TABLE unknown_units AS
SELECT
    'rateuom' AS source_column, drug AS item, coalesce(rateuom, '') AS unit, count(*) AS rows
FROM vasoactive_matched
WHERE rate > 0 AND factor IS NULL AND NOT unlisted AND NOT coalesce(rewritten, false)
GROUP BY ALL
UNION ALL
SELECT 'amountuom', 'fluid item ' || itemid, coalesce(amountuom, ''), count(*)
FROM fluid_matched
WHERE amount > 0 AND factor IS NULL AND NOT coalesce(rewritten, false)
GROUP BY ALL;
