"""Fitted models that some estimators need: values, densities and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sepsis_jax.ope import doubly_robust, fqe, marginal
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

    def select(self, index: Any, steps: int) -> Fitted:
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
    target_probs: Mapping[str, Any],
    *,
    method: str = "linear",
    gamma: float = 1.0,
    folds: int = 2,
    state: jax.Array | None = None,
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
    options: dict[str, Any] = {"gamma": gamma, "folds": folds}
    mrdr_values = None
    if method == "tabular":
        if state is None or num_states is None:
            raise InputError("method 'tabular' needs discrete states and their number")
        values = fqe.tabular(data, state, both, fold, num_states=num_states, **options)
        marginals = marginal.tabular(
            data, state, log_ratio, fold, num_states=num_states, folds=folds
        )
    else:
        if data.features is None:
            raise InputError(f"method {method!r} needs features; see sepsis_jax.ope.fqe")
        basis = jnp.asarray(action_basis(probs.shape[-1]))
        if method == "linear":
            values = fqe.linear(data, both, basis, fold, **options)
        else:
            values = fqe.fit_neural(network_key, data, both, fold, config=config, **options)
        marginals = marginal.linear(data, log_ratio, fold, folds=folds)
        if known:
            mrdr_values = doubly_robust.fit_mrdr(data, probs, log_ratio, basis, fold, **options)
    policies = len(target_probs)
    return Fitted(
        values=Values(values.q[:policies], values.v[:policies]),
        mrdr_values=mrdr_values,
        marginal=marginals,
        clinician_value=fqe.clinician_value(values, policies) if known else None,
    )
