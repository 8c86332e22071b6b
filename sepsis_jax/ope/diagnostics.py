"""Diagnostics of estimates: effective sample size, support, mean ratio, a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float
from scipy.stats import norm

from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import ESTIMATORS
from sepsis_jax.ope.weights import Weights


@dataclass(frozen=True)
class Limits:
    """Where trust ends.

    Attributes:
      effective: least effective sample size, in stays, of the weights and as expected from the
        probabilities (`expected_ess`).
      effective_share: least effective sample size as a share of all stays.
      largest: largest share of the weight that one stay may hold.
      clipped: largest share of clipped steps.
      unsupported: largest share of probability that the policy has beyond the clinician on actions
        that the clinician gives less than `support` of probability.
      support: see above.
      mean_ratio: how many standard errors the mean weight may lie from 1.
      stays: least number of stays for the clinician's own mean return.
      habit: how many standard errors the residuals of the clinician within a stay may agree.
      baseline: level at which weights that move the first row's features are refused.
      confounding: least strength (Gamma) of unrecorded confounding that a conclusion must
        withstand; at 1 none is refused for it.
      fqe: how far fitted values of the clinician may lie from the mean return, in standard
        deviations of the return.
    """

    effective: float = 250.0
    effective_share: float = 0.05
    largest: float = 0.10
    clipped: float = 0.05
    unsupported: float = 0.10
    support: float = 0.01
    mean_ratio: float = 3.0
    stays: int = 30
    habit: float = 3.0
    baseline: float = 0.001
    confounding: float = 1.0
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
    unsupported: jax.Array  # mean probability beyond the clinician's on actions rarely given
    expected_ess: jax.Array  # what a typical stay promises, by actions taken and not taken


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
    squares = jax.vmap(lambda stay, probs: log_expected_square(
        jax.tree.map(lambda leaf: leaf[None], stay), probs[:, None]
    ), (0, 1))(data, target_probs)  # fmt: skip
    return summarize(weights.log_weight, weights.clipped_share, mass / data.alive.sum(), squares)


def summarize(
    log_weight: Float[Array, "K N T"],
    clipped: Float[Array, " K"],
    unsupported: Float[Array, " K"],
    log_square: Float[Array, "N K"] | None,
) -> Diagnostics:
    """Diagnostics of log weights [K, N, T], with the shares [K] that they do not tell.

    Args:
      log_weight: cumulative, [K, N, T].
      clipped, unsupported: shares of steps and of probability, [K].
      log_square: [N, K] from `log_expected_square`; without it, log weights are taken as normal.
    """
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
        expected_ess=stays * jnp.exp(-_typical_square(final, log_square)),
    )


def _typical_square(final: jax.Array, log_square: jax.Array | None) -> jax.Array:
    """[K] log of E w^2 / (E w)^2 of a typical stay.

    The median over stays is known to a few percent where the mean is not, since that hangs on the
    rarest. Of log-normal weights it is the variance of the logarithms.
    """
    if log_square is not None:
        return jnp.median(log_square, 0)
    known = ~jnp.isneginf(final)
    return jnp.where(known.any(-1), jnp.var(final, -1, where=known), jnp.inf)


def log_expected_square(
    data: OPEData, target_probs: Float[Array, "K 1 T A"]
) -> Float[Array, " K"] | None:
    """[K] sum over the steps of one stay of log sum_a pi^2 / b, the expected square of its ratios.

    Unlike recorded weights it counts the actions that might have been taken. None where only the
    probabilities of recorded actions are known.
    """
    if data.behavior_probs is None:
        return None
    b = data.behavior_probs
    square = jnp.where(target_probs > 0, target_probs**2 / jnp.maximum(b, 1e-30), 0.0).sum(-1)
    steps = jnp.where(data.alive, jnp.log(jnp.maximum(square, 1e-30)), 0.0)
    return steps.sum((-2, -1))


def unsupported_mass(
    data: OPEData, target_probs: Float[Array, "K N T A"], support: float
) -> Float[Array, " K"]:
    """[K] sum over recorded steps of what the policy gives rare actions beyond the clinician.

    Rare is what the clinician gives less than `support`; without `data.behavior_probs` a step
    counts as a whole if its recorded action is rare.
    """
    if data.behavior_probs is None:
        rare = (data.behavior_prob < support) & data.alive
        return jnp.full(target_probs.shape[:1], rare.sum(), jnp.float32)
    rare = (data.behavior_probs < support) & data.alive[..., None]
    beyond = jnp.maximum(target_probs - data.behavior_probs, 0.0)
    return jnp.where(rare, beyond, 0.0).sum((1, 2, 3))


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
    found: Mapping[str, float],
    stays: int,
    *,
    fqe_gap: float | None = None,
    limits: Limits | None = None,
) -> str:
    """Why not to trust an estimate; empty if nothing was found.

    Args:
      estimator: its name.
      found: the diagnostics of one policy, as numbers; with `habit`, `baseline`, `features` and
        `confounding` of `ope.hidden_causes` where they are known.
      stays: N.
      fqe_gap: from `fqe_gap`, where values were fitted.
      limits: where trust ends.
    """
    limits = limits or Limits()
    if estimator == "on_policy":
        return "; ".join(_against_mean(found, stays, limits))
    entry = ESTIMATORS.get(estimator)
    reasons = ["the coverage of its interval was never measured" if entry is None else entry.caveat]
    if entry is None or entry.weighted:
        reasons += _against_weights(found, stays, limits)
    if found["unsupported"] > limits.unsupported:
        share = 100 * found["unsupported"]
        reasons.append(f"{share:.0f}% of the policy lies on actions the clinician hardly gives")
    modelled = entry is not None and entry.modelled
    if modelled and fqe_gap is not None and abs(fqe_gap) > limits.fqe:
        reasons.append(f"fitted values miss the clinician's mean return by {fqe_gap:+.2f} SD")
    return "; ".join(filter(None, reasons))


def _is_clinician(found: Mapping[str, float], stays: int) -> bool:
    return found["ess"] > 0.9999 * stays and abs(found["mean_ratio"] - 1) < 1e-3


def _against_mean(found: Mapping[str, float], stays: int, limits: Limits) -> list[str]:
    reasons = []
    if stays < limits.stays:
        reasons.append(f"{stays} stays, fewer than {limits.stays}")
    if not _is_clinician(found, stays):
        reasons.append("the clinician's mean return, not the value of this policy")
    return reasons


def _against_weights(found: Mapping[str, float], stays: int, limits: Limits) -> list[str]:
    if found["matched"] == 0:
        return ["no stay followed the policy"]
    reasons = []
    least = max(limits.effective, limits.effective_share * stays)
    if _is_clinician(found, stays):  # the estimate is a mean return
        least = limits.stays
    if found["ess"] < least:
        reasons.append(f"effective sample size {found['ess']:.1f} < {least:.0f}")
    expected = found.get("expected_ess", np.inf)
    if expected < least:
        reasons.append(f"expected effective sample size {expected:.1f} < {least:.0f}")
    if found["largest"] > limits.largest:
        reasons.append(f"one stay holds {100 * found['largest']:.0f}% of the weight")
    if found["clipped"] > limits.clipped:
        reasons.append(f"{100 * found['clipped']:.0f}% of steps clipped")
    if abs(found["mean_ratio_z"]) > limits.mean_ratio and found["clipped"] == 0:
        reasons.append(f"mean weight {found['mean_ratio']:.3g}, expected 1")
    if abs(found.get("habit", 0.0)) > limits.habit:
        reasons.append(
            f"the clinician's choices within a stay agree beyond the recorded state "
            f"({found['habit']:+.1f} standard errors): something that lasts is hidden"
        )
    tests = max(found.get("features", 0.0), 1.0)
    if found.get("baseline", 0.0) > norm.isf(limits.baseline / 2 / tests):
        reasons.append(
            f"weights move what was there before treatment, by {found['baseline']:.1f} "
            "standard errors"
        )
    if found.get("confounding", np.inf) < limits.confounding:
        reasons.append(
            f"falls at a confounding (Gamma) of {found['confounding']:.2f} < {limits.confounding:g}"
        )
    return reasons
