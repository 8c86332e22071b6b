"""Values of least variance for the doubly robust estimator (Farajtabar, Chow & Ghavamzadeh 2018).

Given the past, DR's variance depends on Q at step t through

    Q' M Q - 2 c' Q,   M = diag(pi^2 / b) - pi pi',   c = rho R (rho e_a - pi),

with R_t = r_t + g rho_t+1 R_t+1 the weighted return still to come. The linear Q that minimises the
mean of g^2t w_t-1^2 times this is the solution of one linear system per policy. R is the noisy
return of a whole stay, which calls for a strong penalty.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import Values
from sepsis_jax.ope.weights import LOG_LIMIT, previous

_LEAST = 1e-6  # behaviour probability in pi^2 / b of actions that were not taken


@partial(jax.jit, static_argnames=("gamma", "folds"))
def fit(
    data: OPEData,
    probs: jax.Array,
    log_ratio: jax.Array,
    basis: jax.Array,
    fold: jax.Array,
    *,
    gamma: float,
    folds: int,
    ridge: float = 1.0,
) -> Values:
    """Linear values Q(s, a) = x(s)' Theta u(a) of least variance for K policies, cross-fitted.

    Args:
      data: with features [N, T, D] and behavior_probs.
      probs: [K, N, T, A].
      log_ratio: [K, N, T] of the steps.
      basis: [A, J].
      fold: [N] int32.
      gamma: discount.
      folds: F; 1 fits and predicts on the same stays.
      ridge: penalty, as a share of the mean diagonal.
    """
    assert data.features is not None and data.behavior_probs is not None
    steps = data.num_steps
    x, taken = data.features, basis[data.action]
    behavior = jnp.maximum(data.behavior_probs, _LEAST)

    def to_come(carry: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple:
        reward, rho = inputs
        total = reward + gamma * carry
        return rho * total, total

    def of_policy(inputs: tuple[jax.Array, jax.Array]) -> Values:
        policy, log_rho = inputs
        rho = jnp.exp(log_rho)
        zero = jnp.zeros(data.num_stays)
        rest: jax.Array
        _, rest = jax.lax.scan(to_come, zero, (data.reward.T, rho.T), reverse=True)
        past = previous(jnp.cumsum(log_rho, -1), 0.0)
        top = jnp.max(jnp.where(data.alive, past, -jnp.inf))
        weight = jnp.exp(2 * jnp.maximum(past - top, -LOG_LIMIT / 2))
        weight *= gamma ** (2 * jnp.arange(steps)) * data.alive
        mean_action = policy @ basis
        spread = jnp.einsum("nta,ai,aj->ntij", policy**2 / behavior, basis, basis)
        spread -= mean_action[..., :, None] * mean_action[..., None, :]
        slope = rho[..., None] * rest.T[..., None] * (rho[..., None] * taken - mean_action)

        def of_fold(used: jax.Array) -> jax.Array:
            w = weight * used[:, None]
            left = jnp.einsum("nt,ntd,nte,ntij->diej", w, x, x, spread, optimize="greedy")
            right = jnp.einsum("nt,ntd,ntj->dj", w, x, slope)
            size = right.size
            left = left.reshape(size, size)
            left += (ridge * jnp.trace(left) / size + 1e-12) * jnp.eye(size)
            solution = jnp.linalg.solve(left, right.reshape(-1))
            return solution.reshape(right.shape)

        train = jnp.stack([(fold != f) | (folds == 1) for f in range(folds)]).astype(jnp.float32)
        theta = jax.lax.map(of_fold, train)
        state = jnp.einsum("ntd,ndj->ntj", x, theta[fold % folds])
        return Values(
            q=(state * taken).sum(-1) * data.alive, v=(state * mean_action).sum(-1) * data.alive
        )

    return jax.lax.map(of_policy, (probs, log_ratio))
