"""ICU-Sepsis as an environment: 716 states, reward 1 for survival."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from worldmodel import keys
from worldmodel.envs.base import Timestep, first_timestep
from worldmodel.mdp import icu_sepsis

MAX_STEPS = 500  # where the package `icu-sepsis` cuts episodes off


@struct.dataclass
class TableState:
    """State of one patient."""

    number: jax.Array  # [] int32 state
    step: jax.Array  # [] int32
    key: jax.Array  # [] of the episode


@struct.dataclass
class TableDynamics:
    """Tables of S states and A actions; the observation is the number of the state."""

    next_state: jax.Array  # [S, A, S] cumulative probabilities of the next state
    reward: jax.Array  # [S, A, S]
    start: jax.Array  # [S] cumulative
    terminal: jax.Array  # [S] bool
    admissible: jax.Array  # [S, A] 1 where the action occurs in the records
    sofa: jax.Array  # [S]

    @property
    def num_states(self) -> int:
        """Number of states S."""
        return self.terminal.shape[0]

    def reset(self, key: jax.Array) -> tuple[TableState, Timestep]:
        """Draws a start state."""
        number = _draw(self.start, jax.random.fold_in(key, keys.START_STATE))
        state = TableState(number, jnp.int32(0), key)
        return state, first_timestep(number, sofa=self.sofa[number])

    def step(self, state: TableState, action: Int[Array, ""]) -> tuple[TableState, Timestep]:
        """One transition; the noise depends on the key and the step alone."""
        key = jax.random.fold_in(state.key, state.step + 1)
        number = _draw(self.next_state[state.number, action], key)
        earned = self.reward[state.number, action, number]
        ended = self.terminal[number]
        start = first_timestep(number, sofa=self.sofa[number])
        info = replace(
            start.info,
            reward_terms=start.info.reward_terms.at[-1].set(earned),
            mortality=jnp.where(ended, 1.0 - earned, jnp.nan),
            support=self.admissible[state.number, action],
        )
        timestep = replace(start, reward=earned, terminated=ended, info=info)
        return TableState(number, state.step + 1, state.key), timestep


def icu_sepsis_dynamics() -> TableDynamics:
    """The tables of the package `icu-sepsis`.

    Raises:
      InputError: it is not installed.
    """
    mdp = icu_sepsis(exploration=0.0)
    return TableDynamics(
        next_state=jnp.asarray(mdp.transition.cumsum(-1), jnp.float32),
        reward=jnp.asarray(mdp.reward, jnp.float32),
        start=jnp.asarray(mdp.start.cumsum(), jnp.float32),
        terminal=jnp.asarray(mdp.terminal),
        admissible=jnp.asarray(mdp.admissible, jnp.float32),
        sofa=jnp.asarray(np.asarray(mdp.sofa), jnp.float32),
    )


def _draw(cumulative: jax.Array, key: jax.Array) -> jax.Array:
    """[] int32 index by the inverse of cumulative probabilities [S]."""
    chance = jax.random.uniform(key) * cumulative[-1]
    return (cumulative <= chance).sum().astype(jnp.int32)
