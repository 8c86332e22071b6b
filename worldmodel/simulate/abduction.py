"""Abduction: the noise behind a recorded path."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import History


def abduct_noise(
    world_model: WorldModel, start: History, plan: jax.Array, recorded: jax.Array
) -> jax.Array:
    """The noise that explains what was recorded: eps = (x' - mu) / sigma (Pearl's abduction).

    Replayed under the factual plan it gives back the factual rows; under another plan it gives
    the counterfactual ones.

    Args:
      world_model: of ensemble size 1.
      start: P patients.
      plan: [P, H] the treatments really given, joint actions.
      recorded: [P, H, 39] the rows that followed, z-scores.

    Returns:
      [P, 1, H, 39], for `rollout(..., samples=1, noise=...)`.

    Raises:
      InputError: the world model is an ensemble.
    """
    if world_model.num_members != 1:
        raise InputError("noise is abducted in one model; pick one with .member(i)")

    def step(history: History, inputs: tuple[jax.Array, jax.Array]) -> tuple[History, jax.Array]:
        action, obs = inputs
        history = history.choose(action)
        mu, log_sigma, _ = world_model.transition(*history.window(schema.STATE_WINDOW))
        urine = world_model.scaler.denormalize(obs)[:, schema.URINE]
        return history.append(obs, urine, history.ventilated), (obs - mu) * jnp.exp(-log_sigma)

    inputs = (jnp.moveaxis(jnp.asarray(plan), 1, 0), jnp.moveaxis(jnp.asarray(recorded), 1, 0))
    _, eps = jax.lax.scan(step, start, inputs)
    return jnp.moveaxis(eps, 0, 1)[:, None]
