"""Training losses of the two models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from worldmodel.models.clinical_model import OutcomeModel, Prediction, StateModel
from worldmodel.models.windows import Sequences, Target

LOG_2PI = 1.8378770664093453


def gaussian_nll(target: jax.Array, mu: jax.Array, log_sigma: jax.Array) -> jax.Array:
    """Negative log density, elementwise, in nats."""
    error = (target - mu) * jnp.exp(-log_sigma)
    return 0.5 * (jnp.square(error) + LOG_2PI) + log_sigma


def state_loss(
    prediction: Prediction, target: Target, *, imputed_weight: float, vent_weight: float
) -> jax.Array:
    """Gaussian NLL plus ventilation cross-entropy, mean over the batch.

    Args:
      prediction: of the State Model, [B, ...].
      target: what was recorded.
      imputed_weight: weight of entries that were not measured in the step; measured ones
        count 1. At 1 every entry counts alike, as in the reference system.
      vent_weight: weight of the cross-entropy.
    """
    nll = gaussian_nll(target.obs, prediction.mu, prediction.log_sigma)
    weight = jnp.where(target.measured, 1.0, imputed_weight)
    cross_entropy = optax.sigmoid_binary_cross_entropy(
        prediction.vent_logit, target.ventilated.astype(jnp.float32)
    )
    total = jnp.maximum(weight.sum(), 1e-6)  # 0 where nothing counts
    return (nll * weight).sum() / total + vent_weight * cross_entropy.mean()


def state_model_loss(
    model: StateModel,
    sequences: Sequences,
    index: jax.Array,
    key: jax.Array | None,
    *,
    window: int,
    imputed_weight: float,
    vent_weight: float,
) -> jax.Array:
    """`state_loss` of the transitions `index` [B, 2] (stay, step)."""
    return state_loss(
        model(*sequences.window(index, window), key=key),
        sequences.target(index),
        imputed_weight=imputed_weight,
        vent_weight=vent_weight,
    )


def outcome_model_loss(
    model: OutcomeModel,
    sequences: Sequences,
    index: jax.Array,
    key: jax.Array | None,
    *,
    window: int,
) -> jax.Array:
    """Cross-entropy of 90-day death at the rows `index` [B, 2] (stay, step)."""
    logit = model(*sequences.window(index, window), key=key)
    died = sequences.died_90d[index[:, 0]].astype(jnp.float32)
    return optax.sigmoid_binary_cross_entropy(logit, died).mean()
