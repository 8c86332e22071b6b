"""Dynamics of the synthetic world, whose true outcomes and probabilities are known."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from worldmodel import keys, struct
from worldmodel.clinical import reward
from worldmodel.envs.base import Timestep, first_timestep, reward_terms
from worldmodel.observation import PolicyFn
from worldmodel.scaling import Scaler, published_scaler
from worldmodel.synthetic import clinician, world


@struct.dataclass
class SyntheticState:
    """One patient of the synthetic world."""

    world: world.State
    key: jax.Array  # [] the patient's


@struct.dataclass
class SyntheticDynamics:
    """The synthetic world; the episode ends with death, release or the end of the window."""

    params: world.Params
    behavior: PolicyFn | None  # None: the recorded clinician
    config: world.Config = struct.field(pytree_node=False)

    @property
    def scaler(self) -> Scaler:
        """The published scaler: the synthetic world has no training data to fit one on."""
        return published_scaler()

    @property
    def last_step(self) -> int:
        """Highest row number that an episode can reach."""
        return self.config.horizon

    def reset(self, key: jax.Array) -> tuple[SyntheticState, Timestep]:
        """A patient at admission.

        With `patient_key(world_key, i)` it is patient i of `generate(world_key, ...)`.
        """
        start = world.reset(key, self.params, config=self.config)
        observation = start.observation
        ventilation = observation.ventilated.astype(jnp.float32)
        timestep = first_timestep(observation, sofa=observation.sofa, ventilation=ventilation)
        return SyntheticState(start, key), timestep

    def step(
        self, state: SyntheticState, action: Int[Array, ""]
    ) -> tuple[SyntheticState, Timestep]:
        """One step of four hours."""
        before = state.world.observation
        moved, transition = world.step(
            state.key, state.world, action, self.params, config=self.config
        )
        after, ended = moved.observation, transition.done
        terms = reward_terms(before, after, ended, reward.terminal_reward(transition.died_90d))
        start = first_timestep(
            after, sofa=after.sofa, ventilation=after.ventilated.astype(jnp.float32)
        )
        late = world.late_death(moved.latent, moved.traits, self.params.outcome)
        info = replace(
            start.info,
            reward_terms=terms,
            mortality=jnp.where(ended, transition.died_90d.astype(jnp.float32), late),
            support=self._probabilities(state)[action],
        )
        timestep = replace(start, reward=terms.sum(), terminated=ended, info=info)
        return SyntheticState(moved, state.key), timestep

    def _probabilities(self, state: SyntheticState) -> jax.Array:
        observation = state.world.observation
        if self.behavior is None:
            frailty = state.world.traits.frailty
            return clinician.probabilities(observation, frailty, self.params.clinician)
        return self.behavior(
            jax.random.fold_in(state.key, keys.BEHAVIOR + observation.step.astype(jnp.uint32)),
            observation,
        )
