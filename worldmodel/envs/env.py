"""`SepsisEnv`: treat one septic patient, step by step, in JAX.

    env = SepsisEnv.learned(world_model, episodes)
    state, timestep = env.reset(key)
    state, timestep = env.step(state, action)

Everything is a PyTree and pure: map `reset` and `step` over patients with `jax.vmap`, over steps
with `jax.lax.scan`, and jit at the outermost call, with the environment as an argument so that
new weights need no new compilation.

`AutoReset` starts the next episode by itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from worldmodel import keys, schema, struct
from worldmodel.clinical import reward
from worldmodel.envs import gumbel_max, icu_sepsis
from worldmodel.envs.base import Dynamics, Timestep, first_timestep, reward_terms
from worldmodel.envs.learned import LearnedDynamics, learned_dynamics
from worldmodel.envs.stays import RecurrentDynamics
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.world_model import WorldModel
from worldmodel.observation import PolicyFn, as_pytree
from worldmodel.scaling import Scaler, published_scaler
from worldmodel.synthetic import clinician, world
from worldmodel.synthetic.world import Config, Params

TreeT = TypeVar("TreeT")


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


@struct.dataclass
class EnvState:
    """State of one patient's episode, and the last timestep."""

    dynamics: Any  # every source of dynamics has a state of its own type
    last: Timestep
    taken: jax.Array  # [] int32 steps taken in this episode


@struct.dataclass
class SepsisEnv:
    """An environment over any source of dynamics, for one patient.

    The 25 actions are `5 * vasopressor + fluid` (`schema.action_index`), but for the gumbel-max
    simulator, which has 8 of its own. Values cannot be checked inside jit: a step with another
    number has a reward of NaN. `worldmodel.gym` refuses it.
    """

    dynamics: Dynamics
    max_steps: int | None = struct.field(pytree_node=False, default=None)

    @property
    def num_actions(self) -> int:
        """Number of actions A."""
        own: int = getattr(self.dynamics, "num_actions", schema.NUM_ACTIONS)
        return own

    @classmethod
    def learned(
        cls,
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
        max_steps: int | None = None,
    ) -> SepsisEnv:
        """An environment over a learned world model.

        With an ensemble, one member is drawn at reset for the whole episode (trajectory
        sampling). Episodes of a recurrent model end as its competing risks decide.

        Args:
          world_model: one model or an ensemble.
          episodes: stays to start from, drawn evenly.
          start_step: row to start from, or "random": any row of the stay but its last.
          horizon: rows to simulate before the treatment that ends the episode; None: to the last
            row of the recorded stay. Under a plan whose last action is repeated, the return
            is `rollout(..., horizon=horizon).total_reward`.
          mode: "corrected" or "reference", as in `rollout`.
          outcome: how the terminal reward follows from the mortality m: "expected",
            15 (1 - 2 m); "threshold", death above one half; or "sampled". Default: "expected" in
            corrected, "threshold" in reference mode.
          past: rows of `Observation.past`, at most 12.
          behavior: `(key, observation) -> [25]`, for `Info.support`.
          mortality_each_step: evaluate the Outcome Model in every step, which takes two thirds of
            the time; otherwise only in steps in which an episode of the batch ends, and
            `Info.mortality` is NaN in all others.
          follow_record: as long as every treatment is the recorded one, the recorded rows follow
            and the recorded outcome counts; from the first difference on the rows are simulated
            (SepsisAgent's protocol).
          lagged_actions: of rows that followed the record the world model reads the action of the
            row before (SepsisAgent's agent script); see `LearnedDynamics.read_history`.
          max_steps: truncates longer episodes.

        Raises:
          InputError: an unknown mode or outcome, a size out of range, or a stay without the row.
        """
        dynamics = learned_dynamics(
            world_model,
            episodes,
            start_step=start_step,
            horizon=horizon,
            mode=mode,
            outcome=outcome,
            past=past,
            behavior=behavior,
            mortality_each_step=mortality_each_step,
            follow_record=follow_record,
            lagged_actions=lagged_actions,
            kind=RecurrentDynamics if world_model.is_recurrent else LearnedDynamics,
        )
        return cls(dynamics, _checked(max_steps))

    @classmethod
    def synthetic(
        cls,
        params: Params | None = None,
        config: Config | None = None,
        *,
        behavior: PolicyFn | None = None,
        max_steps: int | None = None,
    ) -> SepsisEnv:
        """An environment over the synthetic world.

        Args:
          params, config: the world; `config.past` rows of `Observation.past`.
          behavior: `(key, observation) -> [25]`, for `Info.support`; by default the
            recorded clinician.
          max_steps: truncates longer episodes.

        Raises:
          InputError: `max_steps` is below 1.
        """
        dynamics = SyntheticDynamics(
            params=params or Params(),
            behavior=None if behavior is None else as_pytree(behavior),
            config=config or Config(),
        )
        return cls(dynamics, _checked(max_steps))

    @classmethod
    def icu_sepsis(cls, *, max_steps: int | None = icu_sepsis.MAX_STEPS) -> SepsisEnv:
        """The ICU-Sepsis benchmark (Choudhary, Gupta & Thomas 2024).

        Raises:
          InputError: the package `icu-sepsis` is not installed, or `max_steps` is below 1.
        """
        return cls(icu_sepsis.icu_sepsis_dynamics(), _checked(max_steps))

    @classmethod
    def gumbel_max(
        cls,
        *,
        hidden: tuple[str, ...] = (),
        capped_glucose: bool = True,
        max_steps: int | None = gumbel_max.MAX_STEPS,
    ) -> SepsisEnv:
        """The gumbel-max sepsis simulator (Oberst & Sontag 2019), with its own 8 actions.

        They are `4 * antibiotics + 2 * ventilation + vasopressor`. `Info.support` is the
        probability under the paper's physician.

        Args:
          hidden: variables of `gumbel_max.LEVELS` that are not seen; the paper hides "diabetes" and
            "glucose". The observation is the number of what is seen (`gumbel_max.visible`).
          capped_glucose: as published; see `gumbel_max.gumbel_max`.
          max_steps: truncates longer episodes.

        Raises:
          InputError: an unknown variable, or `max_steps` is below 1.
        """
        dynamics = gumbel_max.gumbel_max_dynamics(hidden=hidden, capped_glucose=capped_glucose)
        return cls(dynamics, _checked(max_steps))

    def reset(
        self, key: jax.Array, stay: Int[Array, ""] | None = None
    ) -> tuple[EnvState, Timestep]:
        """A patient at the start of an episode.

        Args:
          key: [] only randomness of the episode: equal keys and actions give equal episodes.
          stay: [] int32 index of the recorded stay to start from, with a learned world model
            only; drawn by default.
        """
        if stay is None:
            dynamics, timestep = self.dynamics.reset(key)
        else:
            if not isinstance(self.dynamics, LearnedDynamics):
                raise InputError("stay: only a learned world model starts from recorded stays")
            dynamics, timestep = self.dynamics.reset_to(key, stay)
        return EnvState(dynamics, timestep, jnp.int32(0)), timestep

    def step(self, state: EnvState, action: Int[Array, ""]) -> tuple[EnvState, Timestep]:
        """One step; after the end of the episode the state stays as it is and the reward is 0.

        Args:
          state: from `reset` or `step`.
          action: [] int32, from 0 to `num_actions` - 1.
        """
        action = jnp.asarray(action, jnp.int32)
        dynamics, timestep = self.dynamics.step(state.dynamics, action)
        known = (action >= 0) & (action < self.num_actions)
        timestep = replace(timestep, reward=jnp.where(known, timestep.reward, jnp.nan))
        taken = state.taken + 1
        if self.max_steps is not None:
            cut = ~timestep.terminated & (taken >= self.max_steps)
            timestep = replace(timestep, truncated=cut)
        stopped = replace(state, last=_rest(state.last))
        after = jax.tree.map(
            lambda old, new: jnp.where(state.last.done, old, new),
            stopped,
            EnvState(dynamics, timestep, taken),
        )
        return after, after.last

    def with_key(self, state: EnvState, key: jax.Array) -> EnvState:
        """The same patient in the same state, with another random key from here on.

        Args:
          state: from `reset` or `step`.
          key: [] that replaces the one given to `reset`.
        """
        return replace(state, dynamics=replace(state.dynamics, key=key))


