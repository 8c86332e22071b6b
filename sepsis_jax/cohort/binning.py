"""Measurements, urine and doses per step, the filling of gaps, and the levels of doses."""

from __future__ import annotations

from dataclasses import asdict
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from sepsis_jax.cohort.workspace import Workspace
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.clinical import sofa
from worldmodel.imputation import impute, training_medians

# Typical values of ICU patients, for features that no training stay records.
TYPICAL = np.array(
    [
        88, 117, 62, 78, 20, 97, 37, 40, 3, 3, 5, 2.9, 30, 40, 0, 23, 0.7, 23, 1.12, 8.3, 104, 1.1,
        130, 10, 30.5, 1.3, 1.5, 2.1, 41, 95, 7.38, 190, 4.1, 14, 33, 139, 25, 10, 100,
    ]
)  # fmt: skip
_CHUNK = 4096  # stays imputed at a time, which bounds the float64 copies


def bin_measurements(work: Workspace) -> tuple[np.ndarray, JsonDict]:
    """Mean of each feature for each row (parts of the Glasgow Coma Scale rounded).

    Values outside the schema's physiologic range, of an unknown unit or without a number are left
    out; a result below or above a limit counts as the limit.

    Returns:
      [N, past + T, 39] float32 in physical units, NaN where nothing was recorded (urine is NaN
      throughout), `options.past_steps` of them before the first row; and counts per feature of
      the values left out, by problem, and of those at a limit.
    """
    if work.options.gcs_intubated == "raw":
        work.execute(
            "CREATE VIEW gcs_parts AS SELECT stay_id, charttime, CASE itemid "
            "WHEN getvariable('gcs_eyes') THEN 'gcs_eye' WHEN getvariable('gcs_verbal') "
            "THEN 'gcs_verbal' ELSE 'gcs_motor' END AS part, valuenum AS value FROM chart "
            "WHERE itemid IN (getvariable('gcs_eyes'), getvariable('gcs_verbal'), "
            "getvariable('gcs_motor'))"
        )
    else:
        full = {"gcs_eye": ("gcs_eyes", 4), "gcs_verbal": ("gcs_verbal", 5), "gcs_motor":
                ("gcs_motor", 6)}  # fmt: skip
        work.execute(
            "CREATE VIEW gcs_parts AS "
            + " UNION ALL ".join(
                f"SELECT stay_id, charttime, '{part}' AS part, "
                f"CASE WHEN gcs_verbal = 0 THEN {best} ELSE {column} END AS value FROM gcs"
                for part, (column, best) in full.items()
            )
        )
    work.run("observations")
    problems: dict[str, dict[str, int]] = {}
    for problem, feature, count in work.rows(
        "SELECT problem, feature, count(*) FROM observations WHERE problem IS NOT NULL "
        "GROUP BY ALL ORDER BY ALL"
    ):
        problems.setdefault(problem, {})[schema.FEATURE_NAMES[feature]] = count
    limits = {
        schema.FEATURE_NAMES[feature]: count
        for feature, count in work.rows(
            "SELECT feature, count(*) FROM observations WHERE problem IS NULL AND censored "
            "GROUP BY feature ORDER BY feature"
        )
    }
    past = work.options.past_steps
    values = np.pad(
        empty_steps(work, schema.NUM_FEATURES), ((0, 0), (past, 0), (0, 0)), constant_values=np.nan
    )
    found = work.execute(
        "SELECT row, step, feature, CAST(avg(value) AS FLOAT) AS value FROM observations "
        "WHERE problem IS NULL GROUP BY row, step, feature"
    ).fetchnumpy()
    values[found["row"], found["step"] + past, found["feature"]] = found["value"]
    integer = [feature.integer for feature in schema.FEATURES]
    values[..., integer] = np.round(values[..., integer])
    return values, {"values_left_out": problems, "values_at_a_limit": limits}


def bin_urine(work: Workspace) -> tuple[np.ndarray, JsonDict]:
    """Urine volume for each row.

    A single record above `max_urine_ml` is left out; a step with more irrigant in than urine out
    is set to 0 mL, a step above the schema's upper limit to that limit.

    Returns:
      [N, T] mL per step (NaN without record), and the counts.
    """
    cap = work.options.max_urine_ml
    work.execute(
        "CREATE TABLE usable_urine AS SELECT stay_id, charttime, sum(CASE WHEN itemid = "
        "getvariable('irrigant_in') THEN -abs(value) ELSE value END) AS urineoutput "
        f"FROM urine_rows WHERE abs(value) <= {cap} GROUP BY stay_id, charttime"
    )
    too_large = work.scalar(
        "SELECT count(*) FROM urine_rows INNER JOIN cohort AS c USING (stay_id) "
        f"WHERE abs(value) > {cap} AND charttime BETWEEN c.intime AND c.endtime"
    )
    work.run("steps")
    own = empty_steps(work)
    found = work.execute("SELECT * FROM urine_steps").fetchnumpy()
    own[found["row"], found["step"]] = found["volume"]
    limit = float(schema.HIGH[schema.URINE])
    counts = {
        "urine records above the cap": int(too_large),
        "steps with negative urine set to 0 mL": int((own < 0).sum()),
        f"steps above {limit:g} mL set to the limit": int((own > limit).sum()),
    }
    return np.clip(own, 0, limit), counts


