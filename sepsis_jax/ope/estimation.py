"""Point values, intervals and paired differences of all estimators of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float

from sepsis_jax.ope import bootstrap, intervals
from sepsis_jax.ope.data import BLOCK, Inspected, OPEData
from sepsis_jax.ope.diagnostics import (
    Diagnostics,
    Limits,
    log_expected_square,
    summarize,
    unsupported_mass,
)
from sepsis_jax.ope.estimated_clinician import Correction, is_clinician
from sepsis_jax.ope.estimators import Batch, Shrinkage, evaluate_means, make_batch
from sepsis_jax.ope.weights import Clip, drug_weights, linear, weigh
from worldmodel import schema
from worldmodel.resources import in_blocks

_JACKKNIFE_LIMIT = 20_000  # stays; above, BCa takes the influences for the jackknife


def estimate_all(
    key: jax.Array,
    batch: Batch,
    names: tuple[str, ...],
    *,
    n_bootstrap: int,
    interval: str,
    alpha: float,
    tail_levels: Sequence[float],
    correct: Callable[[tuple[str, ...]], Correction] | None = None,
) -> pd.DataFrame:
    """One row per policy (column `k`) and estimator, with interval and difference.

    Args:
      key: of the resamples; consumed.
      batch: stays sorted by return.
      names: estimators.
      n_bootstrap: resamples.
      interval: a name of `intervals.METHODS`.
      alpha: 1 - level.
      tail_levels: of the quantiles and CVaR that are added as rows.
      correct: what an estimated clinician adds to the errors of named estimators.
    """
    used = tuple(dict.fromkeys(("on_policy", *names)))  # for the differences
    table, point, gradients, widths = _analyse(batch, used)
    values, influence = np.asarray(point), np.asarray(gradients)
    extra: np.ndarray | float = 0.0
    own_error = intervals.standard_error(influence)
    if correct is not None:
        added = correct(used)
        influence, extra = added.of(influence), added.variance
    base = used.index("on_policy")
    resampled = tails = None
    tail = bootstrap.make_tail(batch, tail_levels) if tail_levels else None
    if n_bootstrap:
        resampled, tails = bootstrap.resample(
            key, batch, table, widths, used, resamples=n_bootstrap, tail=tail
        )

    def left_out() -> np.ndarray:
        if len(table) > _JACKKNIFE_LIMIT:
            return values - influence / (len(table) - 1)
        return np.asarray(_leave_one_out(batch, table, tuple(widths.items()), used))

    cache: list[np.ndarray] = []

    def cached() -> np.ndarray:
        if not cache:
            cache.append(left_out())
        return cache[0]

    make = partial(intervals.make, interval, alpha=alpha, extra=extra)
    low, high = make(estimate=values, resampled=resampled, influence=influence, left_out=cached)
    against = values - values[:, base : base + 1]
    paired = None if resampled is None else resampled - resampled[..., base : base + 1]
    low_difference, high_difference = make(
        estimate=against,
        resampled=paired,
        influence=influence - influence[..., base : base + 1],
        left_out=lambda: cached() - cached()[..., base : base + 1],
    )
    error = np.sqrt(intervals.standard_error(influence) ** 2 + extra)
    undefined = np.zeros(values.shape) if resampled is None else ~np.isfinite(resampled)
    result = {
        "estimate": values,
        "se": error,
        "clinician_share": np.clip(1 - (own_error / np.where(error > 0, error, 1.0)) ** 2, 0, 1),
        "low": low,
        "high": high,
        "difference": against,
        "difference_low": low_difference,
        "difference_high": high_difference,
        "undefined": undefined.mean(0) if resampled is not None else undefined,
    }
    kept = [used.index(name) for name in names]
    result = {name: array[:, kept] for name, array in result.items()}
    labels = list(names)
    if tail is not None:
        more, more_labels = _tails(batch, tail, tails, interval, alpha)
        result = {name: np.concatenate([result[name], more[name]], 1) for name in result}
        labels += more_labels
    return pd.DataFrame(
        {"k": np.repeat(np.arange(len(values)), len(labels)), "estimator": labels * len(values)}
        | {name: array.reshape(-1) for name, array in result.items()}
    )


@partial(jax.jit, static_argnames=("names",))
def _analyse_arrays(
    batch: Batch, *, names: tuple[str, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    table, widths = bootstrap.join(batch, names)
    means = table.mean(0).reshape(batch.log_weight.shape[0], -1)
    values = evaluate_means(bootstrap.split(means, widths), batch, names)
    return table, values, bootstrap.influence(batch, table, widths, names)


def _analyse(
    batch: Batch, names: tuple[str, ...]
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, int]]:
    shapes = jax.eval_shape(partial(bootstrap.block_shapes, names=names), batch)
    widths = {block: shape.shape[-1] for block, shape in shapes.items()}
    return *_analyse_arrays(batch, names=names), widths


@partial(jax.jit, static_argnames=("widths", "names"))
def _leave_one_out(
    batch: Batch, table: jax.Array, widths: tuple[tuple[str, int], ...], names: tuple[str, ...]
) -> jax.Array:
    return bootstrap.leave_one_out(batch, table, dict(widths), names)


def _tails(
    batch: Batch,
    tail: bootstrap.Tail,
    resampled: tuple[np.ndarray, np.ndarray] | None,
    interval: str,
    alpha: float,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Distributional rows; their intervals are percentile ones whatever is asked of the others."""
    ones = jnp.ones((1, batch.reward.shape[0]))
    point = _tail(tail.returns, tail.weights, ones, tail.levels)
    both = np.concatenate(point, -1)[0]  # [K + 1, 2 L]
    estimate, difference = both[:-1], both[:-1] - both[-1:]
    low = high = low_difference = high_difference = se = np.full(estimate.shape, np.nan)
    undefined = np.zeros(estimate.shape)
    if resampled is not None:
        drawn = np.concatenate(resampled, -1)
        low, high = intervals.percentile(drawn[:, :-1], alpha)
        low_difference, high_difference = intervals.percentile(drawn[:, :-1] - drawn[:, -1:], alpha)
        undefined = (~np.isfinite(drawn[:, :-1])).mean(0)
        se = drawn[:, :-1].std(0)
    labels = [f"quantile_{level:g}" for level in tail.levels]
    labels += [f"cvar_{level:g}" for level in tail.levels]
    return {
        "estimate": estimate,
        "se": se,
        "clinician_share": np.full(estimate.shape, np.nan),
        "low": low,
        "high": high,
        "difference": difference,
        "difference_low": low_difference,
        "difference_high": high_difference,
        "undefined": undefined,
    }, labels


