"""What a planner needs to know beside the world model, fitted on records."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from policy.base import Policy
from policy.offline.data import Transitions, transitions
from policy.offline.policies import OfflinePolicy
from policy.planner.advantage import PAST, effects, fit_advantage, moderators
from policy.planner.configuration import PlannerConfig
from policy.planner.search import Planner
from worldmodel import schema
from worldmodel.blocks import in_blocks
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.windows import to_sequences
from worldmodel.models.world_model import WorldModel
from worldmodel.view import view_at

_BLOCK = 2048  # rows per call


def fit_planner(
    episodes: Episodes,
    world_model: WorldModel,
    critic: OfflinePolicy,
    clinician: Policy,
    config: PlannerConfig | None = None,
) -> Planner:
    """A planner for the world model.

    Args:
      episodes: of which the training split is used.
      world_model: to search.
      critic: trained by implicit Q-learning on the same split; its value V is used.
      clinician: whose habit the planner improves on, such as a clone.
      config: settings.

    Raises:
      InputError: the critic has no value function, or there are no training stays.
    """
    config = config or PlannerConfig()
    if "v" not in critic.networks:
        raise InputError(
            f"planner: a critic trained by {critic.config.algorithm} has no value of states; "
            "give one trained by iql"
        )
    train = episodes.of_split("train")
    if not train.num_stays:
        raise InputError("planner: the training split has no stays; use a larger cohort")
    scaler = world_model.scaler
    stay, step = np.nonzero(np.asarray(train.valid))
    features = np.asarray(transitions(train, scaler, past=PAST).features)
    moderator = np.asarray(moderators(view_at(train, jnp.asarray(stay), jnp.asarray(step)), scaler))
    advantage = fit_advantage(
        features,
        moderator,
        _predicted_effects(world_model, train, stay, step),
        clinician.action_probs(train)[stay, step],
        np.asarray(train.action)[stay, step],
        temporal_difference(critic, transitions(train, critic.scaler, past=critic.past)),
        scaler,
        ridge=config.ridge,
    )
    return Planner(world_model, advantage, clinician, config)


def temporal_difference(critic: OfflinePolicy, rows: Transitions) -> np.ndarray:
    """[M] r + gamma V(s') - V(s); at the end of a stay r - V(s)."""

    @jax.jit
    def value(features: jax.Array) -> jax.Array:
        return jax.vmap(lambda net: net(features)[:, 0])(critic.networks["v"]).mean(0)

    values = np.asarray(value(rows.features))
    following = np.where(np.asarray(rows.last), 0.0, np.roll(values, -1))
    return np.asarray(rows.reward) + critic.config.gamma * following - values


def _predicted_effects(
    world_model: WorldModel, train: Episodes, stay: np.ndarray, step: np.ndarray
) -> np.ndarray:
    """[M, 8] of the treatments that were given."""
    sequences = to_sequences(train, world_model.scaler)
    index = np.stack([stay, step], axis=1).astype(np.int32)

    @jax.jit
    def of_rows(rows: jax.Array) -> jax.Array:
        mu = world_model.transition(*sequences.window(rows, schema.STATE_WINDOW)).mu
        return effects(mu, world_model.scaler)

    return in_blocks(lambda rows: of_rows(jnp.asarray(index[rows])), len(index), _BLOCK)
