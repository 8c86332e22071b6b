-- Hourly SOFA: worst values of each hour, points per hour, and the worst points of the last 24 h.
CREATE TABLE hourly_signals AS
WITH arterial AS (
    SELECT
        k.stay_id,
        hour_of(g.charttime, k.hour_zero) AS hr,
        CASE
            WHEN EXISTS (
                FROM ventilation AS v
                WHERE v.stay_id = k.stay_id AND v.ventilation_status = 'InvasiveVent'
                    AND g.charttime BETWEEN v.starttime AND v.endtime
            ) THEN 'pf_ventilated' ELSE 'pf_breathing'
        END AS name,
        g.pao2fio2ratio AS value
    FROM clock AS k
    INNER JOIN blood_gas AS g USING (subject_id)
    WHERE g.specimen = 'ART.'
),

pressure AS (
    SELECT stay_id, charttime, avg(valuenum) AS value
    FROM scored_chart
    WHERE name = 'meanbp'
    GROUP BY stay_id, charttime
),

-- Per specimen, so that a result without hospital stay takes the one of its specimen.
results AS (
    SELECT max(hadm_id) AS hadm_id, max(charttime) AS charttime, name, max(valuenum) AS value
    FROM scored_lab
    WHERE name IN ('creatinine', 'bilirubin_total', 'platelet')
    GROUP BY specimen_id, name
),

infused AS (
    SELECT
        r.stay_id,
        unnest(generate_series(
            greatest(
                CAST(floor((epoch_us(r.starttime) - epoch_us(k.hour_zero)) / 3600000000.0) AS BIGINT)
                + 1, -24
            ),
            least(
                CAST(floor((epoch_us(r.endtime) - epoch_us(k.hour_zero)) / 3600000000.0) AS BIGINT),
                k.last_hour
            )
        )) AS hr,
        r.drug AS name,
        r.rate AS value
    FROM vasoactive_rows AS r
    INNER JOIN clock AS k USING (stay_id)
    WHERE r.drug IN ('norepinephrine', 'epinephrine', 'dopamine', 'dobutamine')
),

signals AS (
    FROM arterial
    UNION ALL
    SELECT k.stay_id, hour_of(p.charttime, k.hour_zero), 'pressure', p.value
    FROM pressure AS p INNER JOIN clock AS k USING (stay_id)
    UNION ALL
    SELECT k.stay_id, hour_of(g.charttime, k.hour_zero), 'gcs', g.gcs
    FROM gcs AS g INNER JOIN clock AS k USING (stay_id)
    UNION ALL
    SELECT
        k.stay_id,
        hour_of(r.charttime, k.hour_zero),
        r.name,
        r.value
    FROM results AS r INNER JOIN clock AS k USING (hadm_id)
    UNION ALL
    SELECT
        k.stay_id,
        hour_of(u.charttime, k.hour_zero),
        'urine',
        u.urineoutput_24hr / u.uo_tm_24hr * 24
    FROM urine_24h AS u INNER JOIN clock AS k USING (stay_id)
    WHERE u.uo_tm_24hr BETWEEN 22 AND 30
    UNION ALL
    SELECT stay_id, CAST(hr AS INTEGER), name, value FROM infused
)

SELECT
    s.stay_id,
    s.hr,
    min(s.value) FILTER (WHERE s.name = 'pf_ventilated') AS pf_ventilated,
    min(s.value) FILTER (WHERE s.name = 'pf_breathing') AS pf_breathing,
    min(s.value) FILTER (WHERE s.name = 'platelet') AS platelet,
    max(s.value) FILTER (WHERE s.name = 'bilirubin_total') AS bilirubin,
    min(s.value) FILTER (WHERE s.name = 'pressure') AS pressure,
    max(s.value) FILTER (WHERE s.name = 'norepinephrine') AS norepinephrine,
    max(s.value) FILTER (WHERE s.name = 'epinephrine') AS epinephrine,
    max(s.value) FILTER (WHERE s.name = 'dopamine') AS dopamine,
    max(s.value) FILTER (WHERE s.name = 'dobutamine') AS dobutamine,
    min(s.value) FILTER (WHERE s.name = 'gcs') AS gcs,
    max(s.value) FILTER (WHERE s.name = 'creatinine') AS creatinine,
    max(s.value) FILTER (WHERE s.name = 'urine') AS urine
