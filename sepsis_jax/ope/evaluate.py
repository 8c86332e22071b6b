"""`evaluate`: policies x estimators to one table with intervals, differences and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float

from sepsis_jax.ope.data import InputPolicy, Inspected, OPEData, inspect
from sepsis_jax.ope.diagnostics import Diagnostics, Limits, fqe_gap, verdict
from sepsis_jax.ope.estimated_clinician import (
    ClinicianFit,
    correct,
    log_excess,
    scores_of,
)
from sepsis_jax.ope.estimation import estimate_all, prepare, with_bounds
from sepsis_jax.ope.estimators import (
    ESTIMATORS,
    Batch,
    Shrinkage,
    check_names,
)
from sepsis_jax.ope.fitted import Fitted, with_magic
from sepsis_jax.ope.hidden_causes import Controls, conclusions, negative_controls, strengths
from sepsis_jax.ope.weights import Clip
from worldmodel.errors import InputError

TAIL_LEVELS = (0.1, 0.25)


def evaluate(
    data: OPEData,
    target_probs: Mapping[str, jax.Array | np.ndarray],
    *,
    key: jax.Array,
    estimators: Sequence[str] | None = None,
    gamma: float = 1.0,
    n_bootstrap: int = 2000,
    interval: str = "adaptive_t",
    alpha: float = 0.05,
    fitted: Fitted | None = None,
    clip: Clip | None = None,
    shrinkage: Shrinkage | None = None,
    tail_levels: Sequence[float] = TAIL_LEVELS,
    return_range: tuple[float, float] | None = None,
    input_policy: InputPolicy | None = None,
    limits: Limits | None = None,
    treated: Mapping[str, int] | None = None,
    clinician: ClinicianFit | None = None,
) -> pd.DataFrame:
    """Estimates of the value of policies, each with an interval and a verdict.

    Args:
      data: recorded stays.
      target_probs: [N, T, A] action probabilities by policy.
      key: of the resamples; consumed.
      estimators: names from `sepsis_jax.ope.ESTIMATORS`; default all whose ingredients are there.
      gamma: discount per step.
      n_bootstrap: resamples; all estimators, policies and differences share them. 0 for none.
      interval: "adaptive_t", "percentile", "bca", "delta" or "t".
      alpha: 1 - level of the intervals.
      fitted: values, values of least variance, marginal ratios from `sepsis_jax.ope.fit`; policies
        in the order of `target_probs`.
      clip: bounds of ratios; none by default.
      shrinkage: tuning of "switch", "dr_os", "dr_sg".
      tail_levels: shares of worst stays for the CVaR, and levels for quantiles of the return, from
        self-normalised weights; empty for neither.
      return_range: bounds that no return can leave. Adds `hcope_low`, a one-sided bound of the
        value from the IS weights, and, where `clip` bounds the weights, the empirical Bernstein
        interval of (clipped) IS; both on the rows of "is".
      input_policy: what to do about flawed input.
      limits: where trust ends.
      treated: counts of `check`, where it treated the data before, to be reported with the own.
      clinician: how the clinician's probabilities were estimated; None where they are known.
        Weights are then freed of the mean error of that estimate, and intervals contain its
        spread (`ope.estimated_clinician`), which needs `data.features` and `data.behavior_probs`.

    Returns:
      One row per policy and estimator: estimate, standard error (delta method), interval;
      `clinician_share`, the share of the variance that comes from estimating the clinician;
      difference from the clinician's mean return with its interval from the same stays;
      `conclusion` and the strength of unrecorded `confounding` (Gamma) at which it falls;
      diagnostics of the weights; `trust` and the `reason` against it. Trust is never more than up
      to that strength. `attrs` holds counts of what was treated and [K, T] effective sample sizes.

    Raises:
      InputError: flawed input, an unknown name, or a missing ingredient.
    """
    if not target_probs:
        raise InputError("target_probs: no policy given")
    if not 0 < alpha < 1 or not 0 < gamma <= 1 or n_bootstrap < 0:
        raise InputError(
            f"alpha, gamma, n_bootstrap: got {alpha}, {gamma}, {n_bootstrap}; expected within "
            "(0, 1), (0, 1] and at least 0"
        )
    if any(not 0 < level <= 1 for level in tail_levels):
        raise InputError(f"tail_levels: got {tuple(tail_levels)}, expected shares in (0, 1]")
    earlier = treated or {}
    found = inspect(data, target_probs, input_policy)
    if fitted is not None and found.counts["stays_dropped"]:
        raise InputError("fitted: stays were dropped; fit on the data that `check` returns")
    order = _order(found.stays(found.kept))
    index = found.kept[order]
    features = _features(data, found, index)
    scores = excess = None
    if clinician is not None:
        scores = scores_of(found, index, features)
        excess = log_excess(scores, clinician)
    batch, diagnostics = prepare(
        found, index, gamma=gamma, clip=clip, shrinkage=shrinkage, limits=limits, log_excess=excess
    )
    stays, names = len(order), list(target_probs)
    if fitted is not None:
        batch = fitted.select(order, found.steps).into(batch)
    chosen = _choose(estimators, batch)
    if "magic" in chosen:
        batch = with_magic(batch)
    results = estimate_all(
        key, batch, chosen, n_bootstrap=n_bootstrap, interval=interval, alpha=alpha,
        tail_levels=tail_levels,
        correct=None if scores is None or clinician is None else partial(
            correct, scores, batch, clinician
        ),
    )  # fmt: skip
    gap = None
    if fitted is not None and fitted.clinician_value is not None:
        gap = fqe_gap(fitted.clinician_value, np.asarray(batch.returns))
    log_weight = np.asarray(batch.log_weight[..., -1])
    controls = negative_controls(
        found, index, log_weight, None if features is None else features[:, 0]
    )
    table = _joined(names, results, diagnostics, controls, stays)
    table["conclusion"] = conclusions(table)
    table["confounding"] = strengths(table, np.asarray(batch.returns), log_weight)
    _judge(table, stays, gap, limits)
    if return_range is not None:
        table = with_bounds(table, batch, key, return_range, clip or Clip(), alpha)
    table.attrs = {
        "stays": stays,
        "stays_given": data.num_stays + earlier.get("stays_dropped", 0),
        "treated": {name: count + earlier.get(name, 0) for name, count in found.counts.items()},
        "gamma": gamma,
        "interval": interval,
        "level": 1 - alpha,
        "n_bootstrap": n_bootstrap,
        "fqe_gap": gap,
        "ess_step": {
            name: np.asarray(diagnostics.ess_step[k]).tolist() for k, name in enumerate(names)
        },
    }
    return table


def _order(data: OPEData) -> np.ndarray:
    """Stays by return, then length, then behaviour: results do not depend on the given order."""
    behavior = np.log(np.maximum(np.asarray(data.behavior_prob), 1e-37)).sum(1)
    return np.lexsort((behavior, np.asarray(data.length), np.asarray(data.returns())))


def _choose(estimators: Sequence[str] | None, batch: Batch) -> tuple[str, ...]:
    if estimators is not None:
        without_magic = [name for name in estimators if name != "magic"]
        check_names(without_magic, batch)
        if "magic" in estimators:
            check_names(("wdr",), batch)
        return tuple(dict.fromkeys(estimators))
    available = {
        field
        for field in ("values", "mrdr_values", "drug_log_weight", "marginal")
        if getattr(batch, field) is not None
    }
    if "values" in available:
        available.add("magic")
    return tuple(name for name, entry in ESTIMATORS.items() if set(entry.needs) <= available)


def _features(
    data: OPEData, found: Inspected, index: np.ndarray
) -> Float[np.ndarray, "N T D"] | None:
    """Features of the stays in order, 0 after the end; None without."""
    if data.features is None:
        return None
    alive = np.asarray(found.stays(index).alive)
    features = np.asarray(data.features)[index, : found.steps]
    return np.where(alive[..., None], features, 0.0).astype(np.float32)


def _joined(
    names: Sequence[str],
    results: pd.DataFrame,
    found: Diagnostics,
    controls: Controls,
    stays: int,
) -> pd.DataFrame:
    """Estimates with the diagnostics of their policy."""
    per_policy = pd.DataFrame(
        {field: np.asarray(getattr(found, field)) for field in found._fields if field != "ess_step"}
    )
    per_policy.insert(1, "ess_share", per_policy["ess"] / stays)
    per_policy = per_policy.assign(**controls._asdict())
    table = results.join(per_policy, on="k")
    table.insert(0, "policy", [names[k] for k in table.pop("k")])
    return table


def _judge(table: pd.DataFrame, stays: int, gap: float | None, limits: Limits | None) -> None:
    """Adds `trust` and `reason`."""
    reasons = [
        verdict(str(row["estimator"]), row, stays, fqe_gap=gap, limits=limits)
        for row in table.to_dict("records")
    ]
    unsettled = table["undefined"].to_numpy() > 0.01
    reasons = [
        reason + ("; " if reason and bad else "") + ("undefined in some resamples" if bad else "")
        for reason, bad in zip(reasons, unsettled, strict=True)
    ]
    table["trust"] = [not reason for reason in reasons]
    table["reason"] = reasons
