"""Losses as sums over tokens: cross-entropy and policy-gradient objectives.

The caller adds sums over a whole batch and divides once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, Shaped

from policy.qwen3.logprobs import token_logprobs
from policy.qwen3.model import Qwen3
from policy.train.data.packing import Rows
from worldmodel.configuration import require
from worldmodel.errors import InputError


class Summed(NamedTuple):
    """A loss summed over tokens, not yet divided by its weight."""

    total: Float[Array, ""]  # float32, sum over tokens
    weight: Float[Array, ""]  # float32, divisor of the sum over a whole batch
    metrics: dict[str, jax.Array]  # [] float32 each, sums with the same divisor
    tokens: Float[Array, ""] | None = None  # float32, learned ones; None where it is the weight


def cross_entropy(
    model: Qwen3,
    rows: Rows,
    *,
    levels: tuple[int, ...] = (),
    decision_weight: float = 1.0,
    remat: str = "none",
    chunk: int | None = None,
) -> Summed:
    """Negative log-likelihood, in nats, of the tokens to learn.

    Where rows say which probabilities are wanted of a token that decides, its loss is the
    cross-entropy to these.

    Args:
      model: the model.
      rows: [R, L]. The first token of a dialogue has no prediction and is left out.
      levels: [5] ids of the levels, needed for rows with wanted probabilities.
      decision_weight: of a token that decides; every other one has 1.
      remat, chunk: as for `qwen3.logprobs.token_logprobs`; [R, L, V] is never
        in memory as a whole.
    """
    found = token_logprobs(
        model,
        rows.ids,
        positions=rows.positions,
        segments=rows.segments,
        wanted=rows.mask,
        choices=levels,
        remat=remat,
        chunk=chunk,
    )
    learned = jnp.asarray(rows.mask & (rows.positions > 0))
    loss, weight = -found.logprob, jnp.ones(())
    decides = jnp.zeros_like(learned)
    if rows.wanted is not None and found.choices is not None:
        decides = learned & decisive(rows.wanted)
        loss = jnp.where(decides, to_wanted(found.choices, rows.wanted), loss)
        weight = jnp.where(decides, decision_weight, 1.0)
    divisor = jnp.sum(jnp.where(learned, weight, 0.0))
    tokens = jnp.sum(learned, dtype=jnp.float32)

    def summed(x: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(where, weight * x, 0.0))

    metrics = {"entropy": summed(found.entropy, learned)}
    if rows.wanted is not None:  # the two add up to the loss
        metrics |= {
            "decision_loss": summed(loss, decides),
            "format_loss": summed(loss, learned & ~decides),
        }
    return Summed(summed(loss, learned), divisor, metrics, tokens)


def decisive(wanted: Float[Array | np.ndarray, "R L 5"]) -> Bool[Array, "R L"]:
    """Whether probabilities are wanted of a token."""
    return jnp.any(jnp.asarray(wanted) != 0, axis=-1)


def to_wanted(
    logprobs: Float[Array, "R L 5"], wanted: Float[Array | np.ndarray, "R L 5"]
) -> Float[Array, "R L"]:
    """Cross-entropy, in nats, of the levels' log-probabilities to those wanted."""
    return -jnp.sum(jnp.where(jnp.asarray(wanted) > 0, wanted * logprobs, 0.0), axis=-1)


LOG_RATIO_LIMIT = 20.0
"""Bound on the absolute value of log ratios, so that their exponentials stay finite."""