def bin_ventilation(work: Workspace) -> np.ndarray:
    """[N, T] bool, invasive ventilation, for each row."""
    ventilated = np.zeros(empty_steps(work).shape, np.bool_)
    found = work.execute("SELECT * FROM ventilated_steps").fetchnumpy()
    ventilated[found["row"], found["step"]] = True
    return ventilated


def bin_sofa(work: Workspace) -> np.ndarray:
    """[N, T] mimic-code's SOFA for each row.

    A row without a SOFA hour takes the last one before it; else, where a row holds its own step,
    the first one after it; else 0.
    """
    column = "rolling" if work.options.sofa == "rolling-24h" else "within"
    sofa = empty_steps(work)
    found = work.execute(f"SELECT row, step, {column} AS sofa FROM sofa_steps").fetchnumpy()
    sofa[found["row"], found["step"]] = found["sofa"]
    return _carry(sofa, backwards=not work.options.lead_steps)


def empty_steps(work: Workspace, *shape: int) -> np.ndarray:
    """NaN of shape [N, T, *shape], float32."""
    stays, steps = work.rows("SELECT count(*), max(steps) FROM cohort")[0]
    return np.full((stays, steps, *shape), np.nan, np.float32)


def _carry(values: np.ndarray, *, backwards: bool) -> np.ndarray:
    step = np.arange(values.shape[1])
    known = np.isfinite(values)
    last = np.maximum.accumulate(np.where(known, step, -1), axis=1)
    first = np.argmax(known, axis=1)[:, None]
    carried = np.take_along_axis(values, np.where(last >= 0, last, first), axis=1)
    filled: np.ndarray = np.nan_to_num(np.where((last >= 0) | backwards, carried, np.nan))
    return filled


class FillRules(Protocol):
    """Options of how gaps are filled; `CohortOptions` describes them."""

    @property
    def step_hours(self) -> float:
        """Length of a step in hours."""

    @property
    def missing_urine(self) -> str:
        """What a step without a record of urine is: "zero" mL, or left to "impute"."""

    @property
    def carry_forever(self) -> bool:
        """Whether values are held without time limit."""


def fill_rows(
    values: Float[np.ndarray, "N T 39"],
    length: Int[np.ndarray, " N"],
    train: Bool[np.ndarray, " N"],
    rules: FillRules,
    *,
    past: int = 0,
    lead: int = 1,
) -> tuple[Float[np.ndarray, "N S 39"], Float[np.ndarray, "N S"], dict[str, int]]:
    """Fills gaps: urine as the rules say, the rest by hold times and training medians.

    Args:
      values: [N, past + T, 39] physical units, NaN where nothing was recorded; urine is changed.
      length: [N] steps per stay, without `past`.
      train: [N] stays whose medians are taken; features that they lack get typical values.
      rules: how gaps are filled.
      past: rows before the first one of a stay, whose values may be held.
      lead: first rows that keep missing urine missing, since what was before is not known.

    Returns:
      Filled values [N, T, 39], urine of the last 24 h [N, T] in mL, and the numbers of entries
      that were measured, held and filled.
    """
    if rules.missing_urine == "zero":
        # Before ICU admission hardly any urine is charted, which does not mean that there is none.
        urine = values[:, past + lead :, schema.URINE]
        steps = np.arange(lead, values.shape[1] - past)
        urine[np.isnan(urine) & (steps < length[:, None])] = 0
    typical = TYPICAL.copy()
    typical[schema.URINE] *= rules.step_hours / schema.STEP_HOURS
    medians = training_medians(values, train, typical)
    parts, totals = [], {"measured": 0, "held": 0, "filled": 0}
    for start in range(0, len(values), _CHUNK):
        part, counts = impute(
            values[start : start + _CHUNK],
            length[start : start + _CHUNK],
            medians,
            step_hours=rules.step_hours,
            carry_forever=rules.carry_forever,
            past=past,
        )
        parts.append(part)
        for name, count in asdict(counts).items():
            totals[name] += count
    filled = np.concatenate(parts)
    urine_24h = sofa.urine_24h(jnp.asarray(filled[..., schema.URINE]), step_hours=rules.step_hours)
    return filled, np.asarray(urine_24h), totals


