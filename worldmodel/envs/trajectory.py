"""Whole episodes: play a policy in an environment with one `jax.lax.scan`."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from worldmodel import keys
from worldmodel.envs.base import Timestep
from worldmodel.observation import Observation, PolicyFn, draw_action, recent

StateT = TypeVar("StateT")


class Environment(Protocol[StateT]):
    """The methods that `unroll` needs, as `SepsisEnv` and `AutoReset` have them."""

    def reset(self, key: jax.Array) -> tuple[StateT, Timestep]:
        """The first state and timestep of a key []."""
        ...

    def step(self, state: StateT, action: jax.Array) -> tuple[StateT, Timestep]:
        """The next state and timestep under an action [] int32."""
        ...


@struct.dataclass
class FollowActions:
    """Fixed actions in place of a policy in `unroll`: the action of step t is `actions[t]`."""

    actions: jax.Array  # [T] int32 joint actions


class Trajectory(NamedTuple):
    """T steps of one environment; leaves of `timesteps` are [T, ...]."""

    first: Timestep  # of the reset
    actions: jax.Array  # [T] int32; action t was chosen after timestep t - 1, or after `first`
    timesteps: Timestep  # timestep t is what action t led to


def unroll(
    env: Environment[StateT],
    policy: PolicyFn | FollowActions,
    key: jax.Array,
    *,
    num_steps: int,
    policy_key: jax.Array | None = None,
    past: int | None = None,
    start: tuple[StateT, Timestep] | None = None,
) -> tuple[StateT, Trajectory]:
    """Plays a policy in an environment for a number of steps.

    Works under `jax.jit` and `jax.vmap`; map it over keys [N] for N patients. After the end of
    an episode the state of `SepsisEnv` no longer changes and rewards are 0; `AutoReset` starts
    the next episode.

    Args:
      env: one patient's environment, such as `SepsisEnv` or `AutoReset`.
      policy: `(key, observation) -> [25]` probabilities. `FollowActions` plays fixed actions.
      key: [] of the environment's reset; ignored for the reset where `start` is given.
      num_steps: steps T.
      policy_key: [] that the policy's keys are folded from; by default `key`. The key of step t is
        `fold_in(fold_in(policy_key, keys.UNROLL), t)`.
      past: rows of `Observation.past` that the policy is given; by default its attribute `past`, or
        0 where it has none. Give it for policies from `as_pytree`, which have no attributes.
      start: state and timestep to continue from instead of a reset.

    Returns:
      The state after T steps, and the trajectory.

    Raises:
      InputError: the observations hold fewer past rows than the policy needs.
    """
    state, first = env.reset(key) if start is None else start
    own = jax.random.fold_in(key if policy_key is None else policy_key, keys.UNROLL)
    rows: int = getattr(policy, "past", 0) if past is None else past

    def choose(number: jax.Array, observation: Observation) -> jax.Array:
        if isinstance(policy, FollowActions):
            return policy.actions[number]
        if isinstance(observation, Observation):  # otherwise it is the number of a state
            observation = recent(observation, rows)
        return draw_action(policy, jax.random.fold_in(own, number), observation)

    def step(
        carry: tuple[StateT, Timestep], number: jax.Array
    ) -> tuple[tuple[StateT, Timestep], tuple[jax.Array, Timestep]]:
        state, last = carry
        action = choose(number, last.observation)
        after, timestep = env.step(state, action)
        return (after, timestep), (action, timestep)

    (state, _), (actions, timesteps) = jax.lax.scan(step, (state, first), jnp.arange(num_steps))
    return state, Trajectory(first, actions, timesteps)