def bounded_exp(log_ratio: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The exponential of a log ratio clipped to `LOG_RATIO_LIMIT`."""
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def k3(log_ratio: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """exp(x) - x - 1, never negative, whose mean under q is KL(q, p) where x = log p / q."""
    bounded = jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return jnp.expm1(bounded) - bounded


class SegmentMeans:
    """Sums and means over the learned tokens of each segment, repeated at each of its tokens."""

    def __init__(self, learned: jax.Array | np.ndarray, segments: jax.Array | np.ndarray):
        learned = jnp.asarray(learned)
        self._segments = jnp.asarray(segments)
        self.count = jnp.maximum(self.sum(learned.astype(jnp.float32)), 1.0)

    def sum(self, x: Num[Array, "R L"]) -> Num[Array, "R L"]:
        """[R, L] sums per segment, row by row, so that rows can be sharded over devices."""

        def one(x: jax.Array, segments: jax.Array) -> jax.Array:
            length = x.shape[0]
            return jax.ops.segment_sum(x, segments, num_segments=length + 1)[segments]

        return jax.vmap(one)(x, self._segments)

    def __call__(self, x: Num[Array, "R L"]) -> Float[Array, "R L"]:
        """[R, L] mean over the learned tokens of each segment."""
        return self.sum(x) / self.count


def mismatch(
    sampler_logprobs: Float[Array | np.ndarray, "*b"],
    old_logprobs: Float[Array | np.ndarray, "*b"],
    mask: Shaped[Array | np.ndarray, "*b"],
) -> dict[str, float]:
    """Difference of the trainer's log-probabilities from the sampler's, before any update.

    Args:
      sampler_logprobs, old_logprobs: log-probabilities, of any shape.
      mask: bool, tokens that the sampler drew.

    Returns:
      mean, 0.99 quantile and maximum of the absolute difference (nats), and the k3 estimate of
      the KL divergence of the trainer from the sampler.

    Raises:
      InputError: there is no token, or one of its log-probabilities is not finite.
    """
    keep = np.asarray(mask, bool)
    off = (
        np.asarray(old_logprobs, np.float64)[keep] - np.asarray(sampler_logprobs, np.float64)[keep]
    )
    if not off.size:
        raise InputError("mismatch: no token was drawn by the sampler")
    if not np.isfinite(off).all():
        bad = int((~np.isfinite(off)).sum())
        raise InputError(f"mismatch: {bad} of {off.size} log-probabilities are not finite")
    apart = np.abs(off)
    return {
        "mean": float(apart.mean()),
        "p99": float(np.quantile(apart, 0.99)),
        "max": float(apart.max()),
        "kl": float((np.expm1(off) - off).mean()),
    }


class RolloutRows(NamedTuple):
    """Dialogues that were sampled, packed into rows; leaves [..., R, L].

    Float leaves are used where `mask` is true only. Log-probabilities are those of the sampling
    distribution, at the temperature of the sampler.
    """

    ids: jax.Array | np.ndarray  # int32
    positions: jax.Array | np.ndarray  # int32, counted within a dialogue
    segments: jax.Array | np.ndarray  # int32, one number per dialogue in a row; 0 marks padding
    mask: jax.Array | np.ndarray  # bool, tokens to learn
    sampler_logprobs: (
        jax.Array | np.ndarray
    )  # float32, log-probability under the sampler when drawn
    old_logprobs: (
        jax.Array | np.ndarray
    )  # float32, under the trainer's weights at the start of the update
    reference: jax.Array | np.ndarray  # float32, under the reference model; unused where beta is 0
    advantage: jax.Array | np.ndarray  # float32
    wanted: jax.Array | np.ndarray | None = None  # [..., R, L, 5] float32, as in `Rows`


@dataclass(frozen=True)
class Objective:
    """Settings of the policy-gradient objective.

    A "sequence" is a segment with tokens to learn.

    Attributes:
      importance_sampling_level: "token", or "sequence" for the geometric mean of a sequence's token
        ratios in the form of GSPO-token (2507.18071, eq. 14), which equals GSPO where a sequence
        has one advantage and also allows one advantage per token.
      loss_type: "clip", "cispo" or "reinforce".
      epsilon_low: the ratio is clipped below 1 - epsilon_low; 1 disables the bound.
      epsilon_high: the ratio is clipped above 1 + epsilon_high.
      dual_clip: bound on r where A < 0, above 1 + epsilon_high; none if not given.
      normalization: divisor of the sum over a batch.
        "token": the number of its tokens (DAPO).
        "sequence": each sequence's mean over its tokens, then the number of sequences (GRPO).
        "constant": constant_length, then the number of sequences (Dr. GRPO, 2503.20783).
      constant_length: tokens, such as the longest sequence allowed.
      beta: weight of the divergence from the reference; at 0 there is no reference.
      kl_loss_type: with d = reference - logprob, "k3": exp(d) - d - 1 (as GRPO, 2402.03300), or
        "k2": d^2 / 2, whose gradient is that of the reverse KL for tokens drawn on policy. k1
        is not offered: as a loss its gradient has mean zero.
      use_bias_correction_kl: multiply the divergence by the ratio, so that its gradient is unbiased
        for tokens sampled from older weights (DeepSeek-V3.2, 2512.02556).
      entropy_coef: weight of the entropy bonus.
      correction: w, from q = exp(old_logprobs - sampler_logprobs): "none" is 1, "truncate" is
        min(q, cap) (truncated importance sampling), "mask" q within [low, cap] and 0
        outside (IcePop, 2510.18855). 1 wherever old_logprobs is sampler_logprobs.
      correction_level: q of a "token", of a whole "sequence" (the product over its tokens), or
        its "geometric" mean.
      correction_low, correction_cap: bounds of q.
      decision_weight: of a token that decides, where the rows say which probabilities of the levels
        are wanted: its loss is this times the cross-entropy to them, in place of the above.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "ratio": "importance_sampling_level",
        "surrogate": "loss_type",
        "clip_low": "epsilon_low",
        "clip_high": "epsilon_high",
        "kl_weight": "beta",
        "kl_kind": "kl_loss_type",
        "kl_corrected": "use_bias_correction_kl",
        "entropy_weight": "entropy_coef",
    }

    importance_sampling_level: str = "token"
    loss_type: str = "clip"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    normalization: str = "token"
    constant_length: int = 4096
    beta: float = 0.0
    kl_loss_type: str = "k3"
    use_bias_correction_kl: bool = False
    entropy_coef: float = 0.0
    correction: str = "truncate"
    correction_level: str = "token"
    correction_low: float = 0.5
    correction_cap: float = 2.0
    decision_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            require(self, f"one of {', '.join(known)}", known.__contains__, name)
        require(self, "within [0, 1]", lambda x: 0 <= x <= 1, "epsilon_low")
        names = ("epsilon_high", "beta", "entropy_coef", "correction_low", "decision_weight")
        require(self, "0 or more", lambda x: x >= 0, *names)
        require(self, "at least 1", lambda n: n >= 1, "constant_length")
        require(self, "at least 1 (no mismatch)", lambda x: x >= 1, "correction_cap")
        require(self, "at most 1 (no mismatch)", lambda x: x <= 1, "correction_low")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.epsilon_high:
            raise InputError(f"dual_clip: got {self.dual_clip}, expected above 1 + epsilon_high")


