"""Ratios of two models' probabilities: kept finite, over whole sequences, and how far from 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel.errors import InputError

LOG_RATIO_LIMIT = 20.0
"""Log ratios are held within plus and minus this, so that their exponentials stay finite."""


def bounded_exp(log_ratio: jax.Array) -> jax.Array:
    """The ratio, kept finite."""
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def k3(log_ratio: jax.Array) -> jax.Array:
    """exp(x) - x - 1, never negative, whose mean under q is KL(q, p) where x = log p / q."""
    bounded = jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return jnp.expm1(bounded) - bounded


class SegmentMeans:
    """Sums and means over the learned tokens of each segment, at each of its places."""

    def __init__(self, learned: jax.Array, segments: jax.Array):
        self._segments = segments
        self.count = jnp.maximum(self.sum(learned.astype(jnp.float32)), 1.0)

    def sum(self, x: jax.Array) -> jax.Array:
        """[R, L]; row by row, so that rows may be split over devices."""

        def one(x: jax.Array, segments: jax.Array) -> jax.Array:
            length = x.shape[0]
            return jax.ops.segment_sum(x, segments, num_segments=length + 1)[segments]

        return jax.vmap(one)(x, self._segments)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.sum(x) / self.count


def mismatch(behavior: np.ndarray, proximal: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the sampler's, before any update.

    Args:
      behavior, proximal: log-probabilities, of any shape.
      mask: bool, tokens that the sampler drew.

    Returns:
      mean, 0.99 quantile and maximum of the absolute difference (nats), and the k3 estimate of
      the KL divergence of the trainer from the sampler.

    Raises:
      InputError: there is no token, or one of its log-probabilities is not finite.
    """
    keep = np.asarray(mask, bool)
    off = np.asarray(proximal, np.float64)[keep] - np.asarray(behavior, np.float64)[keep]
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