def score_rows(
    dynamic: Float[np.ndarray, "N T 39"],
    ventilated: Bool[np.ndarray, "N T"],
    vasopressor: Float[np.ndarray, "N T"],
    urine_24h: Float[np.ndarray, "N T"],
    *,
    lead: int = 1,
) -> Float[np.ndarray, "N T"]:
    """SOFA of each row with the vasopressor of the step before.

    Args:
      dynamic: [N, T, 39] physical units.
      ventilated: [N, T] bool.
      vasopressor: [N, T] norepinephrine equivalents of each step, mcg/kg/min.
      urine_24h: [N, T] mL.
      lead: 1; or 0 for the vasopressor of the row's own step.

    Returns:
      [N, T] points, 0 to 24.
    """
    given = np.pad(vasopressor, ((0, 0), (lead, 0)))[:, : vasopressor.shape[1]]
    score = sofa.standard(
        jnp.asarray(dynamic),
        ventilated=jnp.asarray(ventilated),
        vasopressor_dose=jnp.asarray(given),
        urine_24h=jnp.asarray(urine_24h),
    )
    return np.asarray(score.total)


QUARTILES = (0.25, 0.5, 0.75)


class GivenEdges(Protocol):
    """Options with edges of dose levels, or None for edges that are fitted."""

    @property
    def vasopressor_edges(self) -> tuple[float, ...] | None:
        """Upper edges of levels 1 to 3, mcg/kg/min."""

    @property
    def fluid_edges(self) -> tuple[float, ...] | None:
        """Upper edges of levels 1 to 3, mL per step."""


def bin_doses(work: Workspace) -> tuple[np.ndarray, np.ndarray]:
    """Doses of each step.

    Returns:
      [N, T] norepinephrine equivalents, mcg/kg/min, and [N, T] tonicity-corrected mL per step;
      0 where nothing was given.
    """
    work.run("treatments")
    vasopressor, fluid = empty_steps(work), empty_steps(work)
    column = "largest" if work.options.vasopressor_dose == "max" else "weighted"
    found = work.execute(f"SELECT row, step, {column} AS dose FROM vasopressor_steps").fetchnumpy()
    vasopressor[found["row"], found["step"]] = found["dose"]
    found = work.execute("SELECT row, step, volume FROM fluid_steps").fetchnumpy()
    fluid[found["row"], found["step"]] = found["volume"]
    return np.nan_to_num(vasopressor), np.nan_to_num(fluid)


def fit_dose_edges(
    vasopressor: np.ndarray, fluid: np.ndarray, train: np.ndarray, options: GivenEdges
) -> tuple[schema.DoseEdges, list[str]]:
    """Quartiles of the training stays' non-zero doses, unless the options give the edges.

    Args:
      vasopressor, fluid: [N, T] doses.
      train: [N] bool.
      options: with `vasopressor_edges` and `fluid_edges`, or None.

    Returns:
      The edges, and the names of the drugs whose edges are the published defaults because the
      training stays never received them.
    """
    defaulted = []

    def edges(name: str, dose: np.ndarray) -> tuple[float, float, float]:
        wanted = getattr(options, f"{name}_edges")
        if wanted is not None:
            # Episodes hold doses in float32: a dose at an edge must not come out above it.
            first, second, third = (max(edge, float(np.float32(edge))) for edge in wanted)
            return first, second, third
        given = dose[train]
        given = given[given > 0]
        if not given.size:
            defaulted.append(name)
            default: tuple[float, float, float] = getattr(schema.DEFAULT_DOSE_EDGES, name)
            return default
        first, second, third = (float(edge) for edge in np.quantile(given, QUARTILES))
        return first, second, third

    fitted = schema.DoseEdges(
        vasopressor=edges("vasopressor", vasopressor), fluid=edges("fluid", fluid)
    )
    return fitted, defaulted


def edges_between(
    dose: Float[np.ndarray, "N T"],
    level: Int[np.ndarray, "N T"],
    default: tuple[float, float, float],
) -> tuple[float, float, float]:
    """Edges that fit levels whose edges are not known: the largest dose up to each level.

    Args:
      dose: [N, T] doses.
      level: [N, T] levels 0 to 4, which rise with the dose.
      default: edges where nothing was given.
    """
    given = dose[dose > 0]
    if not given.size:
        return default
    below = float(given.min()) / 2  # of levels that nobody received
    first, second, third = (float(dose[level <= k].max(initial=below)) for k in (1, 2, 3))
    return first, second, third