_KNOWN = {
    "importance_sampling_level": ("token", "sequence"),
    "loss_type": ("clip", "cispo", "reinforce"),
    "normalization": ("token", "sequence", "constant"),
    "kl_loss_type": ("k2", "k3"),
    "correction": ("none", "truncate", "mask"),
    "correction_level": ("token", "sequence", "geometric"),
}

PRESETS = {
    "GRPO": Objective(normalization="sequence", beta=0.04),
    "DR_GRPO": Objective(normalization="constant"),
    "DAPO": Objective(epsilon_high=0.28),
    "GSPO": Objective(
        importance_sampling_level="sequence",
        epsilon_low=3e-4,
        epsilon_high=4e-4,
        normalization="sequence",
    ),
    "CISPO": Objective(loss_type="cispo", epsilon_low=1.0, epsilon_high=4.0),
}
"""Settings of DeepSeekMath (2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), GSPO
(2507.18071) and, for CISPO, ScaleRL (2510.13786), with the truncated correction, which the papers
do not have."""


def policy_loss(
    model: Qwen3,
    rows: RolloutRows,
    objective: Objective,
    *,
    temperature: float = 1.0,
    levels: tuple[int, ...] = (),
    remat: str = "none",
    chunk: int | None = None,
) -> Summed:
    """The policy-gradient loss of a model on sampled rows, see `surrogate_loss`.

    Args:
      model: the model.
      rows: [R, L].
      objective: settings.
      temperature: at which the rows were sampled.
      levels: as for `cross_entropy`.
      remat, chunk: as for `qwen3.logprobs.token_logprobs`; [R, L, V] is never
        in memory as a whole.
    """
    found = token_logprobs(
        model,
        rows.ids,
        positions=rows.positions,
        segments=rows.segments,
        wanted=rows.mask,
        temperature=temperature,
        choices=levels,
        remat=remat,
        chunk=chunk,
    )
    return surrogate_loss(found.logprob, found.entropy, rows, objective, found.choices)