_tail = jax.jit(bootstrap.tail_statistics, static_argnames=("levels",))


def with_bounds(
    table: pd.DataFrame,
    batch: Batch,
    key: jax.Array,
    return_range: tuple[float, float],
    clip: Clip,
    alpha: float,
) -> pd.DataFrame:
    """The table with finite-sample bounds from the IS terms of each policy."""
    weights = np.asarray(linear(batch.log_weight[..., -1]))
    returns, least, most = np.asarray(batch.returns), *return_range
    for column in ("hcope_low", "bernstein_low", "bernstein_high"):
        table[column] = np.nan
    rng = bootstrap.generator(jax.random.fold_in(key, 1))
    for k, policy in enumerate(dict.fromkeys(table["policy"])):
        row = (table["policy"] == policy) & (table["estimator"] == "is")
        table.loc[row, "hcope_low"] = intervals.hcope_lower(weights[k], returns, least, rng, alpha)
        top = clip.cumulative[1]
        if np.isfinite(top):
            low, high = min(0.0, top * least), max(0.0, top * most)
            bounds = intervals.empirical_bernstein(weights[k] * returns, low, high, alpha)
            table.loc[row, ["bernstein_low", "bernstein_high"]] = bounds
    return table


class _Stay(NamedTuple):
    """What is kept of the probabilities of one stay."""

    log_weight: jax.Array  # [K, T]
    drug_log_weight: jax.Array | None  # [K, 2, T]
    clipped: jax.Array  # [K] recorded steps whose ratio or weight was clipped
    unsupported: jax.Array  # [K] as `unsupported_mass`
    log_square: jax.Array | None  # [K] as `log_expected_square`


