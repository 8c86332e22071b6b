-- Antibiotic orders of ICU patients.
-- A name and route count as antibiotic when any order of that name and route passes the filters.
CREATE TABLE antibiotic_orders AS
WITH prescribed AS (
    SELECT
        p.*,
        regexp_matches(lower(p.drug), getvariable('antibiotic_pattern'))
        OR getvariable('extended_antibiotics') AS listed
    FROM raw_prescriptions AS p
    WHERE p.subject_id IN (SELECT subject_id FROM stays)
        AND p.drug IS NOT NULL
        AND (
            regexp_matches(lower(p.drug), getvariable('antibiotic_pattern'))
            OR regexp_matches(lower(p.drug), getvariable('extended_antibiotic_pattern'))
        )
),

systemic AS (
    SELECT DISTINCT drug, route
    FROM prescribed
    WHERE drug_type <> 'BASE'
        AND NOT list_contains(getvariable('topical_routes'), route)
        AND NOT regexp_matches(lower(route), getvariable('topical_route_pattern'))
        AND NOT regexp_matches(lower(drug), getvariable('topical_drug_pattern'))
)

SELECT
    p.*,
    s.stay_id,
    y.drug IS NOT NULL AS systemic
FROM prescribed AS p
LEFT JOIN systemic AS y ON p.drug = y.drug AND p.route = y.route
LEFT JOIN stays AS s
    ON p.hadm_id = s.hadm_id AND p.starttime >= s.intime AND p.starttime < s.outtime;

CREATE TABLE orders AS
SELECT
    row_number() OVER () AS order_id,
    subject_id,
    hadm_id,
    stay_id,
    drug AS antibiotic,
    route,
    starttime AS antibiotic_time,
    date_trunc('day', starttime) AS antibiotic_day
FROM antibiotic_orders
WHERE listed AND systemic;

CREATE TABLE order_counts AS
SELECT
    'orders of '
    || regexp_extract(lower(drug), getvariable('extended_antibiotic_pattern'))
    || ' left out (extended_antibiotics)' AS name,
    count(*) AS rows
FROM antibiotic_orders
WHERE systemic AND NOT listed AND stay_id IS NOT NULL
GROUP BY ALL
UNION ALL
SELECT 'antibiotic orders without a route', count(*)
FROM antibiotic_orders
WHERE route IS NULL AND listed AND stay_id IS NOT NULL
UNION ALL
SELECT 'antibiotic orders without a start', count(*)
FROM antibiotic_orders
WHERE starttime IS NULL AND listed;