def surrogate_loss(
    logprob: Float[Array, "R L"],
    entropy: Float[Array, "R L"],
    rows: RolloutRows,
    objective: Objective,
    choices: Float[Array, "R L 5"] | None = None,
) -> Summed:
    """The policy-gradient loss from log-probabilities and entropies, which it is differentiable in.

    Args:
      logprob: [R, L] of each token under the current weights. The first token of a dialogue has
        no prediction and is left out.
      entropy: [R, L] nats.
      rows: [R, L].
      objective: settings.
      choices: [R, L, 5] log-probabilities of the levels, for rows with wanted probabilities.

    Returns:
      The sum and what to divide it by: the number of tokens or, for "sequence" and "constant", of
      sequences. Metrics are means over tokens or, likewise, means over sequences of their
      means: ratio, clip_ratio/low and clip_ratio/high (shares of clipped tokens, with A < 0 and
      A > 0; for cispo, with any A), clip_ratio/dual, entropy, ppo_kl (k3, from old_logprobs
      to now), kl (k3, from the reference, where it is used), mismatch (absolute difference of
      old_logprobs and sampler_logprobs), sampler_kl (k3 of the same), correction (w),
      corrected (share where w is not q) and masked (share where w is 0).
    """
    learned = rows.mask & (rows.positions > 0)

    def own(x: jax.Array | np.ndarray, other: float = 0.0) -> jax.Array:
        """Replaces values of tokens that are not learned, which may not be finite."""
        return jnp.where(learned, x, other)

    now, old_logprobs, advantage = own(logprob), own(rows.old_logprobs), own(rows.advantage)
    log_ratio = now - old_logprobs
    off = old_logprobs - own(rows.sampler_logprobs)
    mean = SegmentMeans(learned, rows.segments)

    ratio = bounded_exp(log_ratio)
    if objective.importance_sampling_level == "sequence":
        one = jax.lax.stop_gradient(now)
        ratio = bounded_exp(jax.lax.stop_gradient(mean(log_ratio)) + now - one)
    loss, clipped = _surrogate(ratio, now, advantage, objective)
    weight, corrected = _correction(off, mean, objective)
    loss = weight * loss
    metrics = {
        "ratio": ratio,
        **clipped,
        "entropy": own(entropy),
        "ppo_kl": k3(log_ratio),
        "mismatch": jnp.abs(off),
        "sampler_kl": k3(off),
        "correction": weight,
        "corrected": corrected,
        "masked": weight == 0,
    }
    if objective.beta:
        apart = own(rows.reference) - now
        metrics["kl"] = kl = k3(apart)
        kl = kl if objective.kl_loss_type == "k3" else apart**2 / 2
        loss = loss + objective.beta * (ratio * kl if objective.use_bias_correction_kl else kl)
    if objective.entropy_coef:
        loss = loss - objective.entropy_coef * own(entropy)
    if rows.wanted is not None and choices is not None:
        decides = learned & decisive(rows.wanted)
        apart = to_wanted(choices, rows.wanted)
        loss = jnp.where(decides, objective.decision_weight * apart, loss)
        metrics["decision_loss"] = jnp.where(decides, loss, 0.0)
        metrics["format_loss"] = jnp.where(decides, 0.0, loss)

    share = learned.astype(jnp.float32)
    if objective.normalization != "token":
        share = share / mean.count
    scale = share
    if objective.normalization == "constant":
        scale = learned / float(objective.constant_length)
    return Summed(
        jnp.sum(scale * loss),
        jnp.sum(share),
        jax.lax.stop_gradient({name: jnp.sum(share * x) for name, x in metrics.items()}),
    )


def _surrogate(
    ratio: jax.Array, logprob: jax.Array, advantage: jax.Array, objective: Objective
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Losses [R, L], and masks of the tokens whose ratio is clipped."""
    if objective.loss_type == "reinforce":
        return -advantage * logprob, {}
    low, high = 1.0 - objective.epsilon_low, 1.0 + objective.epsilon_high
    bounded = jnp.clip(ratio, low, high)
    if objective.loss_type == "cispo":
        where = {"clip_ratio/low": ratio < low, "clip_ratio/high": ratio > high}
        return -jax.lax.stop_gradient(bounded) * advantage * logprob, where
    where = {
        "clip_ratio/low": (ratio < low) & (advantage < 0),
        "clip_ratio/high": (ratio > high) & (advantage > 0),
    }
    gain = jnp.minimum(ratio * advantage, bounded * advantage)
    if objective.dual_clip is not None:
        where["clip_ratio/dual"] = (ratio > objective.dual_clip) & (advantage < 0)
        gain = jnp.where(advantage < 0, jnp.maximum(gain, objective.dual_clip * advantage), gain)
    return -gain, where


def _correction(
    off: jax.Array, mean: SegmentMeans, objective: Objective
) -> tuple[jax.Array, jax.Array]:
    """Importance weights w [R, L], and a mask of those that differ from the plain ratio."""
    if objective.correction == "none":
        return jnp.ones_like(off), jnp.zeros_like(off, bool)
    level = objective.correction_level
    ratio = bounded_exp(
        off if level == "token" else mean.sum(off) if level == "sequence" else mean(off)
    )
    beyond = ratio > objective.correction_cap
    if objective.correction == "truncate":
        return jnp.minimum(ratio, objective.correction_cap), beyond
    beyond |= ratio < objective.correction_low
    return jnp.where(beyond, 0.0, ratio), beyond
