"""Coverage of trusted intervals, counted over many data sets whose truth is known.

A cell is a world, a way of knowing the clinician (true probabilities, or fitted to the same stays
by cross-fitting) and a number of stays. In every data set the verdict is asked as `evaluate` asks
it with its defaults.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from sepsis_jax.ope.coverage_worlds import (
    Cell,
    Drawn,
    Truth,
    cross_fit,
    draw,
    fitted_stays,
    tables,
)
from sepsis_jax.ope.data import Inspected, inspect
from sepsis_jax.ope.diagnostics import Limits, verdict
from sepsis_jax.ope.estimated_clinician import (
    ClinicianFit,
    from_slopes,
    log_excess,
    scores_of,
)
from sepsis_jax.ope.fqe import action_basis, fold_of, linear, tabular
from sepsis_jax.ope.hidden_causes import negative_controls, strengths
from sepsis_jax.ope.intervals import adaptive_t, standard_error

ESTIMATORS = ("wis", "wdr", "dr")


def run(
    cell: Cell,
    first: int,
    count: int,
    true_values: Truth,
    *,
    distances: tuple[float, ...],
    seed: int,
    limits: Limits | None = None,
) -> pd.DataFrame:
    """One row per data set, policy and estimator, with estimates, verdict and truth."""
    drawn = draw(cell, first, count, distances, seed)
    tables = []
    for place in range(count):
        part = drawn.part(slice(place * cell.stays, (place + 1) * cell.stays))
        table = judged(cell, part, seed=first + place, limits=limits)
        tables.append(table.assign(data_set=first + place))
    result = pd.concat(tables, ignore_index=True)
    result["truth"] = result["policy"].map(true_values.policies)
    result["true_difference"] = result["truth"] - true_values.clinician
    return result


def judged(cell: Cell, drawn: Drawn, *, seed: int, limits: Limits | None = None) -> pd.DataFrame:
    """Rows of one data set as `evaluate` gives them with its defaults, computed in NumPy.

    WIS, WDR and DR have influences in closed form; a test compares them with `evaluate`.
    """
    data = drawn.data
    fold = fold_of(jax.random.key(seed), cell.stays, 2)
    stacked = np.stack(list(drawn.probs.values()))
    fitted = _values(cell, drawn, jnp.asarray(stacked), fold)
    clinician = None
    if cell.clinician == "fitted":
        rows = cross_fit(cell, drawn, np.random.default_rng(seed))
        taken = np.take_along_axis(rows, np.asarray(data.action)[..., None], -1)[..., 0]
        alive = np.asarray(data.alive)
        data = replace(
            data,
            behavior_probs=jnp.asarray(rows),
            behavior_prob=jnp.asarray(np.where(alive, taken, 1.0)),
        )
        clinician = ClinicianFit(fitted_stays(cell.stays), shared=True)
    found = inspect(data, drawn.probs)
    order = np.argsort(np.asarray(data.returns()), kind="stable")
    found = found._replace(steps=data.num_steps)
    return _rows(found, order, stacked, fitted, drawn, clinician, limits)


def _values(
    cell: Cell, drawn: Drawn, probs: jax.Array, fold: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """[K, N, T] cross-fitted Q of the action taken and V: tabular, or linear."""
    known = tables(cell)
    if known is not None:
        found = tabular(
            drawn.data, jnp.asarray(drawn.state), probs, fold,
            num_states=len(known.seen.best), gamma=1.0, folds=2,
        )  # fmt: skip
    else:
        basis = jnp.asarray(action_basis(probs.shape[-1]))
        found = linear(drawn.data, probs, basis, fold, gamma=1.0, folds=2)
    return np.asarray(found.q, np.float64), np.asarray(found.v, np.float64)


class _Estimates(NamedTuple):
    """Of K policies by WIS, WDR and DR."""

    value: np.ndarray  # [K, 3]
    influence: np.ndarray  # [N, K, 3]
    slope: np.ndarray  # [3, K, N, T] along the log weights


def _estimates(
    reward: np.ndarray, log_weight: np.ndarray, q: np.ndarray, v: np.ndarray
) -> _Estimates:
    returns, stays = reward.sum(1), len(reward)
    after = np.concatenate([v[..., 1:], np.zeros_like(v[..., :1])], -1)
    difference = reward - q + after  # [K, N, T]
    weight = np.exp(log_weight)
    share = weight / weight.mean(1, keepdims=True)
    last = share[..., -1]
    wis = (last * returns).mean(1)
    wis_influence = last * (returns - wis[:, None])
    by_step = (share * difference).mean(1, keepdims=True)
    wdr_steps = share * (difference - by_step)
    wdr = v[..., 0].mean(1) + by_step[:, 0].sum(-1)
    start = v[..., 0] - v[..., 0].mean(1, keepdims=True)
    each = v[..., 0] + (weight * difference).sum(-1)
    dr = each.mean(1)
    slope = np.zeros((3, *weight.shape))
    slope[0, ..., -1], slope[1], slope[2] = wis_influence, wdr_steps, weight * difference
    influence = np.stack([wis_influence, start + wdr_steps.sum(-1), each - dr[:, None]], -1)
    return _Estimates(np.stack([wis, wdr, dr], -1), np.swapaxes(influence, 0, 1), slope / stays)


def _rows(
    found: Inspected,
    order: np.ndarray,
    probs: np.ndarray,
    fitted: tuple[np.ndarray, np.ndarray],
    drawn: Drawn,
    clinician: ClinicianFit | None,
    limits: Limits | None,
) -> pd.DataFrame:
    stays, assumed = found.stays(order), found.behavior
    assert assumed is not None
    behavior, alive = assumed.of(order), np.asarray(stays.alive)
    probs = probs[:, order]
    action = np.broadcast_to(np.asarray(stays.action)[..., None], (*probs.shape[:-1], 1))
    taken = np.take_along_axis(probs, action, -1)[..., 0]
    step = np.where(alive, np.log(taken) - np.log(np.asarray(stays.behavior_prob)), 0.0)
    log_weight = step.cumsum(-1, dtype=np.float64)
    reward = np.asarray(stays.reward, np.float64)
    inputs = drawn.data.features if clinician is None else drawn.inputs
    features = None if inputs is None else np.asarray(inputs)[order] * alive[..., None]
    scores = None
    if clinician is not None:
        scores = scores_of(found, order, features)
        log_weight -= log_excess(scores, clinician)
    estimates = _estimates(reward, log_weight, *(x[:, order] for x in fitted))
    squares = np.log(np.maximum((probs**2 / behavior).sum(-1), 1e-30))
    expected = len(order) * np.exp(-np.median(np.where(alive, squares, 0.0).sum(-1), 1))
    rare = ((behavior < (limits or Limits()).support) & alive[..., None]) * np.maximum(
        probs - behavior, 0.0
    )
    final = log_weight[..., -1]
    controls = negative_controls(found, order, final, None if features is None else features[:, 0])
    influence, own = estimates.influence, estimates.influence
    if clinician is not None and scores is not None:
        influence = from_slopes(scores, estimates.slope, clinician).of(influence)
    error, own_error = standard_error(influence), standard_error(own)
    returns = reward.sum(1)
    low, high = adaptive_t(estimates.value, influence)
    difference = estimates.value - returns.mean()
    centred = (returns - returns.mean())[:, None, None]
    low_difference, high_difference = adaptive_t(difference, influence - centred)
    mean = np.exp(final).mean(1)
    ess = np.exp(final).sum(1) ** 2 / np.exp(2 * final).sum(1)
    spread = np.sqrt(np.maximum(len(order) / ess - 1, 0.0) / (len(order) - 1))
    table = pd.DataFrame(
        {
            "policy": np.repeat(list(found.policies), len(ESTIMATORS)),
            "estimator": list(ESTIMATORS) * len(mean),
        }
        | {
            name: array.reshape(-1)
            for name, array in (
                ("estimate", estimates.value), ("se", error), ("low", low), ("high", high),
                ("difference", difference), ("difference_low", low_difference),
                ("difference_high", high_difference),
                ("clinician_share", np.clip(1 - (own_error / error) ** 2, 0, 1)),
            )
        }
        | {
            name: np.repeat(array, len(ESTIMATORS))
            for name, array in (
                ("ess", ess), ("expected_ess", expected), ("matched", np.isfinite(final).sum(1)),
                ("largest", np.exp(final).max(1) / np.exp(final).sum(1)), ("mean_ratio", mean),
                ("mean_ratio_z", (mean - 1) / np.maximum(mean * spread, 1e-6)),
                ("unsupported", rare.sum((1, 2, 3)) / alive.sum()), ("clipped", 0.0 * mean),
                ("baseline", controls.baseline),
            )
        }
    ).assign(habit=controls.habit, features=controls.features)  # fmt: skip
    table["confounding"] = strengths(table, returns, final)
    return with_verdicts(table.assign(stays=len(order)), limits)


def with_verdicts(table: pd.DataFrame, limits: Limits | None = None) -> pd.DataFrame:
    """The rows with `reason` and `trust` from their diagnostics, whatever they were before."""
    reasons = [
        verdict(str(row["estimator"]), row, int(row["stays"]), limits=limits)
        for row in table.to_dict("records")
    ]
    return table.assign(reason=reasons, trust=[not reason for reason in reasons])


def score(runs: pd.DataFrame, limits: Limits | None = None) -> pd.DataFrame:
    """Coverage by cell, policy and estimator: of all, of the trusted, and why others are not.

    Verdicts are asked anew of the stored diagnostics, so that limits can be compared.

    Args:
      runs: from `run`, with the columns of the cell.
      limits: where trust ends.
    """
    runs = with_verdicts(runs, limits)
    runs = runs.assign(
        value=runs["truth"].between(runs["low"], runs["high"]),
        less=runs["true_difference"].between(runs["difference_low"], runs["difference_high"]),
        first=runs["reason"].str.replace(r"[\d.e+-]*\d", "x", regex=True).str.split(";").str[0],
    )
    rows = []
    by = ["world", "clinician", "dial", "stays", "policy", "estimator"]
    for setting, group in runs.groupby(by, sort=False):
        trusted = group[group["trust"]]
        against = group.loc[~group["trust"], "first"]
        rows.append(
            dict(zip(by, setting, strict=True))
            | {
                "data_sets": len(group),
                "trusted": len(trusted) / len(group),
                "value": _share(trusted["value"]),
                "difference": _share(trusted["less"]),
                "value_of_all": _share(group["value"]),
                "difference_of_all": _share(group["less"]),
                "ess": float(group["ess"].median()),
                "expected_ess": float(group["expected_ess"].median()),
                "clinician_share": float(group["clinician_share"].median()),
                "confounding_withstood": _median(trusted["confounding"]),
                "against": against.mode().iloc[0] if len(against) else "",
            }
        )
    return pd.DataFrame(rows)


def _share(hits: pd.Series) -> float | None:
    return float(hits.mean()) if len(hits) else None


def _median(values: pd.Series) -> float | None:
    return float(values.median()) if len(values) else None
