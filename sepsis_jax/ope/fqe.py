"""Fitted Q evaluation: linear and tabular, by repeated regression on one's own target.

    theta <- argmin sum (r_t + g V(s_t+1) - phi(s_t, a_t)' theta)^2 + ridge

(Le, Voloshin & Yue 2019), as many times as a stay has steps, so that values never look further
than the horizon. Values of a stay come from the other folds' fit (cross-fitting).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import Values


def fold_of(key: jax.Array, stays: int, folds: int) -> jax.Array:
    """[N] int32 folds of equal size up to one."""
    return jax.random.permutation(key, jnp.arange(stays) % folds)


def after(values: jax.Array, axis: int) -> jax.Array:
    """The next step's values along an axis, 0 beyond the last."""
    values = jnp.moveaxis(values, axis, 0)
    return jnp.moveaxis(jnp.concatenate([values[1:], jnp.zeros_like(values[:1])]), 0, axis)


def expand(features: jax.Array, action: jax.Array) -> jax.Array:
    """Products of state features [..., D] and action features [..., J]: [..., D * J]."""
    return (features[..., :, None] * action[..., None, :]).reshape(*features.shape[:-1], -1)


@partial(jax.jit, static_argnames=("gamma", "folds", "iterations"))
def linear(
    data: OPEData,
    probs: jax.Array,
    basis: jax.Array,
    fold: jax.Array,
    *,
    gamma: float,
    folds: int,
    ridge: float = 1e-3,
    iterations: int | None = None,
) -> Values:
    """Linear values of K policies, Q(s, a) = x(s)' Theta u(a).

    The Gram matrix is shared by all policies; one iteration is a matrix times a vector.

    Args:
      data: with features [N, T, D].
      probs: [K, N, T, A].
      basis: [A, J] action features u.
      fold: [N] int32.
      gamma: discount.
      folds: number of folds F; 1 fits and predicts on the same stays.
      ridge: penalty, as a share of the mean of the Gram matrix' diagonal.
      iterations: of the regression; default T.
    """
    assert data.features is not None
    stays, steps = data.reward.shape
    alive = data.alive.astype(jnp.float32)
    taken = basis[data.action]
    phi = (expand(data.features, taken) * alive[..., None]).reshape(stays * steps, -1)
    size = phi.shape[1]
    next_features = after(data.features, 1)

    train = jnp.stack([(fold != f) | (folds == 1) for f in range(folds)]).astype(jnp.float32)
    rows = jnp.repeat(train, steps, 1)  # [F, N * T]
    gram = jnp.stack([phi.T @ (phi * row[:, None]) for row in rows])
    penalty = ridge * jnp.trace(gram, axis1=1, axis2=2) / size + 1e-6
    gram += penalty[:, None, None] * jnp.eye(size)
    factor = jnp.linalg.cholesky(gram)
    target = jnp.einsum("np,fn->fp", phi, rows * data.reward.reshape(-1))

    def solve(vector: jax.Array) -> jax.Array:
        return jax.vmap(lambda c, v: jax.scipy.linalg.cho_solve((c, True), v))(factor, vector)

    def of_policy(policy: jax.Array) -> Values:
        mean_action = policy @ basis  # [N, T, J]
        ahead = expand(next_features, after(mean_action, 1)).reshape(stays * steps, -1)
        cross = jnp.stack([(phi * row[:, None]).T @ ahead for row in rows])

        def once(theta: jax.Array, _: None) -> tuple[jax.Array, None]:
            return solve(target + gamma * jnp.einsum("fpq,fq->fp", cross, theta)), None

        start = jnp.zeros_like(target)
        theta, _ = jax.lax.scan(once, start, None, length=iterations or steps)
        own = theta[fold % folds].reshape(stays, -1, basis.shape[1])
        state = jnp.einsum("ntd,ndj->ntj", data.features, own)
        return Values(
            q=(state * taken).sum(-1) * alive,
            v=(state * mean_action).sum(-1) * alive,
        )

    return jax.lax.map(of_policy, probs)


@partial(jax.jit, static_argnames=("num_states", "gamma", "folds", "iterations"))
def tabular(
    data: OPEData,
    state: jax.Array,
    probs: jax.Array,
    fold: jax.Array,
    *,
    num_states: int,
    gamma: float,
    folds: int,
    prior: float = 1.0,
    iterations: int | None = None,
) -> Values:
    """Values by state and action from counts.

    A pair seen n times is worth the mean of its targets, shrunk towards the value of its state by
    `prior` pseudo-observations, so that unseen pairs get the state's value.

    Args:
      data: recorded stays.
      state: [N, T] int32.
      probs: [K, N, T, A].
      fold: [N] int32.
      num_states: S.
      gamma: discount.
      folds: F; 1 fits and predicts on the same stays.
      prior: pseudo-observations per pair.
      iterations: default T.
    """
    actions, steps = probs.shape[-1], data.num_steps
    pair = state * actions + data.action
    train = jnp.stack([(fold != f) | (folds == 1) for f in range(folds)])

    def sums(values: jax.Array, index: jax.Array, size: int) -> jax.Array:
        return jax.ops.segment_sum(values.reshape(-1), index.reshape(-1), size)

    def of_policy(policy: jax.Array) -> Values:
        def of_fold(used: jax.Array) -> tuple[jax.Array, jax.Array]:
            weight = (used[:, None] & data.alive).astype(jnp.float32)
            count = sums(weight, pair, num_states * actions)
            visits = sums(weight, state, num_states)

            def once(table: jax.Array, _: None) -> tuple[jax.Array, None]:
                value = (policy * table[state]).sum(-1) * data.alive
                target = weight * (data.reward + gamma * after(value, 1))
                overall = target.sum() / weight.sum()
                total = sums(target, state, num_states)
                base = jnp.where(visits > 0, total / jnp.maximum(visits, 1), overall)
                shrunk = sums(target, pair, num_states * actions).reshape(num_states, actions)
                seen = count.reshape(num_states, actions)
                return (shrunk + prior * base[:, None]) / (seen + prior), None

            start = jnp.zeros((num_states, actions))
            table, _ = jax.lax.scan(once, start, None, length=iterations or steps)
            rows = table[state]
            q = jnp.take_along_axis(rows, data.action[..., None], -1)[..., 0]
            return q * data.alive, (policy * rows).sum(-1) * data.alive

        q, v = jax.lax.map(of_fold, train)
        stays = jnp.arange(data.num_stays)
        return Values(q[fold % folds, stays], v[fold % folds, stays])

    return jax.lax.map(of_policy, probs)


def clinician_value(values: Values, k: int) -> float:
    """Mean fitted value at the first step of the k-th policy."""
    return float(np.asarray(values.v[k, :, 0]).mean())
