"""Diagnostics of estimates: effective sample size, support, mean ratio, a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import ESTIMATORS
from sepsis_jax.ope.weights import Weights


@dataclass(frozen=True)
class Limits:
    """Where trust ends.

    Attributes:
      effective: least effective sample size, in stays.
      effective_share: least effective sample size as a share of all stays.
      largest: largest share of the weight that one stay may hold.
      clipped: largest share of clipped steps.
      unsupported: largest share of the policy's own probability on actions that the clinician
        gives less than `support` of probability.
      support: see above.
      mean_ratio: how many standard errors the mean weight may lie from 1.
      fqe: how far fitted values of the clinician may lie from the mean return, in standard
        deviations of the return.
    """

    effective: float = 30.0
    effective_share: float = 0.05
    largest: float = 0.10
    clipped: float = 0.05
    unsupported: float = 0.10
    support: float = 0.01
    mean_ratio: float = 3.0
    fqe: float = 0.05


class Diagnostics(NamedTuple):
    """Per policy, [K] unless stated."""

    ess: jax.Array  # (sum w)^2 / sum w^2 of the final weights
    ess_step: jax.Array  # [K, T] the same of w_t
    largest: jax.Array  # max w / sum w
    matched: jax.Array  # stays of weight above 0
    mean_ratio: jax.Array  # mean w, 1 in expectation
    mean_ratio_z: jax.Array  # its distance from 1 in standard errors
    clipped: jax.Array  # share of recorded steps clipped
    unsupported: jax.Array  # mean target probability on actions with little behaviour probability


def diagnose(
    data: OPEData,
    target_probs: Float[Array, "K N T A"],
    weights: Weights,
    limits: Limits | None = None,
) -> Diagnostics:
    """Diagnostics of K policies [K, N, T, A].

    Without `data.behavior_probs`, support is judged by the recorded action alone.
    """
    limits = limits or Limits()
    mass = unsupported_mass(data, target_probs, limits.support)
    return summarize(weights.log_weight, weights.clipped_share, mass / data.alive.sum())


def summarize(
    log_weight: Float[Array, "K N T"], clipped: Float[Array, " K"], unsupported: Float[Array, " K"]
) -> Diagnostics:
    """Diagnostics of log weights [K, N, T], with the shares [K] that they do not tell."""
    final, stays = log_weight[..., -1], log_weight.shape[1]
    ess_step = effective_size(log_weight, 1)
    top = logsumexp(final, -1)
    largest = jnp.where(jnp.isneginf(top), 1.0, jnp.exp(final.max(-1) - top))
    log_mean = top - jnp.log(stays)
    relative_variance = jnp.maximum(stays / jnp.maximum(ess_step[:, -1], 1e-30) - 1.0, 0.0)
    mean = jnp.exp(jnp.minimum(log_mean, 80.0))
    error = mean * jnp.sqrt(relative_variance / (stays - 1))
    return Diagnostics(
        ess=ess_step[:, -1],
        ess_step=ess_step,
        largest=largest,
        matched=(~jnp.isneginf(final)).sum(-1),
        mean_ratio=mean,
        mean_ratio_z=(mean - 1.0) / jnp.maximum(error, 1e-6),
        clipped=clipped,
        unsupported=unsupported,
    )


def unsupported_mass(
    data: OPEData, target_probs: Float[Array, "K N T A"], support: float
) -> Float[Array, " K"]:
    """[K] sum over recorded steps of the policy's probability on actions that are rarely given.

    Rare is what the clinician gives less than `support`; without `data.behavior_probs` a step
    counts as a whole if its recorded action is rare.
    """
    if data.behavior_probs is None:
        rare = (data.behavior_prob < support) & data.alive
        return jnp.full(target_probs.shape[:1], rare.sum(), jnp.float32)
    rare = (data.behavior_probs < support) & data.alive[..., None]
    return jnp.einsum(
        "nta,knta->k", rare.astype(jnp.float32), target_probs, precision=jax.lax.Precision.HIGHEST
    )


def effective_size(log_weight: jax.Array, axis: int = -1) -> jax.Array:
    """(sum w)^2 / sum w^2 along an axis (Kong 1992); 0 where all weights are 0."""
    once, twice = logsumexp(log_weight, axis), logsumexp(2 * log_weight, axis)
    return jnp.where(jnp.isneginf(once), 0.0, jnp.exp(2 * once - twice))


def fqe_gap(fitted: float, returns: np.ndarray) -> float:
    """Fitted value of the clinician less the mean return, in standard deviations of the return."""
    spread = float(np.std(returns)) or 1.0
    return float((fitted - np.mean(returns)) / spread)


def verdict(
    estimator: str,
    found: dict[str, float],
    stays: int,
    *,
    fqe_gap: float | None = None,
    limits: Limits | None = None,
) -> str:
    """Why not to trust an estimate; empty if nothing was found.

    Args:
      estimator: its name.
      found: the diagnostics of one policy, as numbers.
      stays: N.
      fqe_gap: from `fqe_gap`, where values were fitted.
      limits: where trust ends.
    """
    limits, entry = limits or Limits(), ESTIMATORS.get(estimator)
    if estimator == "on_policy":
        return ""
    reasons = []
    weighted = entry is None or entry.weighted
    if weighted and found["matched"] == 0:
        reasons.append("no stay followed the policy")
    elif weighted:
        least = max(limits.effective, limits.effective_share * stays)
        if found["ess"] < least:
            reasons.append(f"effective sample size {found['ess']:.1f} < {least:.0f}")
        if found["largest"] > limits.largest:
            reasons.append(f"one stay holds {100 * found['largest']:.0f}% of the weight")
        if found["clipped"] > limits.clipped:
            reasons.append(f"{100 * found['clipped']:.0f}% of steps clipped")
        if abs(found["mean_ratio_z"]) > limits.mean_ratio and found["clipped"] == 0:
            reasons.append(f"mean weight {found['mean_ratio']:.3g}, expected 1")
    if found["unsupported"] > limits.unsupported:
        share = 100 * found["unsupported"]
        reasons.append(f"{share:.0f}% of the policy lies on actions the clinician hardly gives")
    modelled = entry is not None and entry.modelled
    if modelled and fqe_gap is not None and abs(fqe_gap) > limits.fqe:
        reasons.append(f"fitted values miss the clinician's mean return by {fqe_gap:+.2f} SD")
    return "; ".join(reasons)
