"""Dynamics of a learned world model, started from recorded rows.

The protocol is SepsisAgent's: the treatment of the last row ends the episode, and the Outcome
Model predicts mortality from that row and its treatment; no further row is simulated. A recorded
stay of L rows that starts in row t thus takes L - t decisions, as in
`reward.trajectory_rewards`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from worldmodel import keys, schema, struct
from worldmodel.clinical import reward
from worldmodel.envs.base import (
    Timestep,
    action_probability,
    first_timestep,
    reward_terms,
)
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import Prediction
from worldmodel.models.windows import Sequences, Window, to_sequences
from worldmodel.models.world_model import WorldModel
from worldmodel.observation import (
    INVALID_ACTION,
    Observation,
    PolicyFn,
    as_pytree,
    draw_action,
    observation_at,
    refuse_invalid,
)
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import History, history_at, observe
from worldmodel.simulate.randomness import branch_key, outcome_chance, policy_key, state_noise
from worldmodel.simulate.step import MODES, follow

TreeT = TypeVar("TreeT")

OUTCOMES = ("expected", "threshold", "sampled")
RANDOM_ROW = "random"
_NEVER = 2**31 - 1


@struct.dataclass
class LearnedState:
    """One patient in the world model."""

    history: History  # B = 1
    ventilation: jax.Array  # [] probability in the newest row
    key: jax.Array  # [] of the episode
    member: jax.Array  # [] int32 ensemble member of the episode; also its sample number
    last_row: jax.Array  # [] int32, the row whose treatment ends the episode
    ended: jax.Array  # [] bool, that treatment was given
    stay: jax.Array  # [] int32 index of the recorded stay
    on_record: jax.Array  # [] bool, every treatment so far was the recorded one
    deviated: jax.Array  # [] int32 row of the first other treatment; out of reach until then


@struct.dataclass
class LearnedDynamics:
    """A world model and the stays it starts from; made by `learned_dynamics`."""

    world_model: WorldModel
    episodes: Episodes
    sequences: Sequences
    start_step: jax.Array | None  # [] int32; None: any row but the last
    horizon: jax.Array | None  # [] int32 simulated rows; None: to the end of the recorded stay
    behavior: PolicyFn | None
    mode: str = struct.field(pytree_node=False)
    outcome: str = struct.field(pytree_node=False)
    past: int = struct.field(pytree_node=False)
    mortality_each_step: bool = struct.field(pytree_node=False)
    follow_record: bool = struct.field(pytree_node=False, default=False)
    lagged_actions: bool = struct.field(pytree_node=False, default=False)

    @property
    def scaler(self) -> Scaler:
        """Scaler of the world model."""
        return self.world_model.scaler

    @property
    def last_step(self) -> int:
        """Highest row number that an episode can reach; for concrete values only."""
        return self.episodes.num_steps - 1 + (0 if self.horizon is None else int(self.horizon))

    def reset(self, key: jax.Array) -> tuple[LearnedState, Timestep]:
        """Draws a stay, its row and a member of the ensemble.

        The noise of a step depends on the key, the stay's id, the row and the member alone, as in
        `rollout`, whose sample number is the member here.
        """
        draw = _start_draws(key)[0]
        return self.reset_to(key, jax.random.randint(draw, (), 0, self.episodes.num_stays))

    def reset_to(self, key: jax.Array, stay: Int[Array, ""]) -> tuple[LearnedState, Timestep]:
        """`reset` to the stay with a given index []; the row and the member are drawn."""
        draws = _start_draws(key)
        member = jax.random.randint(draws[1], (), 0, self.world_model.num_members)
        length = self.episodes.length[stay]
        if self.start_step is None:
            row = jax.random.randint(draws[2], (), 0, jnp.maximum(length - 1, 1))
        else:
            row = self.start_step
        history = self._recorded(stay, row)
        state = LearnedState(
            history=history,
            ventilation=history.ventilated[0].astype(jnp.float32),
            key=key,
            member=member,
            last_row=length - 1 if self.horizon is None else row + self.horizon,
            ended=jnp.bool_(False),
            stay=jnp.asarray(stay, jnp.int32),
            on_record=jnp.bool_(self.follow_record),
            deviated=jnp.int32(_NEVER),
        )
        observation = self._observation(history)
        return state, first_timestep(
            observation, sofa=observation.sofa, ventilation=state.ventilation
        )

    def step(self, state: LearnedState, action: Int[Array, ""]) -> tuple[LearnedState, Timestep]:
        """One step of four hours; the treatment of the last row ends the episode instead."""
        before = self._observation(state.history)
        key = branch_key(state.key, state.history.patient[0], before.step, state.member)
        chosen = self.read_history(state).choose(action[None])
        members = self.world_model.transitions(*chosen.window(schema.STATE_WINDOW))
        prediction = Prediction(*(value[state.member] for value in members))
        moved, outputs = follow(
            self.world_model, chosen, prediction, state_noise(key)[None], mode=self.mode
        )
        if self.lagged_actions:  # the history keeps what was given, whatever the model read
            given = state.history.choose(action[None]).action[:, 1:]
            moved = replace(moved, action=moved.action.at[:, :-1].set(given))
        terminated = before.step >= state.last_row
        mortality = self._mortality(chosen, state.member, terminated & ~state.ended)
        next_row = (moved, outputs.ventilation[0])
        on_record, deviated = self.followed(state, action, before.step)
        if self.follow_record:
            recorded = self._recorded(state.stay, before.step + 1)
            next_row = choose(
                on_record,
                (recorded, recorded.ventilated[0].astype(jnp.float32)),
                next_row,
            )
            died = self.episodes.died_90d[state.stay].astype(jnp.float32)
            mortality = jnp.where(on_record & terminated, died, mortality)
        history, ventilation = choose(terminated, (state.history, state.ventilation), next_row)
        died = {
            "expected": mortality,
            "threshold": mortality > 0.5,
            "sampled": outcome_chance(key) < mortality,
        }[self.outcome]
        state = replace(
            state,
            history=history,
            ventilation=ventilation,
            ended=terminated,
            on_record=on_record,
            deviated=deviated,
        )
        return state, self._timestep(
            state,
            before,
            died,
            mortality=mortality,
            projected=jnp.where(terminated | on_record, 0, outputs.projected[0]),
            support=action_probability(self.behavior, policy_key(key), before, action),
            disagreement=members.mu.std(0).mean(),
        )

    def followed(
        self, state: LearnedState, action: jax.Array, row: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Whether [] the record is still followed, and the row [] of the first other treatment."""
        if not self.follow_record:
            return state.on_record, state.deviated
        on_record = state.on_record & (action == self.recorded_action(state.stay, row))
        return on_record, jnp.where(state.on_record & ~on_record, row, state.deviated)

    def recorded_action(self, stay: Int[Array, ""], row: Int[Array, "*r"]) -> Int[Array, "*r"]:
        """[...] joint actions of recorded rows; undefined where there is none."""
        at = (stay, row)
        return schema.action_index(self.episodes.vasopressor[at], self.episodes.fluid[at])

    def recorded_next(self, state: LearnedState) -> tuple[Observation, jax.Array, jax.Array]:
        """What the record says of the row after a patient's newest.

        Returns:
          Its observation, the joint action [] of the newest row that led to it, and whether [] the
          patient is on the recorded path and has such a row.
        """
        row = state.history.step[0]
        known = state.on_record & (row < state.last_row)
        history = self._recorded(state.stay, row + 1)
        return self._observation(history), self.recorded_action(state.stay, row), known

    def read_history(self, state: LearnedState) -> History:
        """The history [1] as the model reads it.

        With `lagged_actions` a row that was followed on the recorded path has the action of the row
        before it, and row 0 has none (level 0 of both), as in SepsisAgent's script: there an action
        only takes its place once the world model is asked with it.
        """
        history = state.history
        if not self.lagged_actions:
            return history
        row = history.step[0] + jnp.arange(1 - history.action.shape[-1], 1)
        before = self.recorded_action(state.stay, jnp.maximum(row - 1, 0))
        lagged = jnp.where(row > 0, before, 0)
        followed = (row >= 0) & (row < jnp.minimum(state.deviated, history.step[0]))
        return replace(history, action=jnp.where(followed, lagged, history.action[0])[None])

    def _timestep(
        self, state: LearnedState, before: Observation, died: jax.Array, **known: jax.Array
    ) -> Timestep:
        """The timestep that led to a state.

        Args:
          state: after the step.
          before: what was seen before it.
          died: [] bool, or a probability; counts where the episode has ended.
          **known: fields of `Info`.
        """
        after = self._observation(state.history)
        terms = reward_terms(before, after, state.ended, reward.terminal_reward(died))
        start = first_timestep(after, sofa=after.sofa, ventilation=state.ventilation)
        info = replace(start.info, reward_terms=terms, **known)
        return replace(start, reward=terms.sum(), terminated=state.ended, info=info)

    def _recorded(self, stay: jax.Array, row: jax.Array) -> History:
        """A recorded row as a batch of one; undefined after the end of the stay."""
        return history_at(
            self.world_model,
            self.episodes,
            self.sequences,
            stay[None],
            row[None],
            recorded_sofa=self.mode == "reference",
        )

    def _mortality(self, history: History, member: jax.Array, needed: jax.Array) -> jax.Array:
        """[] probability of death by one member; NaN where it was not computed."""
        window = history.window(schema.OUTCOME_WINDOW)
        if self.mortality_each_step:
            logits = self.world_model.mortality_logits(*window)
        else:
            logits = _logits_where_needed(needed, self.world_model, window)
        return jnp.where(
            needed | self.mortality_each_step, jax.nn.sigmoid(logits[member, 0]), jnp.nan
        )

    def _observation(self, history: History) -> Observation:
        result: Observation = jax.tree.map(
            lambda leaf: leaf[0], observe(self.world_model, history, past=self.past)
        )
        return result


