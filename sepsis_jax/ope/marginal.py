"""Marginal density ratios: visits of a state at step t by a policy over those by the clinician.

    omega_0 = 1,   omega_t+1(s') = E[omega_t(s_t) rho_t | s_t+1 = s', still in the unit],
    mu_t = omega_t(s_t) rho_t

(Xie, Ma & Wang 2019). The expectation is a mean over visits of a discrete state, or a ridge
regression on features, held at or above 0. Weights are not products over all earlier
steps; in return the state is assumed to be Markov.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from sepsis_jax.ope.data import OPEData

Regress = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@partial(jax.jit, static_argnames=("num_states", "folds"))
def tabular(
    data: OPEData,
    state: jax.Array,
    log_ratio: jax.Array,
    fold: jax.Array,
    *,
    num_states: int,
    folds: int,
    prior: float = 1.0,
) -> jax.Array:
    """[K, N, T] mu by discrete state [N, T]; cells shrink to the step's mean by `prior` stays."""

    def regress(target: jax.Array, used: jax.Array, where: jax.Array, step: jax.Array) -> jax.Array:
        here = jax.lax.dynamic_index_in_dim(state, step, 1, keepdims=False)
        weight = (used & where).astype(jnp.float32)
        mean = (weight * target).sum() / jnp.maximum(weight.sum(), 1.0)
        total = jax.ops.segment_sum(weight * target, here, num_states)
        count = jax.ops.segment_sum(weight, here, num_states)
        return ((total + prior * mean) / (count + prior))[here]

    return _recurse(data, log_ratio, fold, folds, regress)


@partial(jax.jit, static_argnames=("folds",))
def linear(
    data: OPEData,
    log_ratio: jax.Array,
    fold: jax.Array,
    *,
    folds: int,
    ridge: float = 0.1,
) -> jax.Array:
    """[K, N, T] mu by ridge regression on `data.features`, whose first column is constant.

    Args:
      data: with features [N, T, D].
      log_ratio: [K, N, T] of the steps.
      fold: [N] int32.
      folds: F.
      ridge: penalty of the slopes, as a share of the number of stays at the step.
    """
    assert data.features is not None
    features = data.features

    def regress(target: jax.Array, used: jax.Array, where: jax.Array, step: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_index_in_dim(features, step, 1, keepdims=False)
        weight = (used & where).astype(jnp.float32)
        count = jnp.maximum(weight.sum(), 1.0)
        mean = (weight * target).sum() / count
        # The constant carries the mean; slopes shrink to 0 where few stays are left.
        centre = (weight[:, None] * x).sum(0) / count
        x = x - centre
        gram = x.T @ (x * weight[:, None])
        penalty = ridge * count + 1.0
        slope = jnp.linalg.solve(
            gram + penalty * jnp.eye(x.shape[1]), x.T @ (weight * (target - mean))
        )
        return jnp.maximum(mean + x @ slope, 0.0)

    return _recurse(data, log_ratio, fold, folds, regress)


def _recurse(
    data: OPEData, log_ratio: jax.Array, fold: jax.Array, folds: int, regress: Regress
) -> jax.Array:
    stays = jnp.arange(data.num_stays)

    def of_fold(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        rho, used = inputs  # [N, T], [N]

        def step(product: jax.Array, given: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            t, rho_t, alive = given
            ratio = jnp.where(t == 0, 1.0, regress(product, used, alive, t))
            mu = jnp.where(alive, ratio * rho_t, product)
            return mu, mu

        steps = (jnp.arange(data.num_steps), rho.T, data.alive.T)
        mu: jax.Array
        _, mu = jax.lax.scan(step, jnp.ones(data.num_stays), steps)
        return mu.T

    def of_policy(log_rho: jax.Array) -> jax.Array:
        rho = jnp.exp(log_rho)
        train = jnp.stack([(fold != f) | (folds == 1) for f in range(folds)])
        every = jax.lax.map(lambda used: of_fold((rho, used)), train)
        chosen: jax.Array = every[fold % folds, stays]
        return chosen

    found: jax.Array = jax.lax.map(of_policy, log_ratio)
    return found
