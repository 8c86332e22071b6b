-- Blood gases with a PaO2: the sample's kind, and PaO2 / FiO2 with the FiO2 of the sample or, if
-- it has none, the last one charted in the 4 h before. Until July 2026 mimic-code kept only one
-- of several gases of a patient at one moment.
CREATE TABLE blood_gas AS
WITH samples AS (
    SELECT
        specimen_id,
        max(subject_id) AS subject_id,
        max(charttime) AS charttime,
        max(value) FILTER (WHERE itemid = getvariable('specimen_type')) AS specimen,
        max(valuenum) FILTER (WHERE name = 'pao2') AS po2,
        max(
            CASE
                WHEN valuenum > 20 AND valuenum <= 100 THEN valuenum
                WHEN valuenum > 0.2 AND valuenum <= 1 THEN valuenum * 100
            END
        ) FILTER (WHERE itemid = getvariable('lab_fio2')) AS fio2
    FROM (
        FROM scored_lab WHERE name = 'pao2'
        UNION ALL BY NAME
        FROM lab WHERE itemid IN (getvariable('specimen_type'), getvariable('lab_fio2'))
    )
    GROUP BY specimen_id
    HAVING po2 IS NOT NULL
),

single AS (
    SELECT * FROM samples
    QUALIFY
        getvariable('mimic_code') <> 'before'
        OR row_number() OVER (PARTITION BY subject_id, charttime ORDER BY specimen_id) = 1
),

charted AS (
    SELECT
        subject_id,
        charttime,
        max(
            CASE
                WHEN valuenum > 0.2 AND valuenum <= 1 THEN valuenum * 100
                WHEN valuenum >= 20 AND valuenum <= 100 THEN valuenum
            END
        ) AS fio2_charted
    FROM chart
    WHERE itemid = getvariable('fio2_chart')
    GROUP BY subject_id, charttime
    HAVING fio2_charted IS NOT NULL
)

SELECT
    g.subject_id,
    g.specimen_id,
    g.charttime,
    g.specimen,
    g.po2,
    g.fio2,
    CASE WHEN c.charttime >= g.charttime - INTERVAL 4 HOUR THEN c.fio2_charted END
        AS fio2_charted,
    100 * g.po2 / coalesce(
        g.fio2,
        CASE WHEN c.charttime >= g.charttime - INTERVAL 4 HOUR THEN c.fio2_charted END
    ) AS pao2fio2ratio
FROM single AS g
ASOF LEFT JOIN charted AS c
    ON g.subject_id = c.subject_id AND g.charttime >= c.charttime;
