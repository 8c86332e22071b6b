"""Episodes one after another, without a reset by the caller."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from worldmodel.envs.base import Timestep
from worldmodel.envs.env import EnvState, SepsisEnv, episode_key
from worldmodel.errors import InputError

NEXT_STEP, SAME_STEP = "next-step", "same-step"
AUTORESETS = (NEXT_STEP, SAME_STEP)


@struct.dataclass
class AutoResetState:
    """The running episode and how many there were before."""

    env: EnvState
    key: jax.Array  # []
    episode: jax.Array  # [] int32


@struct.dataclass
class AutoReset:
    """An environment that starts the next episode by itself.

    - "next-step": the step that ends an episode returns its last observation; the step after it
      takes no action but returns the first observation of the next episode, with reward 0.
    - "same-step": the step that ends an episode already returns the first observation of the
      next one, beside the reward, flags and info of the step that ended.

    Either way `info.final_observation` holds what the step itself led to. Episode n has the key
    `episode_key(key, n)`.
    """

    env: SepsisEnv
    mode: str = struct.field(pytree_node=False, default=NEXT_STEP)

    def __post_init__(self) -> None:
        if self.mode not in AUTORESETS:
            raise InputError(f"mode: got {self.mode!r}, expected one of {AUTORESETS}")

    def reset(self, key: jax.Array) -> tuple[AutoResetState, Timestep]:
        """The first episode of a key []."""
        state, timestep = self.env.reset(episode_key(key, 0))
        return AutoResetState(state, key, jnp.int32(0)), _with_final(timestep, timestep)

    def next_episode(self, state: AutoResetState) -> tuple[AutoResetState, Timestep]:
        """Breaks the running episode off and starts the next."""
        number = state.episode + 1
        fresh, timestep = self.env.reset(episode_key(state.key, number))
        return AutoResetState(fresh, state.key, number), _with_final(timestep, timestep)

    def step(self, state: AutoResetState, action: jax.Array) -> tuple[AutoResetState, Timestep]:
        """One step under an action [] 0-24, or a reset; see the class."""
        over = state.env.last.done
        moved, timestep = self.env.step(state.env, action)
        ends = timestep.done if self.mode == SAME_STEP else over
        number = state.episode + ends
        fresh, first = self.env.reset(episode_key(state.key, number))

        def pick(old: Any, new: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(ends, b, a), old, new)

        if self.mode == SAME_STEP:
            shown = replace(timestep, observation=pick(timestep.observation, first.observation))
        else:
            shown = timestep = pick(timestep, first)
        after = AutoResetState(pick(moved, fresh), state.key, number)
        return after, _with_final(shown, timestep)


def _with_final(shown: Timestep, played: Timestep) -> Timestep:
    info = replace(shown.info, final_observation=played.observation)
    return replace(shown, info=info)
