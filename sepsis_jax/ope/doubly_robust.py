"""MAGIC (blended returns) and MRDR (values of least variance) for doubly robust estimates."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import nnls
from scipy.stats import norm

from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import Batch, Values, columns
from sepsis_jax.ope.weights import LOG_LIMIT, previous

_SHARE = 0.5  # of the interval that b is measured from


def partial_returns(batch: Batch) -> tuple[Float[Array, "K J"], Float[Array, "K J J"]]:
    """g^(j) [K, T + 1] for j = -1 .. T - 1, and their covariance [K, T + 1, T + 1]."""
    blocks = columns(batch, ("wdr",))
    stays = batch.reward.shape[0]
    first, weight = blocks["first_value"], blocks["weight"]  # [K, N, 1], [K, N, T]
    total = weight.sum(1, keepdims=True)
    present = total > 0
    share = jnp.where(present, weight / jnp.where(present, total, 1.0), 0.0)
    difference = jnp.where(weight > 0, blocks["weighted_difference"] / weight, 0.0)
    step = (share * difference).sum(1, keepdims=True)
    influence_of_step = share * (difference - step)
    values = jnp.concatenate([first.mean(1), step[:, 0]], -1).cumsum(-1)
    start = (first - first.mean(1, keepdims=True)) / stays
    influence = jnp.concatenate([start, influence_of_step], -1).cumsum(-1)
    covariance = jnp.einsum("kni,knj->kij", influence, influence)
    return values, covariance


def blend(
    values: Float[np.ndarray, "K J"], covariance: Float[np.ndarray, "K J J"]
) -> Float[np.ndarray, "K J"]:
    """[K, T + 1] weights on the simplex.

    The simplex is reached by a heavily weighted row in a non-negative least-squares problem.
    """
    out = []
    for g, omega in zip(np.asarray(values, float), np.asarray(covariance, float), strict=True):
        half = norm.ppf(0.5 + _SHARE / 2) * np.sqrt(omega[-1, -1])
        bias = np.maximum(np.abs(g - g[-1]) - half, 0.0)
        objective = omega + np.outer(bias, bias)
        if not np.isfinite(objective).all():
            out.append(np.eye(len(g))[0])
            continue
        eigenvalues, vectors = np.linalg.eigh(objective)
        root = np.sqrt(np.maximum(eigenvalues, 0.0))[:, None] * vectors.T
        heavy = 1e4 * max(np.abs(root).max(), 1e-12)
        rows = np.vstack([root, np.full((1, len(g)), heavy)])
        x, _ = nnls(rows, np.append(np.zeros(len(g)), heavy))
        out.append(x / x.sum())
    return np.array(out)


def reach(weights: Float[np.ndarray, "K J"]) -> Float[np.ndarray, "K T"]:
    """[K, T] for `Batch.magic`: the share of blended returns that include step t's correction."""
    return np.cumsum(weights[:, :0:-1], axis=1)[:, ::-1].astype(np.float32)


def with_magic(batch: Batch) -> Batch:
    """The batch with the weights of MAGIC's blended returns."""
    values, covariance = partial_returns(batch)
    blended: Batch = batch.replace(  # type: ignore[attr-defined]
        magic=jnp.asarray(reach(blend(np.asarray(values), np.asarray(covariance))))
    )
    return blended


_LEAST = 1e-6  # behaviour probability in pi^2 / b of actions that were not taken


@partial(jax.jit, static_argnames=("gamma", "folds"))
def fit_mrdr(
    data: OPEData,
    probs: Float[Array, "K N T A"],
    log_ratio: Float[Array, "K N T"],
    basis: Float[Array, "A J"],
    fold: Int[Array, " N"],
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

    def to_come(
        carry: jax.Array, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
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
            solution: jax.Array = jnp.linalg.solve(left, right.reshape(-1))
            return solution.reshape(right.shape)

        train = jnp.stack([(fold != f) | (folds == 1) for f in range(folds)]).astype(jnp.float32)
        theta = jax.lax.map(of_fold, train)
        state = jnp.einsum("ntd,ndj->ntj", x, theta[fold % folds])
        return Values(
            q=(state * taken).sum(-1) * data.alive, v=(state * mean_action).sum(-1) * data.alive
        )

    found: Values = jax.lax.map(of_policy, (probs, log_ratio))
    return found
