"""The timestep that an environment returns, and the protocol of its dynamics."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from worldmodel import schema
from worldmodel.clinical import reward
from worldmodel.observation import Observation, PolicyFn

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
    final_observation: Any = None  # with automatic reset only: what the step led to


@struct.dataclass
class Timestep:
    """What `reset` and `step` return; scalars except `observation` and `info`."""

    observation: Any  # an `Observation`, or the number of a state for discrete dynamics
    reward: jax.Array  # float32
    terminated: jax.Array  # bool, the episode is over and has its outcome
    truncated: jax.Array  # bool, the episode was cut off: no outcome, no terminal reward
    info: Info

    @property
    def done(self) -> jax.Array:
        """[] bool, terminated or truncated."""
        return self.terminated | self.truncated


class Dynamics(Protocol):
    """A simulator of one patient at a time: a PyTree whose methods are pure and traceable."""

    def reset(self, key: jax.Array) -> tuple[Any, Timestep]:
        """A patient at the start of an episode; the key is its only randomness."""
        ...

    def step(self, state: Any, action: jax.Array) -> tuple[Any, Timestep]:
        """One step under an action [] 0-24; undefined once the episode has terminated."""
        ...


def first_timestep(
    observation: Any, *, sofa: jax.Array, ventilation: jax.Array | float = jnp.nan
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
    before: Observation, after: Observation, terminated: jax.Array, final: jax.Array
) -> jax.Array:
    """[4] terms of a step between two rows; a step that ends the episode earns `final` alone."""
    shaping = reward.step_terms(
        before.sofa, after.sofa, before.dynamic[_LACTATE], after.dynamic[_LACTATE]
    )
    none = jnp.zeros(())
    return jnp.where(terminated, jnp.stack([none, none, none, final]), jnp.stack([*shaping, none]))


def action_probability(
    behavior: PolicyFn | None, key: jax.Array, observation: Observation, action: jax.Array
) -> jax.Array:
    """[] probability of an action under a policy; NaN without one."""
    return jnp.full((), jnp.nan) if behavior is None else behavior(key, observation)[action]
