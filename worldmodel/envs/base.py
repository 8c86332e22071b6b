"""What environments have in common: timesteps, the protocol of dynamics, and whole episodes."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from worldmodel import keys, schema, struct
from worldmodel.clinical import reward
from worldmodel.observation import (
    INVALID_ACTION,
    Observation,
    PolicyFn,
    draw_action,
    recent,
    refuse_invalid,
)

REWARD_TERMS = ("unchanged_sofa", "sofa_change", "lactate_change", "terminal")

_LACTATE = schema.INDEX["lactate"]


@struct.dataclass
class Info:
    """Further results of a step; scalars except `reward_terms`, NaN where unknown.

    SOFA and ventilation are those of the observed row; the rest belongs to the treatment before.
    """

    sofa: jax.Array  # points
    reward_terms: jax.Array  # [4] in the order of REWARD_TERMS; they add up to the reward
    ventilation: jax.Array  # probability; 0 or 1 where it is known
    mortality: jax.Array  # probability of death within 90 days if the episode ended here
    projected: jax.Array  # int32 entries moved into their physiologic range
    support: jax.Array  # probability of the action under the behaviour policy
    disagreement: jax.Array  # SD of the members' mean predictions, z-scores, mean over features
    final_observation: object = None  # with automatic reset only: what the step led to


@struct.dataclass
class Timestep:
    """What `reset` and `step` return; scalars except `observation` and `info`."""

    observation: Any  # an `Observation`, or the number of a state for discrete dynamics
    reward: jax.Array  # float32
    terminated: jax.Array  # bool, the episode is over and has its outcome
    truncated: jax.Array  # bool, the episode was cut off: no outcome, no terminal reward
    info: Info

    @property
    def done(self) -> Bool[Array, "*b"]:
        """[] bool, terminated or truncated."""
        return self.terminated | self.truncated


class Dynamics(Protocol):
    """A simulator of one patient at a time: a PyTree whose methods are pure and traceable."""

    def reset(self, key: jax.Array) -> tuple[Any, Timestep]:
        """A patient at the start of an episode; the key is its only randomness."""
        ...

    def step(self, state: Any, action: jax.Array) -> tuple[Any, Timestep]:
        """One step under an action [] from 0; undefined once the episode has terminated."""
        ...


def first_timestep(
    observation: object, *, sofa: Num[Array, ""], ventilation: jax.Array | float = jnp.nan
) -> Timestep:
    """The timestep of a reset: reward 0, neither terminated nor truncated."""
    zero, unknown = jnp.zeros(()), jnp.full((), jnp.nan)
    info = Info(
        sofa=jnp.asarray(sofa, jnp.float32),
        reward_terms=jnp.zeros(len(REWARD_TERMS)),
        ventilation=jnp.asarray(ventilation, jnp.float32),
        mortality=unknown,
        projected=jnp.int32(0),
        support=unknown,
        disagreement=zero,
    )
    return Timestep(observation, zero, jnp.bool_(False), jnp.bool_(False), info)


def reward_terms(
    before: Observation, after: Observation, terminated: Bool[Array, ""], final: Float[Array, ""]
) -> Float[Array, " 4"]:
    """[4] terms of a step between two rows; a step that ends the episode earns `final` alone."""
    shaping = reward.step_terms(
        before.sofa, after.sofa, before.dynamic[_LACTATE], after.dynamic[_LACTATE]
    )
    none = jnp.zeros(())
    return jnp.where(terminated, jnp.stack([none, none, none, final]), jnp.stack([*shaping, none]))


def action_probability(
    behavior: PolicyFn | None, key: jax.Array, observation: Observation, action: Int[Array, "*k"]
) -> Float[Array, "*k"]:
    """[...] probabilities of actions [...] under a policy; NaN without one."""
    return jnp.full((), jnp.nan) if behavior is None else behavior(key, observation)[action]


StateT = TypeVar("StateT")


class Environment(Protocol[StateT]):
    """What `unroll` needs, as `SepsisEnv` and `AutoReset` have it."""

    @property
    def num_actions(self) -> int:
        """Number of actions A."""
        ...

    def reset(self, key: jax.Array) -> tuple[StateT, Timestep]:
        """The first state and timestep of a key []."""
        ...

    def step(self, state: StateT, action: jax.Array) -> tuple[StateT, Timestep]:
        """The next state and timestep under an action [] int32."""
        ...


@struct.dataclass
class FollowActions:
    """Fixed actions in place of a policy in `unroll`: the action of step t is `actions[t]`."""

    actions: jax.Array  # [T] int32 actions


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
      policy: `(key, observation) -> [A]` probabilities. `FollowActions` plays fixed actions.
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
      InputError: the observations hold fewer past rows than the policy needs, or the policy gives
        no A finite probabilities that sum to 1; within `jax.jit` the action is `INVALID_ACTION`
        and the reward NaN instead.
    """
    state, first = env.reset(key) if start is None else start
    own = jax.random.fold_in(key if policy_key is None else policy_key, keys.UNROLL)
    rows: int = getattr(policy, "past", 0) if past is None else past

    def choose(number: jax.Array, observation: Observation) -> jax.Array:
        if isinstance(policy, FollowActions):
            return policy.actions[number]
        if isinstance(observation, Observation):  # otherwise it is the number of a state
            observation = recent(observation, rows)
        return draw_action(policy, jax.random.fold_in(own, number), observation, env.num_actions)

    def step(
        carry: tuple[StateT, Timestep], number: jax.Array
    ) -> tuple[tuple[StateT, Timestep], tuple[jax.Array, Timestep]]:
        state, last = carry
        action = choose(number, last.observation)
        after, timestep = env.step(state, action)
        return (after, timestep), (action, timestep)

    (state, _), (actions, timesteps) = jax.lax.scan(step, (state, first), jnp.arange(num_steps))
    if not isinstance(actions, jax.core.Tracer):
        refuse_invalid(actions == INVALID_ACTION, env.num_actions)
    return state, Trajectory(first, actions, timesteps)
