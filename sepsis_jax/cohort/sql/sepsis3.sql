-- Sepsis-3: suspected infection in the ICU and a SOFA of at least 2 from 48 h before to 24 h
-- after; the earliest such pair of each stay.
CREATE TABLE sepsis3 AS
SELECT
    u.subject_id,
    u.stay_id,
    u.antibiotic_time,
    u.culture_time,
    u.suspected_infection_time,
    h.endtime AS sofa_time,
    h.sofa_24hours AS sofa_score,
    h.respiration_24hours AS respiration,
    h.coagulation_24hours AS coagulation,
    h.liver_24hours AS liver,
    h.cardiovascular_24hours AS cardiovascular,
    h.cns_24hours AS cns,
    h.renal_24hours AS renal
FROM (
    SELECT DISTINCT subject_id, stay_id, antibiotic_time, culture_time, suspected_infection_time
    FROM suspicion
    WHERE suspected_infection AND stay_id IS NOT NULL
) AS u
INNER JOIN sofa AS h
    ON u.stay_id = h.stay_id
    AND h.sofa_24hours >= 2
    AND h.endtime BETWEEN u.suspected_infection_time - INTERVAL 48 HOUR
    AND u.suspected_infection_time + INTERVAL 24 HOUR
QUALIFY row_number() OVER (
    PARTITION BY u.stay_id
    ORDER BY
        u.suspected_infection_time, u.antibiotic_time, u.culture_time NULLS FIRST, h.endtime
) = 1;
