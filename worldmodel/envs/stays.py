"""Dynamics of a recurrent world model: stays that end by death, discharge or the window's end.

Each step draws whether the patient dies in the unit or is discharged (competing risks); where the
stay ends, the terminal reward is asked. With a `horizon` the episode ends after so many rows at
the latest, and the model says how the clinician would go on. With `follow_record` a stay is the
recorded one, its end and outcome included, up to the first treatment that was not given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp

from worldmodel import struct
from worldmodel.envs.base import Timestep, action_probability
from worldmodel.envs.learned import LearnedDynamics, LearnedState, choose
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import History
from worldmodel.simulate.randomness import branch_key, outcome_chances, policy_key, state_noise
from worldmodel.simulate.stay_unroll import append_row, step_history
from worldmodel.simulate.stays import (
    StayState,
    StayStep,
    continuation_at,
    encode_past,
    memory_of,
    pack_stays,
)

TreeT = TypeVar("TreeT")

_LONGEST = 2**31 - 1


@struct.dataclass
class RecurrentState(LearnedState):
    """One patient in a recurrent world model."""

    hidden: jax.Array  # [E, 1, H] of every member


@struct.dataclass
class RecurrentDynamics(LearnedDynamics):
    """`LearnedDynamics` of a recurrent world model."""

    def reset_to(self, key: jax.Array, stay: jax.Array) -> tuple[RecurrentState, Timestep]:
        """A given stay [] at its start row; the row and the member are drawn."""
        state, timestep = super().reset_to(key, stay)
        history = state.history
        hidden = self._read(history)
        last = state.last_row if self.horizon is not None else jnp.int32(_LONGEST)
        values = {name: getattr(state, name) for name in LearnedState.__dataclass_fields__}
        return RecurrentState(**values | {"last_row": last}, hidden=hidden), timestep

    def step(self, state: LearnedState, action: jax.Array) -> tuple[RecurrentState, Timestep]:
        """One step of four hours, with which the stay may end."""
        assert isinstance(state, RecurrentState)
        history, before = state.history, self._observation(state.history)
        key = branch_key(state.key, history.patient[0], before.step, state.member)
        noise = state_noise(key, self.world_model.noise_width)[None]
        after, found, mortality = self._of_members(
            lambda member, hidden: self._step_of(member, history, hidden, action, noise),
            state.hidden,
        )
        mean = found.prediction.mu  # [E, 1, 39]
        drawn, found, mortality = jax.tree.map(
            lambda leaf: leaf[state.member], (after, found, mortality)
        )
        death, discharge, later = found.risks[0, 0], found.risks[0, 1], found.risks[0, 2]
        chances = outcome_chances(key, 3)
        died = chances[0] < death
        left = ~died & (chances[1] < discharge)
        cut = ~died & ~left & (before.step >= state.last_row)
        terminated = died | left | cut
        risk = jnp.where(died, 1.0, jnp.where(left, later, mortality[0]))
        moved, outputs = append_row(self.world_model, history, drawn, found)
        next_row = (moved, outputs.ventilation[0], after.hidden)
        on_record, deviated = self.followed(state, action, before.step)
        if self.follow_record:
            recorded = self._recorded(state.stay, before.step + 1)
            known = (recorded, recorded.ventilated[0].astype(jnp.float32), self._read(recorded))
            next_row = choose(on_record, known, next_row)
            recorded_end = before.step >= self.episodes.length[state.stay] - 1
            terminated = jnp.where(on_record, recorded_end, terminated)
            died = self.episodes.died_90d[state.stay] & terminated & on_record | died & ~on_record
            risk = jnp.where(on_record, died.astype(jnp.float32), risk)
        final = {
            "expected": risk,
            "threshold": risk > 0.5,
            "sampled": died | (chances[2] < risk),
        }[self.outcome]
        stayed = (state.history, state.ventilation, state.hidden)
        history, ventilation, hidden = choose(terminated, stayed, next_row)
        state = replace(
            state,
            history=history,
            ventilation=ventilation,
            hidden=hidden,
            ended=terminated,
            on_record=on_record,
            deviated=deviated,
        )
        support = action_probability(self.behavior, policy_key(key), before, action)
        return state, self._timestep(
            state,
            before,
            final,
            mortality=risk,
            projected=jnp.where(terminated | on_record, 0, outputs.projected[0]),
            support=found.support[0] if self.behavior is None else support,
            disagreement=mean.std(0).mean(),
        )

    def _read(self, history: History) -> jax.Array:
        """[E, 1, H] every member's state after all rows of a history."""
        return self._of_members(lambda member: encode_past(pack_stays(member), memory_of(history)))

    def _step_of(
        self,
        member: WorldModel,
        history: History,
        hidden: jax.Array,
        action: jax.Array,
        noise: jax.Array,
    ) -> tuple[StayState, StayStep, jax.Array]:
        """A member's step, and the mortality [1] if the clinician goes on after it."""
        kernel = pack_stays(member)
        after, found = step_history(member, kernel, history.choose(action[None]), hidden, noise)
        later = continuation_at(kernel, after, history.static, history.step + 1)
        return after, found, jax.nn.sigmoid(later.mortality_logit)

    def _of_members(self, function: Callable[..., TreeT], *leaves: jax.Array) -> TreeT:
        """Results of every member, with a leading axis E."""
        models = (self.world_model.state_model, self.world_model.outcome_model)
        result: TreeT = jax.vmap(
            lambda models, *rest: function(self.world_model.with_models(models), *rest)
        )(models, *leaves)
        return result
