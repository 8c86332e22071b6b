-- One row per microbiology specimen of an ICU patient; what grew is known only later.
CREATE TABLE cultures AS
SELECT
    micro_specimen_id,
    max(subject_id) AS subject_id,
    date_trunc('day', max(chartdate)) AS chartdate,
    max(charttime) AS charttime,
    coalesce(max(charttime), date_trunc('day', max(chartdate))) AS culture_time,
    max(spec_type_desc) AS specimen,
    coalesce(bool_or(
        org_name IS NOT NULL AND org_name NOT IN ('', 'CANCELLED')
        AND org_itemid NOT IN (90856, 90760)
    ), false) AS positive_culture
FROM raw_microbiologyevents
WHERE subject_id IN (SELECT subject_id FROM stays)
GROUP BY micro_specimen_id;
