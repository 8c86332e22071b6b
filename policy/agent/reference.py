"""SepsisAgent's published inference: its quirks, each a switch, and the forecasts that they change.

`mode="reference"` of an agent run sets all of them, so that a checkpoint that was trained under
them meets what it knows; `docs/agent.md` says what each does to value and adherence. Lenient
reading of calls is not among them: what cannot be read is never given.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np

from policy.agent.dialogue import STAY, DialogueConfig
from policy.agent.forecast import Forecast, ForecastConfig, Forecaster
from policy.serving.backend import Sampling
from worldmodel import schema
from worldmodel.envs.env import EnvState, SepsisEnv
from worldmodel.envs.learned import LearnedDynamics
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.world_model import WorldModel
from worldmodel.observation import Observation, PolicyFn

CORRECTED, REFERENCE = AGENT_MODES = ("corrected", "reference")
REFERENCE_SAMPLING = Sampling(temperature=0.7, top_p=0.95, max_completion_length=8192)


@dataclass(frozen=True)
class Quirks:
    """Switches of the published inference; None is what the mode has: all of them, or none.

    Attributes:
      recorded_forecast: as long as the record is followed, a simulation of the recorded treatment
        is answered with the recorded next row, which tells the future.
      lagged_actions: of rows that followed the record the world model reads the treatment of the
        row before, in simulations as in steps.
      single_future: a simulation is answered with one noisy future, drawn anew at every call, not
        with mean and interval.
      published_scores: rows are not projected into physiologic ranges, the SOFA scores vasopressor
        levels for doses and urine of short stays unscaled, and recorded rows keep their recorded
        SOFA.
      threshold_outcome: a mortality above one half is a death and any other a release, for the
        terminal reward as for the outcome; otherwise the reward is its expectation.
      long_replies: replies of up to 8,192 tokens at temperature 0.7 and top-p 0.95.
      whole_stay: one conversation from admission to the end.
    """

    recorded_forecast: bool | None = None
    lagged_actions: bool | None = None
    single_future: bool | None = None
    published_scores: bool | None = None
    threshold_outcome: bool | None = None
    long_replies: bool | None = None
    whole_stay: bool | None = None

    def of_mode(self, mode: str) -> Quirks:
        """All switches set: those that are None to whether the mode is "reference"."""
        left = [field.name for field in fields(self) if getattr(self, field.name) is None]
        return replace(self, **dict.fromkeys(left, mode == REFERENCE))

    @property
    def of_record(self) -> tuple[str, ...]:
        """Names of the switches that are set and need recorded stays."""
        names = ("recorded_forecast", "lagged_actions", "published_scores", "threshold_outcome")
        return tuple(name for name in names if getattr(self, name))

    def dialogue(self, config: DialogueConfig) -> DialogueConfig:
        """A dialogue's settings with those that the switches set."""
        if self.long_replies:
            config = replace(config, sampling=REFERENCE_SAMPLING)
        return replace(config, memory=STAY) if self.whole_stay else config

    def forecast(self, config: ForecastConfig) -> ForecastConfig:
        """The settings of forecasts with those that the switches set."""
        return replace(config, mode=REFERENCE, fresh=True) if self.single_future else config


class ReferenceForecaster(Forecaster):
    """A `Forecaster` with the quirks of the published simulation tool.

    For pools whose environment is `SepsisEnv.learned`.

    Args:
      world_model, key, config, behavior: as for `Forecaster`.
      quirks: which of them, each set.
    """

    def __init__(
        self,
        world_model: WorldModel,
        key: jax.Array,
        config: ForecastConfig | None = None,
        *,
        behavior: PolicyFn | None = None,
        quirks: Quirks,
    ):
        super().__init__(world_model, key, config, behavior=behavior)
        self._quirks = quirks

    def answer(
        self,
        env: SepsisEnv,
        states: EnvState,
        slots: np.ndarray,
        patients: np.ndarray,
        actions: np.ndarray,
        asked: np.ndarray,
    ) -> Forecast:
        """See `Forecaster.answer`."""
        if not isinstance(env.dynamics, LearnedDynamics):
            raise InputError("quirks: need recorded stays in a world model of fixed windows")
        if self._quirks.lagged_actions:
            states = _as_read(env, states)
        found = super().answer(env, states, slots, patients, actions, asked)
        if not self._quirks.recorded_forecast:
            return found
        after, given, known = jax.device_get(_recorded(env, states, slots))
        return with_record(found, actions, after=after, given=given, known=known)


