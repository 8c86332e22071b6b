-- Comorbidities per hospital stay from its diagnoses; the index itself is added by charlson.py.
CREATE TABLE comorbidities AS
WITH coded AS (
    -- Ranges are matched once per distinct code, not once per diagnosis.
    SELECT d.icd_version, d.icd_code, r.condition
    FROM (SELECT DISTINCT icd_version, icd_code FROM diagnoses) AS d
    INNER JOIN charlson_codes AS r
        ON d.icd_version = r.icd_version
        AND substr(d.icd_code, 1, r.characters) BETWEEN r.first_code AND r.last_code
)

SELECT DISTINCT d.hadm_id, c.condition
FROM diagnoses AS d
INNER JOIN coded AS c USING (icd_version, icd_code);