def episode_key(key: jax.Array, number: jax.Array | int) -> jax.Array:
    """The key of the episode of a given number, counted from 0."""
    return jax.random.fold_in(jax.random.fold_in(key, keys.EPISODES), number)


def _rest(last: Timestep) -> Timestep:
    info = replace(
        last.info,
        reward_terms=jnp.zeros_like(last.info.reward_terms),
        projected=jnp.zeros_like(last.info.projected),
    )
    return replace(last, reward=jnp.zeros_like(last.reward), info=info)


def _checked(max_steps: int | None) -> int | None:
    if max_steps is not None and max_steps < 1:
        raise InputError(f"max_steps: got {max_steps}, expected at least 1, or None")
    return max_steps


NEXT_STEP, SAME_STEP = "next-step", "same-step"
AUTORESETS = (NEXT_STEP, SAME_STEP)


@struct.dataclass
class AutoResetState:
    """The running episode and its number."""

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

    In both modes `info.final_observation` is the observation that the step itself led to.
    Episode n has the key `episode_key(key, n)`.
    """

    env: SepsisEnv
    mode: str = struct.field(pytree_node=False, default=NEXT_STEP)

    def __post_init__(self) -> None:
        if self.mode not in AUTORESETS:
            raise InputError(f"mode: got {self.mode!r}, expected one of {AUTORESETS}")

    @property
    def num_actions(self) -> int:
        """Number of actions A."""
        return self.env.num_actions

    def reset(self, key: jax.Array) -> tuple[AutoResetState, Timestep]:
        """The first episode of a key []."""
        state, timestep = self.env.reset(episode_key(key, 0))
        return AutoResetState(state, key, jnp.int32(0)), _with_final(timestep, timestep)

    def next_episode(self, state: AutoResetState) -> tuple[AutoResetState, Timestep]:
        """Ends the running episode and starts the next."""
        number = state.episode + 1
        fresh, timestep = self.env.reset(episode_key(state.key, number))
        return AutoResetState(fresh, state.key, number), _with_final(timestep, timestep)

    def step(
        self, state: AutoResetState, action: Int[Array, ""]
    ) -> tuple[AutoResetState, Timestep]:
        """One step under an action [], or a reset; see the class docstring."""
        over = state.env.last.done
        moved, timestep = self.env.step(state.env, action)
        ends = timestep.done if self.mode == SAME_STEP else over
        number = state.episode + ends
        fresh, first = self.env.reset(episode_key(state.key, number))

        def pick(old: TreeT, new: TreeT) -> TreeT:
            picked: TreeT = jax.tree.map(lambda a, b: jnp.where(ends, b, a), old, new)
            return picked

        if self.mode == SAME_STEP:
            shown = replace(timestep, observation=pick(timestep.observation, first.observation))
        else:
            shown = timestep = pick(timestep, first)
        after = AutoResetState(pick(moved, fresh), state.key, number)
        return after, _with_final(shown, timestep)


def _with_final(shown: Timestep, reached: Timestep) -> Timestep:
    info = replace(shown.info, final_observation=reached.observation)
    return replace(shown, info=info)