def prepare(
    found: Inspected,
    index: np.ndarray,
    *,
    gamma: float = 1.0,
    clip: Clip | None = None,
    shrinkage: Shrinkage | None = None,
    limits: Limits | None = None,
    log_excess: Float[np.ndarray, "N T"] | None = None,
) -> tuple[Batch, Diagnostics]:
    """Weights of all policies and their diagnostics.

    Args:
      found: inspected input.
      index: [N] numbers of the stays, in the order that is wanted.
      gamma: discount.
      clip: bounds of ratios.
      shrinkage: tuning that the batch carries.
      limits: of support.
      log_excess: [N, T] what is subtracted from the log weights of policies other than the
        clinician, from `sepsis_jax.ope.estimated_clinician`; nothing by default.

    Returns:
      A batch without fitted ingredients.
    """
    support = (limits or Limits()).support

    def of_block(rows: np.ndarray) -> _Stay:
        chosen = index[rows]
        tables = [table.of(chosen, found.steps) for table in found.policies.values()]
        behavior = None if found.behavior is None else found.behavior.of(chosen, found.steps)
        data = found.stays(chosen).replace(behavior_probs=behavior)  # type: ignore[attr-defined]
        part: _Stay = _of_stays(data, np.stack(tables, 1), clip=clip, support=support)
        return part

    parts: _Stay = in_blocks(of_block, len(index), min(BLOCK, len(index)))
    if log_excess is not None:
        errs = ~is_clinician(np.moveaxis(np.asarray(parts.log_weight), 1, 0))
        less = np.asarray(log_excess, np.float32)[:, None] * errs[:, None]
        parts = parts._replace(log_weight=parts.log_weight - less)
    data = jax.tree.map(jnp.asarray, found.stays(index))
    found_batch: tuple[Batch, Diagnostics] = _gather(data, parts, gamma=gamma, shrinkage=shrinkage)
    return found_batch


@partial(jax.jit, static_argnames=("clip", "support"))
def _of_stays(data: OPEData, probs: jax.Array, *, clip: Clip | None, support: float) -> _Stay:
    """[n, ...] of n stays with probabilities [n, K, T, A]."""

    def of_stay(stay: OPEData, target: jax.Array) -> _Stay:
        one, target = jax.tree.map(lambda leaf: leaf[None], stay), target[:, None]
        weights = weigh(one, target, clip)
        drugs = None
        if one.behavior_probs is not None and target.shape[-1] == schema.NUM_ACTIONS:
            drugs = drug_weights(one, target, clip)[:, :, 0]
        return _Stay(
            log_weight=weights.log_weight[:, 0],
            drug_log_weight=drugs,
            clipped=weights.clipped_share * stay.alive.sum(),
            unsupported=unsupported_mass(one, target, support),
            log_square=log_expected_square(one, target),
        )

    return jax.vmap(of_stay)(data, probs)


@partial(jax.jit, static_argnames=("gamma", "shrinkage"))
def _gather(
    data: OPEData, parts: _Stay, *, gamma: float, shrinkage: Shrinkage | None
) -> tuple[Batch, Diagnostics]:
    log_weight = jnp.moveaxis(parts.log_weight, 0, 1)
    drugs = parts.drug_log_weight
    batch = make_batch(
        data, log_weight, gamma=gamma, shrinkage=shrinkage,
        drug_log_weight=None if drugs is None else jnp.moveaxis(drugs, 0, 2),
    )  # fmt: skip
    steps = data.alive.sum()
    shares = parts.clipped.sum(0) / steps, parts.unsupported.sum(0) / steps
    return batch, summarize(log_weight, *shares, parts.log_square)
