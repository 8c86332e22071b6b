"""Recorded stays as transitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from policy.features import decision_features
from worldmodel.blocks import in_blocks
from worldmodel.clinical.reward import episode_rewards
from worldmodel.episodes import Episodes
from worldmodel.scaling import Scaler
from worldmodel.view import view_at


@struct.dataclass
class Transitions:
    """M recorded steps in order, stay after stay: row m + 1 follows row m unless it is the last.

    A stay's last row has no next state: its reward is the terminal one.
    """

    features: jax.Array  # [M, D]
    action: jax.Array  # [M] int32
    reward: jax.Array  # [M]
    last: jax.Array  # [M] bool, the stay ends with this row
    sofa: jax.Array  # [M]

    @property
    def num_rows(self) -> int:
        return self.action.shape[0]


def transitions(episodes: Episodes, scaler: Scaler, *, past: int, block: int = 4096) -> Transitions:
    """Transitions of all stays.

    Args:
      episodes: the stays.
      scaler: of measurements and static features.
      past: rows that the features look back on.
      block: rows per call; bounds the memory.
    """
    stay, step = np.nonzero(np.asarray(episodes.valid))

    @jax.jit
    def of_rows(stays: jax.Array, steps: jax.Array) -> jax.Array:
        return decision_features(view_at(episodes, stays, steps, past=past), scaler)

    features = in_blocks(lambda rows: of_rows(stay[rows], step[rows]), len(stay), block)
    return Transitions(
        features=jnp.asarray(features),
        action=episodes.action[stay, step],
        reward=episode_rewards(episodes)[stay, step],
        last=jnp.asarray(step == np.asarray(episodes.length)[stay] - 1),
        sofa=episodes.sofa[stay, step],
    )
