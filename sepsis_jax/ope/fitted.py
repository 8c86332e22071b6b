"""Fitted models that some estimators need: values, densities and weights.

Marginal density ratios are visits of a state at step t by a policy over those by the clinician:

    omega_0 = 1,   omega_t+1(s') = E[omega_t(s_t) rho_t | s_t+1 = s', still in the unit],
    mu_t = omega_t(s_t) rho_t

(Xie, Ma & Wang 2019). The expectation is a mean over visits of a discrete state, or a ridge
regression on features, held at or above 0. Weights are not products over all earlier
steps; in return the state is assumed to be Markov.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from sepsis_jax.ope import doubly_robust, fqe
from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import Batch, Values
from sepsis_jax.ope.fqe import action_basis
from sepsis_jax.ope.weights import weigh
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
            mrdr_values = doubly_robust.fit_mrdr(
                data, probs, log_ratio, basis, fold, gamma=gamma, folds=folds
            )
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