FROM signals AS s
INNER JOIN clock AS k USING (stay_id)
WHERE s.hr BETWEEN -24 AND k.last_hour
GROUP BY s.stay_id, s.hr;

CREATE TABLE sofa AS
WITH points AS (
    SELECT
        h.stay_id,
        h.hr,
        h.endtime,
        CASE
            WHEN s.pf_ventilated < 100 THEN 4
            WHEN s.pf_ventilated < 200 THEN 3
            WHEN least(s.pf_ventilated, s.pf_breathing) < 300 THEN 2
            WHEN least(s.pf_ventilated, s.pf_breathing) < 400 THEN 1
            WHEN coalesce(s.pf_ventilated, s.pf_breathing) IS NOT NULL THEN 0
        END AS respiration,
        CASE
            WHEN s.platelet < 20 THEN 4
            WHEN s.platelet < 50 THEN 3
            WHEN s.platelet < 100 THEN 2
            WHEN s.platelet < 150 THEN 1
            WHEN s.platelet IS NOT NULL THEN 0
        END AS coagulation,
        CASE
            WHEN s.bilirubin >= 12 THEN 4
            WHEN s.bilirubin >= 6 THEN 3
            WHEN s.bilirubin >= 2 THEN 2
            WHEN s.bilirubin >= 1.2 THEN 1
            WHEN s.bilirubin IS NOT NULL THEN 0
        END AS liver,
        CASE
            WHEN greatest(s.norepinephrine, s.epinephrine) > 0.1 OR s.dopamine > 15 THEN 4
            WHEN s.dopamine > 5 OR greatest(s.norepinephrine, s.epinephrine) > 0 THEN 3
            -- Until July 2026 a rate of zero was enough.
            WHEN getvariable('mimic_code') = 'before'
                AND coalesce(s.norepinephrine, s.epinephrine) IS NOT NULL THEN 3
            WHEN greatest(s.dopamine, s.dobutamine) > 0 THEN 2
            WHEN s.pressure < 70 THEN 1
            WHEN coalesce(
                s.pressure, s.dopamine, s.dobutamine, s.norepinephrine, s.epinephrine
            ) IS NOT NULL THEN 0
        END AS cardiovascular,
        CASE
            WHEN s.gcs < 6 THEN 4
            WHEN s.gcs < 10 THEN 3
            WHEN s.gcs < 13 THEN 2
            WHEN s.gcs < 15 THEN 1
            WHEN s.gcs IS NOT NULL THEN 0
        END AS cns,
        CASE
            WHEN s.creatinine >= 5 OR s.urine < 200 THEN 4
            WHEN s.creatinine >= 3.5 OR s.urine < 500 THEN 3
            WHEN s.creatinine >= 2 THEN 2
            WHEN s.creatinine >= 1.2 THEN 1
            WHEN coalesce(s.creatinine, s.urine) IS NOT NULL THEN 0
        END AS renal
    FROM hours AS h
    LEFT JOIN hourly_signals AS s ON h.stay_id = s.stay_id AND h.hr = s.hr
),

worst AS (
    SELECT
        *,
        coalesce(max(respiration) OVER day, 0) AS respiration_24hours,
        coalesce(max(coagulation) OVER day, 0) AS coagulation_24hours,
        coalesce(max(liver) OVER day, 0) AS liver_24hours,
        coalesce(max(cardiovascular) OVER day, 0) AS cardiovascular_24hours,
        coalesce(max(cns) OVER day, 0) AS cns_24hours,
        coalesce(max(renal) OVER day, 0) AS renal_24hours
    FROM points
    WINDOW day AS (PARTITION BY stay_id ORDER BY hr ROWS BETWEEN 23 PRECEDING AND CURRENT ROW)
)

SELECT
    *,
    respiration_24hours + coagulation_24hours + liver_24hours + cardiovascular_24hours
    + cns_24hours + renal_24hours AS sofa_24hours
FROM worst
WHERE hr >= 0;
