"""Importance weights in log space: ratios, cumulation, clipping, freezing after the end.

They are computed from action probabilities a slice of stays at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sepsis_jax.ope.data import OPEData, taken_probs
from worldmodel import schema
from worldmodel.errors import InputError

SIZE = 512  # stays at most, of what is as wide as all columns of the estimators


def even(stays: int) -> int:
    """Size of the fewest slices of at most `SIZE` stays, all nearly full."""
    return -(-stays // -(-stays // SIZE))


def numbers(stays: int, size: int) -> jax.Array:
    """Numbers of all slices."""
    return jnp.arange(-(-stays // size))


def take(array: jax.Array, which: jax.Array, size: int, axis: int = -1) -> jax.Array:
    """One slice of an array along its axis of stays."""
    start = jnp.minimum(which * size, array.shape[axis] - size)
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def fresh(stays: int, which: jax.Array, size: int) -> jax.Array:
    """[size] 1 for the stays that no earlier slice holds, else 0."""
    place = jnp.minimum(which * size, stays - size) + jnp.arange(size)
    return (place >= which * size).astype(jnp.float32)


LOG_LIMIT = 60.0  # unnormalised weights are held within exp(+-60): float32 ends at exp(88)
_TINY = 1e-37  # below this, quotients of float32 probabilities may overflow


@dataclass(frozen=True)
class Clip:
    """Bounds of the ratios; none by default.

    Attributes:
      step: (low, high) of every step's ratio.
      cumulative: (low, high) of every cumulative weight.
    """

    step: tuple[float, float] = (0.0, float("inf"))
    cumulative: tuple[float, float] = (0.0, float("inf"))

    def __post_init__(self) -> None:
        for name in ("step", "cumulative"):
            low, high = getattr(self, name)
            if not 0 <= low <= 1 <= high:
                raise InputError(f"clip {name}: got ({low}, {high}), expected low <= 1 <= high")


class Weights(NamedTuple):
    """Log weights of K policies and how much clipping touched them."""

    log_ratio: jax.Array  # [K, N, T] of the step, clipped; 0 after the end
    log_weight: jax.Array  # [K, N, T] cumulative, clipped, frozen after the end; -inf is weight 0
    raw_log_weight: jax.Array  # [K, N, T] cumulative without any clipping
    clipped_share: jax.Array  # [K] share of recorded steps whose ratio or weight was clipped


def log_ratio(
    target: Float[Array, "K N T"], behavior: Float[Array, "N T"], alive: Bool[Array, "N T"]
) -> Float[Array, "K N T"]:
    """log(pi / b), 0 after the end and -inf where pi is 0.

    Args:
      target: [K, N, T] target probability of the taken action.
      behavior: [N, T] the clinician's, above 0.
      alive: [N, T] bool.
    """
    # One rounding of the quotient near 1 loses less than two of logarithms far from 0.
    near = jnp.log(target / jnp.maximum(behavior, _TINY))
    far = jnp.log(target) - jnp.log(behavior)
    quotient_is_safe = (behavior > _TINY) & (target > _TINY)
    return jnp.where(alive, jnp.where(quotient_is_safe, near, far), 0.0)


def cumulate(
    ratios: Float[Array, "K N T"], alive: Bool[Array, "N T"], clip: Clip | None = None
) -> Weights:
    """Cumulative weights from log ratios [K, N, T].

    The cumulative clip bounds each w_t where it is used; it does not feed back into w_t+1.
    """
    clip = clip or Clip()
    bounds = jnp.log(jnp.asarray([clip.step, clip.cumulative], jnp.float32))
    step = jnp.clip(ratios, *bounds[0])
    total = jnp.cumsum(step, -1)
    weight = jnp.clip(total, *bounds[1])
    touched = ((step != ratios) | (weight != total)) & alive
    return Weights(
        log_ratio=jnp.where(alive, step, 0.0),
        log_weight=weight,
        raw_log_weight=jnp.cumsum(ratios, -1),
        clipped_share=touched.sum((-2, -1)) / alive.sum(),
    )


def weigh(
    data: OPEData, target_probs: Float[Array, "K N T A"], clip: Clip | None = None
) -> Weights:
    """Weights of K policies with action probabilities [K, N, T, A]."""
    target = taken_probs(target_probs, data.action)
    return cumulate(log_ratio(target, data.behavior_prob, data.alive), data.alive, clip)


def drug_weights(
    data: OPEData, target_probs: Float[Array, "K N T A"], clip: Clip | None = None
) -> Float[Array, "K 2 N T"]:
    """Log weights [K, 2, N, T] of the vasopressor level alone and of the fluid level alone.

    Ratios of marginals: rho^d = pi(a^d | s) / b(a^d | s), the other drug summed out (Rebello,
    Tang, Wiens & Parbhoo 2023). Needs `data.behavior_probs`.
    """
    assert data.behavior_probs is not None
    every = schema.action_levels(jnp.arange(schema.NUM_ACTIONS))
    taken = schema.action_levels(jnp.asarray(data.action))
    out = []
    for level, chosen in zip(every, taken, strict=True):
        same = (level == chosen[..., None]).astype(jnp.float32)  # [N, T, A]
        target, behavior = (
            jnp.einsum("nta,...nta->...nt", same, probs, precision=jax.lax.Precision.HIGHEST)
            for probs in (target_probs, data.behavior_probs)
        )
        ratios = log_ratio(target, behavior, data.alive)
        out.append(cumulate(ratios, data.alive, clip).log_weight)
    return jnp.stack(out, 1)


def linear(log_weight: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Weights, limited to exp(+-`LOG_LIMIT`) so that no sum overflows; weight 0 stays 0."""
    held = jnp.exp(jnp.clip(log_weight, -LOG_LIMIT, LOG_LIMIT))
    return jnp.where(jnp.isneginf(log_weight), 0.0, held)


def scaled(log_weight: Float[Array, "*b"], axis: int = -2) -> Float[Array, "*b"]:
    """Weights divided by the largest along `axis`, for self-normalised estimators."""
    top = jnp.max(log_weight, axis, keepdims=True)
    return jnp.exp(log_weight - jnp.where(jnp.isneginf(top), 0.0, top))


def previous(values: jax.Array, first: float) -> jax.Array:
    """Values of the step before along the last axis."""
    start = jnp.full_like(values[..., :1], first)
    return jnp.concatenate([start, values[..., :-1]], -1)
