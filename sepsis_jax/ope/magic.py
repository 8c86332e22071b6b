"""MAGIC: how to blend j-step returns between the direct method and WDR.

g^(j) = mean V_0 + sum_{t <= j} g^t sum_i w_it d_it / D_t, so g^(-1) is the direct method and
g^(T-1) is WDR. The blend x minimises x' (Omega + b b') x on the simplex, with Omega the covariance
of the g^(j) and b_j the distance of g^(j) from a 50% interval of WDR (Thomas & Brunskill 2016).
The covariance is the delta method's; the intervals of MAGIC hold x fixed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm

from sepsis_jax.ope.estimators import Batch, columns

_SHARE = 0.5  # of the interval that b is measured from


def partial_returns(batch: Batch) -> tuple[jax.Array, jax.Array]:
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


def blend(values: np.ndarray, covariance: np.ndarray) -> np.ndarray:
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


def reach(weights: np.ndarray) -> np.ndarray:
    """[K, T] for `Batch.magic`: the share of blended returns that include step t's correction."""
    return np.cumsum(weights[:, :0:-1], axis=1)[:, ::-1].astype(np.float32)


def with_magic(batch: Batch) -> Batch:
    """The batch with its blend."""
    values, covariance = partial_returns(batch)
    return batch.replace(  # type: ignore[attr-defined]
        magic=jnp.asarray(reach(blend(np.asarray(values), np.asarray(covariance))))
    )
