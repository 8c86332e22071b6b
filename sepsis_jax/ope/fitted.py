"""Fitted models that some estimators need: values, densities and weights.

Marginal density ratios are visits of a state at step t by a policy over those by the clinician:

    omega_0 = 1,   omega_t+1(s') = E[omega_t(s_t) rho_t | s_t+1 = s', still in the unit],
    mu_t = omega_t(s_t) rho_t

(Xie, Ma & Wang 2019). The expectation is a mean over visits of a discrete state, or a ridge
regression on features, held at or above 0. Weights are not products over all earlier
steps; in return the state is assumed to be Markov.

MAGIC blends returns of j steps (Thomas & Brunskill 2016); MRDR fits the values that make the
doubly robust estimate vary least (Farajtabar, Chow & Ghavamzadeh 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import nnls
from scipy.stats import norm

from sepsis_jax.ope import fqe
from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import Batch, Values, columns
from sepsis_jax.ope.fqe import action_basis
from sepsis_jax.ope.weights import LOG_LIMIT, previous, weigh
from worldmodel import struct
from worldmodel.errors import InputError

METHODS = ("linear", "neural", "tabular")


@struct.dataclass
class Fitted:
    """Learned ingredients of K policies; see `sepsis_jax.ope.fit`."""

    values: Values | None = None  # [K, N, T] twice
    mrdr_values: Values | None = None
    marginal: jax.Array | None = None  # [K, N, T]
    clinician_value: float | None = struct.field(pytree_node=False, default=None)

    def select(self, index: np.ndarray | slice, steps: int) -> Fitted:
        """The stays picked by an index [N], cut to a number of steps."""
        selected: Fitted = jax.tree.map(lambda leaf: leaf[:, index, :steps], self)
        return selected

    def into(self, batch: Batch) -> Batch:
        """The batch with these ingredients."""
        return replace(
            batch, values=self.values, mrdr_values=self.mrdr_values, marginal=self.marginal
        )


def fit(
    key: jax.Array,
    data: OPEData,
    target_probs: Mapping[str, jax.Array | np.ndarray],
    *,
    method: str = "linear",
    gamma: float = 1.0,
    folds: int = 2,
    state: Int[Array, "N T"] | None = None,
    num_states: int | None = None,
    config: fqe.NeuralConfig | None = None,
) -> Fitted:
    """Fits values, values of least variance and marginal ratios of all policies.

    Every stay's numbers come from the other folds. Where the clinician's probabilities of all
    actions are known, the clinician is fitted too, to see whether the fit finds its mean return.

    Args:
      key: of folds and networks; consumed.
      data: as `check` returns it; with features, or with `state` for "tabular".
      target_probs: [N, T, A] by policy.
      method: "linear", "neural" or "tabular".
      gamma: discount.
      folds: F.
      state: [N, T] int32 discrete states for "tabular".
      num_states: their number.
      config: of the networks.

    Raises:
      InputError: an unknown method, or what it needs is missing.
    """
    if method not in METHODS:
        raise InputError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if folds < 1 or folds > data.num_stays:
        raise InputError(f"folds: got {folds}, expected 1 to the number of stays")
    fold_key, network_key = jax.random.split(key)
    del key
    probs = jnp.stack([jnp.asarray(p) for p in target_probs.values()])
    log_ratio = weigh(data, probs).log_ratio
    fold = fqe.fold_of(fold_key, data.num_stays, folds)
    known = data.behavior_probs is not None
    both = jnp.concatenate([probs, data.behavior_probs[None]]) if known else probs  # type: ignore[index]
    mrdr_values = None
    if method == "tabular":
        if state is None or num_states is None:
            raise InputError("method 'tabular' needs discrete states and their number")
        values = fqe.tabular(
            data, state, both, fold, num_states=num_states, gamma=gamma, folds=folds
        )
        marginals = tabular_ratios(data, state, log_ratio, fold, num_states=num_states, folds=folds)
    else:
        if data.features is None:
            raise InputError(f"method {method!r} needs features; see sepsis_jax.ope.fqe")
        basis = jnp.asarray(action_basis(probs.shape[-1]))
        if method == "linear":
            values = fqe.linear(data, both, basis, fold, gamma=gamma, folds=folds)
        else:
            values = fqe.fit_neural(
                network_key, data, both, fold, config=config, gamma=gamma, folds=folds
            )
        marginals = linear_ratios(data, log_ratio, fold, folds=folds)
        if known:
            mrdr_values = fit_mrdr(data, probs, log_ratio, basis, fold, gamma=gamma, folds=folds)
    policies = len(target_probs)
    return Fitted(
        values=Values(values.q[:policies], values.v[:policies]),
        mrdr_values=mrdr_values,
        marginal=marginals,
        clinician_value=fqe.clinician_value(values, policies) if known else None,
    )


Regress = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@partial(jax.jit, static_argnames=("num_states", "folds"))
def tabular_ratios(
    data: OPEData,
    state: Int[Array, "N T"],
    log_ratio: Float[Array, "K N T"],
    fold: Int[Array, " N"],
    *,
    num_states: int,
    folds: int,
    prior: float = 1.0,
) -> Float[Array, "K N T"]:
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
def linear_ratios(
    data: OPEData,
    log_ratio: Float[Array, "K N T"],
    fold: Int[Array, " N"],
    *,
    folds: int,
    ridge: float = 0.1,
) -> Float[Array, "K N T"]:
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