def _start_draws(key: jax.Array) -> jax.Array:
    return jax.random.split(jax.random.fold_in(key, keys.START), 3)


def choose(first: jax.Array, one: TreeT, other: TreeT) -> TreeT:
    """The first of two PyTrees where [] `first` is true, otherwise the other."""
    chosen: TreeT = jax.tree.map(lambda a, b: jnp.where(first, a, b), one, other)
    return chosen


@jax.custom_batching.custom_vmap
def _logits_where_needed(needed: jax.Array, world_model: WorldModel, window: Window) -> jax.Array:
    """[E, 1] every member's logit of death, or zeros if it is not needed."""
    members = (world_model.num_members, 1)
    result: jax.Array = jax.lax.cond(
        needed,
        lambda: world_model.mortality_logits(*window),
        lambda: jnp.zeros(members),
    )
    return result


@_logits_where_needed.def_vmap
def _batched_logits(
    axis_size: int,
    in_batched: list[object],
    needed: jax.Array,
    world_model: WorldModel,
    window: Window,
) -> tuple[jax.Array, bool]:
    """Keeps the condition under vmap, which would otherwise compute both branches."""
    axes: list[object] = jax.tree.map(lambda batched: 0 if batched else None, in_batched[1:])
    every: Callable[[WorldModel, Window], jax.Array] = jax.vmap(
        lambda model, rows: model.mortality_logits(*rows), in_axes=axes, axis_size=axis_size
    )
    none = jax.eval_shape(every, world_model, window)
    logits = jax.lax.cond(
        needed.any(),
        lambda: every(world_model, window),
        lambda: jnp.zeros(none.shape, none.dtype),
    )
    return logits, True


