"""The distribution of the return under a policy, not only its mean.

F(x) = sum_i w_i 1[G_i <= x] / sum_i w_i (Huang, Leqi, Lipton & Azizzadenesheli 2021, self-
normalised); quantiles invert F, and the lower CVaR at level a is the mean of the worst share a,
(1/a) int_0^a F^-1(u) du (Chandak et al. 2021). Stays must be sorted by return.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sepsis_jax.ope.weights import fresh, numbers, take


def tail(
    returns: jax.Array, weights: jax.Array, counts: jax.Array, levels: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """Quantiles and lower CVaR of resamples, exactly, without a running sum over all stays.

    Sums over slices of about sqrt(N) stays find the slice of the quantile, and only that slice is
    summed stay by stay.

    Args:
      returns: [N] ascending.
      weights: [K, N] final weights, up to a factor.
      counts: [B, N] how often each stay was drawn.
      levels: L shares in (0, 1].

    Returns:
      [B, K, L] quantiles and CVaR; NaN where a resample has no weight.
    """
    stays, policies = returns.shape[0], weights.shape[0]
    size = max(int(stays**0.5), 1)
    slices = numbers(stays, size)
    both = jnp.concatenate([weights, weights * returns])

    def sums(which: jax.Array) -> jax.Array:
        drawn = take(counts, which, size) * fresh(stays, which, size)
        return drawn @ take(both, which, size).T

    running = jax.lax.map(sums, slices).cumsum(0)  # [slices, B, 2 K]
    mass, gain = jnp.split(jnp.moveaxis(running, 0, -1), [policies], 1)
    total = mass[..., -1]

    def of_policy(which: jax.Array, drawn: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
        """Returns and drawn weights [n] in a slice of one resample and policy."""
        drawn = take(drawn, which, size) * fresh(stays, which, size)
        return take(returns, which, size), drawn * take(weight, which, size)

    every = jax.vmap(jax.vmap(of_policy, (0, None, 0)), (0, 0, None))

    def at(level: float) -> tuple[jax.Array, jax.Array]:
        goal = level * total  # [B, K]
        which = jnp.minimum((mass < goal[..., None]).sum(-1), len(slices) - 1)
        before_mass, before_gain = _before(mass, which), _before(gain, which)
        g, weight = every(which, counts, weights)  # [B, K, n]
        passed = before_mass[..., None] + weight.cumsum(-1)
        place = jnp.minimum((passed < goal[..., None]).sum(-1), g.shape[-1] - 1)
        quantile = jnp.take_along_axis(g, place[..., None], -1)[..., 0]
        earlier = jnp.arange(g.shape[-1]) < place[..., None]
        lost_mass = before_mass + jnp.where(earlier, weight, 0.0).sum(-1)
        lost_gain = before_gain + jnp.where(earlier, weight * g, 0.0).sum(-1)
        cvar = (lost_gain + (goal - lost_mass) * quantile) / jnp.where(goal > 0, goal, 1.0)
        undefined = total <= 0
        return jnp.where(undefined, jnp.nan, quantile), jnp.where(undefined, jnp.nan, cvar)

    pairs = [at(level) for level in levels]
    return jnp.stack([p[0] for p in pairs], -1), jnp.stack([p[1] for p in pairs], -1)


def _before(running: jax.Array, which: jax.Array) -> jax.Array:
    """The running sum up to the slice before; 0 for the first."""
    index = jnp.maximum(which - 1, 0)[..., None]
    return jnp.where(which > 0, jnp.take_along_axis(running, index, -1)[..., 0], 0.0)


def cdf(returns: jax.Array, weights: jax.Array, at: jax.Array) -> jax.Array:
    """[K, X] F at the points `at` [X]."""
    below = (returns[:, None] <= at).astype(weights.dtype)
    return weights @ below / weights.sum(-1, keepdims=True)
