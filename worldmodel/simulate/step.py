"""One simulated step: predict, project, score."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from worldmodel import schema
from worldmodel.clinical import reward, sofa
from worldmodel.models.clinical_model import Prediction
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import History
from worldmodel.simulate.projection import project

MODES = ("corrected", "reference")

_LACTATE = schema.INDEX["lactate"]


class StepOutputs(NamedTuple):
    """What a simulated step brought, each [B]."""

    ventilation: jax.Array  # probability
    reward: jax.Array
    projected: jax.Array  # int32 entries moved into range


def advance(
    world_model: WorldModel, history: History, action: jax.Array, eps: jax.Array, *, mode: str
) -> tuple[History, StepOutputs]:
    """One step of B branches in a world model of one member.

    Args:
      world_model: of ensemble size 1.
      history: branches, each about to be treated.
      action: [B] joint action 0-24.
      eps: [B, 39] standard normal noise.
      mode: "corrected" or "reference".
    """
    history = history.choose(action)
    prediction = world_model.transition(*history.window(schema.STATE_WINDOW))
    return follow(world_model, history, prediction, eps, mode=mode)


def follow(
    world_model: WorldModel, history: History, prediction: Prediction, eps: jax.Array, *, mode: str
) -> tuple[History, StepOutputs]:
    """`advance` with the prediction given, for histories whose treatment is chosen."""
    action = history.action[:, -1]
    obs = prediction.mu + jnp.exp(prediction.log_sigma) * eps
    projected = jnp.zeros(action.shape, jnp.int32)
    if mode == "corrected":
        obs, projected = project(obs, world_model.scaler)
    dynamic = world_model.scaler.denormalize(obs)
    before = world_model.scaler.denormalize(history.obs[:, -1])
    ventilation = jax.nn.sigmoid(prediction.vent_logit)
    moved = history.append(obs, dynamic[:, schema.URINE], ventilation > 0.5)
    score = _score(world_model, dynamic, action, history, moved, mode).total
    step_reward = reward.step_reward(history.sofa, score, before[:, _LACTATE], dynamic[:, _LACTATE])
    return replace(moved, sofa=score), StepOutputs(ventilation, step_reward, projected)


def _score(
    world_model: WorldModel,
    dynamic: jax.Array,
    action: jax.Array,
    history: History,
    moved: History,
    mode: str,
) -> sofa.SofaScore:
    vasopressor, _ = schema.action_levels(action)
    if mode == "reference":
        return sofa.reference(
            dynamic,
            ventilated=moved.ventilated,
            vasopressor_level=vasopressor,
            urine_before=history.urine.sum(-1),
        )
    doses = jnp.asarray(schema.level_doses(world_model.dose_edges.vasopressor))
    return sofa.standard(
        dynamic,
        ventilated=moved.ventilated,
        vasopressor_dose=doses[vasopressor],
        urine_24h=moved.urine_24h(),
    )
