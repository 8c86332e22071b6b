"""The distribution of the return under a policy, not only its mean.

F(x) = sum_i w_i 1[G_i <= x] / sum_i w_i (Huang, Leqi, Lipton & Azizzadenesheli 2021, self-
normalised); quantiles invert F, and the lower CVaR at level a is the mean of the worst share a,
(1/a) int_0^a F^-1(u) du (Chandak et al. 2021). Stays must be sorted by return.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def tail(
    returns: jax.Array, weights: jax.Array, counts: jax.Array, levels: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """Quantiles and lower CVaR of resamples, exactly, without a running sum over all stays.

    Sums over blocks of about sqrt(N) stays find the block of the quantile, and only that block is
    summed stay by stay.

    Args:
      returns: [N] ascending.
      weights: [K, N] final weights, up to a factor.
      counts: [B, N] how often each stay was drawn.
      levels: L shares in (0, 1].

    Returns:
      [B, K, L] quantiles and CVaR; NaN where a resample has no weight.
    """
    stays = returns.shape[0]
    size = max(int(stays**0.5), 1)
    blocks = -(-stays // size)
    extra = blocks * size - stays
    g = jnp.pad(returns, (0, extra)).reshape(blocks, size)
    wt = jnp.pad(weights, ((0, 0), (0, extra))).reshape(-1, blocks, size)
    c = jnp.pad(counts, ((0, 0), (0, extra))).reshape(-1, blocks, size)
    mass = jnp.einsum("bjm,kjm->bkj", c, wt).cumsum(-1)
    gain = jnp.einsum("bjm,kjm->bkj", c, wt * g).cumsum(-1)
    total = mass[..., -1]
    policy = jnp.arange(wt.shape[0])

    def at(level: float) -> tuple[jax.Array, jax.Array]:
        goal = level * total  # [B, K]
        block = jnp.minimum((mass < goal[..., None]).sum(-1), blocks - 1)
        before_mass = _before(mass, block)
        before_gain = _before(gain, block)
        picked = jax.vmap(lambda rows, index: rows[index])(c, block)  # [B, K, m]
        inside = picked * wt[policy, block]
        running = before_mass[..., None] + inside.cumsum(-1)
        place = jnp.minimum((running < goal[..., None]).sum(-1), size - 1)
        quantile = g[block, place]
        earlier = jnp.arange(size) < place[..., None]
        lost_mass = before_mass + jnp.where(earlier, inside, 0.0).sum(-1)
        lost_gain = before_gain + jnp.where(earlier, inside * g[block], 0.0).sum(-1)
        cvar = (lost_gain + (goal - lost_mass) * quantile) / jnp.where(goal > 0, goal, 1.0)
        undefined = total <= 0
        return jnp.where(undefined, jnp.nan, quantile), jnp.where(undefined, jnp.nan, cvar)

    pairs = [at(level) for level in levels]
    return jnp.stack([p[0] for p in pairs], -1), jnp.stack([p[1] for p in pairs], -1)


def _before(running: jax.Array, block: jax.Array) -> jax.Array:
    """The running sum up to the block before; 0 for the first."""
    index = jnp.maximum(block - 1, 0)[..., None]
    return jnp.where(block > 0, jnp.take_along_axis(running, index, -1)[..., 0], 0.0)


def cdf(returns: jax.Array, weights: jax.Array, at: jax.Array) -> jax.Array:
    """[K, X] F at the points `at` [X]."""
    below = (returns[:, None] <= at).astype(weights.dtype)
    return weights @ below / weights.sum(-1, keepdims=True)
