-- Piecewise constant rates: a new segment at every start or end of a vasoactive infusion. Where
-- one drug runs twice at a time, the higher rate counts.
CREATE TABLE vasoactive AS
WITH moments AS (
    SELECT stay_id, starttime AS moment FROM vasoactive_rows
    UNION
    SELECT stay_id, endtime FROM vasoactive_rows
),

segments AS (
    SELECT
        stay_id,
        moment AS starttime,
        lead(moment) OVER (PARTITION BY stay_id ORDER BY moment) AS endtime
    FROM moments
),

rates AS (
    SELECT s.stay_id, s.starttime, s.endtime, r.drug, max(r.dose_rate) AS rate
    FROM segments AS s
    INNER JOIN vasoactive_rows AS r
        ON s.stay_id = r.stay_id AND s.starttime >= r.starttime AND s.endtime <= r.endtime
    GROUP BY s.stay_id, s.starttime, s.endtime, r.drug
)

SELECT
    s.stay_id,
    s.starttime,
    s.endtime,
    max(r.rate) FILTER (WHERE r.drug = 'norepinephrine') AS norepinephrine,
    max(r.rate) FILTER (WHERE r.drug = 'epinephrine') AS epinephrine,
    max(r.rate) FILTER (WHERE r.drug = 'phenylephrine') AS phenylephrine,
    max(r.rate) FILTER (WHERE r.drug = 'dopamine') AS dopamine,
    max(r.rate) FILTER (WHERE r.drug = 'vasopressin') AS vasopressin,
    max(r.rate) FILTER (WHERE r.drug = 'angiotensin') AS angiotensin,
    max(r.rate) FILTER (WHERE r.drug = 'dobutamine') AS dobutamine,
    max(r.rate) FILTER (WHERE r.drug = 'milrinone') AS milrinone,
    sum(r.rate * f.factor) AS norepinephrine_equivalent
FROM segments AS s
LEFT JOIN rates AS r
    ON s.stay_id = r.stay_id AND s.starttime = r.starttime AND s.endtime = r.endtime
LEFT JOIN ne_factors AS f ON r.drug = f.drug
WHERE s.endtime IS NOT NULL
GROUP BY s.stay_id, s.starttime, s.endtime;
