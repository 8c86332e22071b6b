"""The protocol of policies: a distribution over the 25 actions for an observation.

Also the features of an observation that learned policies read.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.observation import (
    NUM_STATE_FEATURES,
    Observation,
    PolicyFn,
    as_pytree,
    draw_action,
    observation_at,
    state_features,
)
from worldmodel.observation import PolicyFn as SomePolicy
from worldmodel.resources import in_blocks
from worldmodel.scaling import Scaler


class Policy:
    """A PyTree (a `worldmodel.struct` dataclass), called as `policy(key, observation) -> [25]`.

    One call is for one patient; worlds and `action_probs` map it over patients. Whatever takes
    a policy takes a plain function of the same signature too.
    """

    past: ClassVar[int] = 0
    """Rows of `Observation.past` that the policy looks back on."""

    def __call__(self, key: jax.Array, observation: Observation) -> Float[Array, " 25"]:
        """Probabilities [25] of the joint actions; the key is consumed."""
        raise NotImplementedError

    def act(self, key: jax.Array, observation: Observation) -> Int[Array, ""]:
        """[] int32 joint action 0-24, drawn from the probabilities."""
        return draw_action(self, key, observation)

    def action_probs(
        self, episodes: Episodes, *, key: jax.Array | None = None, block: int = 1024
    ) -> Float[np.ndarray, "N T 25"]:
        """[N, T, 25] probabilities in every recorded row; see `action_probs`."""
        return action_probs(self, episodes, key=key, block=block)


def action_probs(
    policy: SomePolicy,
    episodes: Episodes,
    *,
    key: jax.Array | None = None,
    block: int = 1024,
) -> Float[np.ndarray, "N T 25"]:
    """[N, T, 25] probabilities of a policy in every recorded row; uniform on padding.

    Args:
      policy: `(key, observation) -> [25]`; its attribute `past`, where it has one, asks for rows of
        `Observation.past`.
      episodes: the stays.
      key: of policies that draw; consumed.
      block: rows per call; bounds the memory.
    """
    key = jax.random.key(0) if key is None else key
    probs = np.full(
        (episodes.num_stays, episodes.num_steps, schema.NUM_ACTIONS),
        1.0 / schema.NUM_ACTIONS,
        np.float32,
    )
    stay, step = np.nonzero(np.asarray(episodes.valid))
    on_rows = partial(_on_rows, as_pytree(policy), key, episodes, past=getattr(policy, "past", 0))
    if len(stay):
        found = in_blocks(lambda rows: on_rows(rows, stay[rows], step[rows]), len(stay), block)
        probs[stay, step] = found
    return probs


@partial(jax.jit, static_argnames="past")
def _on_rows(
    policy: PolicyFn,
    key: jax.Array,
    episodes: Episodes,
    row: jax.Array,
    stay: jax.Array,
    step: jax.Array,
    *,
    past: int,
) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
    result: jax.Array = jax.vmap(policy)(keys, observation_at(episodes, stay, step, past=past))
    return result


def decision_features(observation: Observation, scaler: Scaler) -> Float[Array, "*b D"]:
    """[..., D] `state_features`, with the changes and treatments of `Observation.past`.

    For each earlier row: z-scored change of the measurements since, and both levels; zero where
    there was no such row.

    Args:
      observation: leaves [..., ...], with `past` rows H (or none).
      scaler: of measurements and static features.
    """
    blocks = [state_features(observation, scaler)]
    if observation.past is not None:
        past = observation.past
        z = scaler.normalize(past.dynamic)
        valid = past.valid[..., :-1, None]
        change = jnp.where(valid, jnp.clip(z[..., -1:, :] - z[..., :-1, :], -5.0, 5.0), 0.0)
        levels = jnp.stack([past.vasopressor, past.fluid], -1)[..., :-1, :]
        levels = jnp.where(valid, levels / (schema.NUM_LEVELS - 1), 0.0)
        rows = jnp.concatenate([change, levels, valid.astype(jnp.float32)], -1)
        blocks.append(rows.reshape(*rows.shape[:-2], -1))
    return jnp.concatenate(blocks, -1)


def feature_width(past: int) -> int:
    """D of `decision_features` with so many rows of `Observation.past`."""
    return NUM_STATE_FEATURES + max(past - 1, 0) * (schema.NUM_FEATURES + 3)