def make_forecaster(
    quirks: Quirks,
    world_model: WorldModel,
    key: jax.Array,
    config: ForecastConfig,
    *,
    behavior: PolicyFn | None = None,
) -> Forecaster:
    """The forecaster of a run with these quirks, each set; see `Forecaster`."""
    if quirks.recorded_forecast or quirks.lagged_actions:
        return ReferenceForecaster(world_model, key, config, behavior=behavior, quirks=quirks)
    return Forecaster(world_model, key, config, behavior=behavior)


def learned_env(
    world_model: WorldModel,
    episodes: Episodes,
    quirks: Quirks,
    *,
    follow_record: bool,
    max_steps: int | None = None,
) -> SepsisEnv:
    """The environment of recorded stays with these quirks, each set; see `SepsisEnv.learned`."""
    return SepsisEnv.learned(
        world_model,
        episodes,
        past=Forecaster.past,
        mode=REFERENCE if quirks.published_scores else CORRECTED,
        outcome="threshold" if quirks.threshold_outcome else "expected",
        lagged_actions=bool(quirks.lagged_actions),
        follow_record=follow_record,
        mortality_each_step=False,
        max_steps=max_steps,
    )


def with_record(
    forecast: Forecast,
    actions: np.ndarray,
    *,
    after: Observation,
    given: np.ndarray,
    known: np.ndarray,
) -> Forecast:
    """Forecasts with the record in the place of those of the recorded treatment.

    Args:
      forecast: leaves [B, K, ...].
      actions: [B, K] joint actions.
      after: the recorded next rows, leaves [B, ...].
      given: [B] the recorded treatments that led to them.
      known: [B] bool, whether there is such a row and the record was followed so far.
    """
    told = known[:, None] & (actions == given[:, None])
    dynamic = np.asarray(after.dynamic)[:, None]
    return replace(
        forecast,
        **{
            name: np.where(told[..., None], dynamic, getattr(forecast, name))
            for name in ("mean", "low", "high")
        },
        sofa=np.where(told, np.asarray(after.sofa)[:, None], forecast.sofa),
        ventilation=np.where(
            told, np.asarray(after.ventilated, np.float32)[:, None], forecast.ventilation
        ),
        disagreement=np.where(told, 0.0, forecast.disagreement),
    )


@jax.jit
def _as_read(env: SepsisEnv, states: EnvState) -> EnvState:
    """States whose observations hold the treatments as the world model reads them."""
    dynamics = env.dynamics
    assert isinstance(dynamics, LearnedDynamics)
    action = jax.vmap(dynamics.read_history)(states.dynamics).action[:, 0]
    observation = states.last.observation
    past = observation.past
    vasopressor, fluid = schema.action_levels(jnp.maximum(action[:, -past.valid.shape[1] :], 0))
    past = replace(past, vasopressor=vasopressor, fluid=fluid)
    last = replace(states.last, observation=replace(observation, past=past))
    return replace(states, last=last)


@jax.jit
def _recorded(
    env: SepsisEnv, states: EnvState, slots: jax.Array
) -> tuple[Observation, jax.Array, jax.Array]:
    dynamics = env.dynamics
    assert isinstance(dynamics, LearnedDynamics)
    chosen = jax.tree.map(lambda leaf: leaf[slots], states.dynamics)
    return jax.vmap(dynamics.recorded_next)(chosen)
