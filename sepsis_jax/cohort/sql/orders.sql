-- Antibiotic orders of ICU patients.
-- A name and route count as antibiotic when any order of that name and route passes the filters.
CREATE TABLE orders AS
WITH prescribed AS (
    SELECT p.*
    FROM raw_prescriptions AS p
    WHERE p.subject_id IN (SELECT subject_id FROM stays)
        AND p.drug IS NOT NULL
        AND p.route IS NOT NULL
        AND regexp_matches(lower(p.drug), getvariable('antibiotic_pattern'))
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
    row_number() OVER () AS order_id,
    p.subject_id,
    p.hadm_id,
    s.stay_id,
    p.drug AS antibiotic,
    p.route,
    p.starttime AS antibiotic_time,
    date_trunc('day', p.starttime) AS antibiotic_day
FROM prescribed AS p
SEMI JOIN systemic AS y ON p.drug = y.drug AND p.route = y.route
LEFT JOIN stays AS s
    ON p.hadm_id = s.hadm_id AND p.starttime >= s.intime AND p.starttime < s.outtime;