def learned_dynamics(
    world_model: WorldModel,
    episodes: Episodes,
    *,
    start_step: int | str = 0,
    horizon: int | None = None,
    mode: str = "corrected",
    outcome: str | None = None,
    past: int = 0,
    behavior: PolicyFn | None = None,
    mortality_each_step: bool = True,
    follow_record: bool = False,
    lagged_actions: bool = False,
    kind: type[LearnedDynamics] = LearnedDynamics,
) -> LearnedDynamics:
    """Makes `LearnedDynamics` after checking its arguments; see `SepsisEnv.learned`."""
    if world_model.is_recurrent and mode == "reference":
        raise InputError("the recurrent variant has no reference mode; choose mode='corrected'")
    if world_model.is_recurrent and lagged_actions:
        raise InputError("lagged_actions: the recurrent variant has none; leave it out")
    if mode not in MODES:
        raise InputError(f"mode: got {mode!r}, expected one of {MODES}")
    outcome = outcome or ("expected" if mode == "corrected" else "threshold")
    if outcome not in OUTCOMES:
        raise InputError(f"outcome: got {outcome!r}, expected one of {OUTCOMES}")
    if not 0 <= past <= schema.OUTCOME_WINDOW:
        raise InputError(f"past: got {past}, expected 0 to {schema.OUTCOME_WINDOW} rows")
    if lagged_actions and not follow_record:
        raise InputError("lagged_actions: rows that follow the record alone lag; set follow_record")
    if horizon is not None and horizon < 1:
        raise InputError(f"horizon: got {horizon}, expected at least 1 step, or None")
    if follow_record and horizon is not None:
        raise InputError("follow_record: recorded stays end with their last row; leave out horizon")
    if not episodes.num_stays:
        raise InputError("episodes: no stay to start from; pick a split that has some")
    if behavior is not None:
        refuse_invalid(_first_draw(as_pytree(behavior), episodes, past) == INVALID_ACTION)
    return kind(
        world_model=world_model,
        episodes=episodes,
        sequences=to_sequences(episodes, world_model.scaler),
        start_step=_start_row(start_step, episodes),
        horizon=None if horizon is None else jnp.int32(horizon),
        behavior=None if behavior is None else as_pytree(behavior),
        mode=mode,
        outcome=outcome,
        past=past,
        mortality_each_step=mortality_each_step,
        follow_record=follow_record,
        lagged_actions=lagged_actions,
    )


@partial(jax.jit, static_argnums=2)
def _first_draw(policy: PolicyFn, episodes: Episodes, past: int) -> jax.Array:
    seen = observation_at(episodes, jnp.int32(0), jnp.int32(0), past=past)
    return draw_action(policy, jax.random.key(0), seen)


def _start_row(start_step: int | str, episodes: Episodes) -> jax.Array | None:
    if start_step == RANDOM_ROW:
        return None
    if not isinstance(start_step, int | np.integer) or start_step < 0:
        raise InputError(
            f"start_step: got {start_step!r}, expected a row from 0 on or {RANDOM_ROW!r}"
        )
    length = np.asarray(episodes.length)
    if (length <= start_step).any():
        stay = int(np.asarray(episodes.stay_id)[np.argmax(length <= start_step)])
        raise InputError(
            f"start_step: stay {stay} has no row {start_step}; leave out stays of length "
            f"{start_step} and below with episodes.select"
        )
    result: jax.Array | None = jnp.int32(start_step)
    return result
