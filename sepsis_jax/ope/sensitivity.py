"""How wrong may the clinician's probabilities be before a conclusion falls?

If something unrecorded moved the odds of the whole course of treatment by a factor of at most
Gamma, the true weight of stay i lies within [w_i / Gamma, w_i Gamma] up to normalisation, and the
self-normalised value within the worst and best cases over such weights (Rosenbaum 2002; Zhao,
Small & Bhattacharya 2019; Namkoong, Keramati, Yadlowsky & Brunskill 2020 for sequences). The
extremes are reached by a threshold on the return, found exactly by one pass over sorted stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import pandas as pd

from sepsis_jax.ope.weights import scaled

GAMMAS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)


def worst_case(
    returns: jax.Array, log_weight: jax.Array, gamma: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """[K] least and greatest WIS value when every weight may be wrong by a factor of `gamma`.

    Args:
      returns: [N].
      log_weight: [K, N] final log weights.
      gamma: at least 1.
    """
    order = jnp.argsort(returns)
    g = returns[order]
    weight = scaled(log_weight, -1)[:, order]

    def extreme(first: float | jax.Array, rest: float | jax.Array) -> jax.Array:
        """[K, N + 1] values with the j lowest returns weighted by `first`, others by `rest`."""
        mass = jnp.pad(jnp.cumsum(weight, -1), ((0, 0), (1, 0)))
        gain = jnp.pad(jnp.cumsum(weight * g, -1), ((0, 0), (1, 0)))
        total = first * mass + rest * (mass[:, -1:] - mass)
        return (first * gain + rest * (gain[:, -1:] - gain)) / total

    undefined = jnp.isneginf(log_weight.max(-1))
    low, high = extreme(gamma, 1 / gamma).min(-1), extreme(1 / gamma, gamma).max(-1)
    return jnp.where(undefined, jnp.nan, low), jnp.where(undefined, jnp.nan, high)


def confounding_table(
    names: Sequence[str],
    returns: jax.Array,
    log_weight: jax.Array,
    gammas: Sequence[float] = GAMMAS,
) -> pd.DataFrame:
    """Rows (policy, Gamma) with the bounds of WIS and whether they exclude the mean return."""
    rows = []
    mean = float(returns.mean())
    for gamma in gammas:
        low, high = worst_case(returns, log_weight, gamma)
        for k, name in enumerate(names):
            bounds = float(low[k]), float(high[k])
            slack = 1e-5 * (1 + abs(mean))
            differs = bounds[1] < mean - slack or bounds[0] > mean + slack
            rows.append((name, float(gamma), *bounds, differs))
    columns = ["policy", "confounding", "low", "high", "differs_from_clinician"]
    return pd.DataFrame(rows, columns=columns).sort_values(["policy", "confounding"], kind="stable")
