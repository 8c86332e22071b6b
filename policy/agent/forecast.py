"""One-step forecasts of the world model for many patients and treatments at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import schema, struct
from worldmodel.envs.base import action_probability
from worldmodel.envs.env import EnvState, SepsisEnv
from worldmodel.errors import InputError
from worldmodel.models.world_model import WorldModel
from worldmodel.observation import Observation, PolicyFn, as_pytree, recent
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import History, history_from_observation
from worldmodel.simulate.randomness import policy_key
from worldmodel.simulate.rollout import rollout
from worldmodel.simulate.step import MODES

T = TypeVar("T")  # a PyTree of arrays

QUANTILES = (0.05, 0.95)
_NEXT_NOISE = 1_000_003  # added to a patient's identity for every question of fresh forecasts
_MAX_BRANCHES = 65_536  # a single step: blocks that fit the caches would repeat the networks


@dataclass(frozen=True)
class ForecastConfig:
    """Settings of forecasts.

    Attributes:
      samples: futures per treatment, a multiple of the ensemble size; all treatments share
        their random numbers.
      mode: "corrected", or "reference": one noisy future per treatment, as SepsisAgent's tool.
      fresh: draw anew at every question; otherwise equal questions have equal answers.
      shuffled: answer with the future of another treatment, drawn for each question: an agent that
        listens to the simulator gets worse by it.
    """

    samples: int = 60
    mode: str = "corrected"
    fresh: bool = False
    shuffled: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode: got {self.mode!r}, expected one of {MODES}")
        if self.samples < 1:
            raise InputError(f"samples: got {self.samples}, expected at least 1")


@struct.dataclass
class Forecast:
    """The state four hours ahead under a treatment; leading axes [B, K] or none."""

    mean: jax.Array | np.ndarray  # [..., 39] physical units
    low: jax.Array | np.ndarray  # [..., 39] the 5% quantile
    high: jax.Array | np.ndarray  # [..., 39] the 95% quantile
    sofa: jax.Array | np.ndarray  # [...] mean points
    ventilation: jax.Array | np.ndarray  # [...] mean probability
    disagreement: (
        jax.Array | np.ndarray
    )  # [...] SD of the members' means, z-scores, mean over features
    support: (
        jax.Array | np.ndarray
    )  # [...] probability of the action under the behaviour policy, else as a recurrent model knows
    # the clinicians; NaN where neither is there


class Forecaster:
    """Forecasts for a fixed number of patients and treatments in one jitted call.

    Args:
      world_model: one model or an ensemble.
      key: of the noise, which depends on patient, row and sample alone: equal requests have
        equal forecasts.
      config: settings.
      behavior: behaviour policy of the clinicians, for `Forecast.support`; by default what a
        recurrent model has learned of them.

    Raises:
      InputError: the number of samples does not fit the ensemble, or the behaviour policy looks
        back farther than the world model.
    """

    past = schema.OUTCOME_WINDOW  # rows of Observation.past that are needed

    def __init__(
        self,
        world_model: WorldModel,
        key: jax.Array,
        config: ForecastConfig | None = None,
        *,
        behavior: PolicyFn | None = None,
    ):
        config = config or ForecastConfig()
        members = world_model.num_members
        if config.mode == "reference":
            config = replace(config, samples=members)
        if config.samples % members:
            raise InputError(
                f"samples: got {config.samples}, expected a multiple of {members} (members)"
            )
        if getattr(behavior, "past", 0) > self.past:
            raise InputError(f"behavior: looks back on more than {self.past} rows")
        self._world_model, self._key, self.config = world_model, key, config
        self._behavior = None if behavior is None else as_pytree(behavior)
        self._behavior_past = getattr(behavior, "past", 0)

    def answer(
        self,
        env: SepsisEnv,
        states: EnvState,
        slots: np.ndarray,
        patients: np.ndarray,
        actions: np.ndarray,
        asked: np.ndarray,
    ) -> Forecast:
        """Forecasts [B, K] for patients of a pool, as numpy arrays.

        Args:
          env: of the patients.
          states: of all M patients, leaves [M, ...].
          slots: [B] of those who are asked about.
          patients: [B] int32 identities, which the noise depends on.
          actions: [B, K] int32 joint actions.
          asked: [B] how often these patients were asked about before.
        """
        if self.config.fresh:
            patients = (patients.astype(np.int64) + _NEXT_NOISE * asked).astype(np.int32)
        return self(_observations(states, slots), patients, actions)

    def __call__(
        self, observations: Observation, patients: np.ndarray, actions: np.ndarray
    ) -> Forecast:
        """Forecasts [B, K] as numpy arrays.

        Args:
          observations: of B patients, leaves [B, ...], with at least 12 past rows.
          patients: [B] int32 identities, which the noise depends on.
          actions: [B, K] int32 joint actions.
        """
        reference = self.config.mode == "reference"
        if self.config.shuffled:
            actions = _others(self._key, observations, patients, actions)
        plans = np.asarray(actions, np.int32)[..., None]
        played = rollout(
            self._world_model,
            self._key,
            _histories(self._world_model, observations, jnp.asarray(patients, jnp.int32)),
            plans,
            samples=self.config.samples,
            features=schema.FEATURE_NAMES,
            common_noise=not reference,
            mode=self.config.mode,
            mortality=False,
            max_branches=_MAX_BRANCHES,
        )
        values, scores = played.values[..., 0, :], (played.sofa[..., 0], played.ventilation[..., 0])
        members = self._world_model.num_members
        scaler = self._world_model.scaler
        *_, disagreement = _averages(values, scores, scaler, members=members)
        if reference:
            values, scores = values[:, :, :1], jax.tree.map(lambda leaf: leaf[..., :1], scores)
        mean, (sofa, ventilation), _ = _averages(values, scores, scaler, members=1)
        if self._behavior is None and played.support is not None:
            support = played.support[..., 0].mean(-1)
        else:
            support = _support(
                self._behavior, self._key, observations, plans[..., 0], past=self._behavior_past
            )
        low, high = _quantiles(np.asarray(values))
        found = Forecast(mean, low, high, sofa, ventilation, disagreement, support)
        result: Forecast = jax.device_get(found)
        return result


def _others(
    key: jax.Array, observations: Observation, patients: np.ndarray, actions: np.ndarray
) -> np.ndarray:
    """[B, K] an action other than each of [B, K], by patient and row."""
    data = jax.device_get((jax.random.key_data(key), observations.step))
    seeds = zip(np.asarray(patients).tolist(), np.asarray(data[1]).tolist(), strict=True)
    shifts = [
        np.random.default_rng([*data[0].ravel().tolist(), patient, step]).integers(
            1, schema.NUM_ACTIONS, actions.shape[1]
        )
        for patient, step in seeds
    ]
    moved: np.ndarray = (np.asarray(actions) + np.array(shifts)) % schema.NUM_ACTIONS
    return moved.astype(np.int32)


def _quantiles(values: np.ndarray) -> list[np.ndarray]:
    """[B, K, F] per quantile of values [B, K, S, F], between samples by linear interpolation.

    NumPy sorts short contiguous rows on the host many times faster than XLA does on a CPU, and
    than `np.quantile`.
    """
    ordered = np.array(values.swapaxes(2, 3), order="C")
    ordered.sort(axis=-1)
    last = ordered.shape[-1] - 1
    found = []
    for quantile in QUANTILES:
        place = quantile * last
        below = int(place)
        lower, upper = ordered[..., below], ordered[..., min(below + 1, last)]
        found.append(lower + np.float32(place - below) * (upper - lower))
    return found


@jax.jit
def _observations(states: EnvState, slots: jax.Array) -> Observation:
    result: Observation = jax.tree.map(lambda leaf: leaf[slots], states.last.observation)
    return result


@jax.jit
def _histories(world_model: WorldModel, observations: Observation, patients: jax.Array) -> History:
    histories = jax.vmap(partial(history_from_observation, world_model))(observations)
    result: History = replace(jax.tree.map(lambda leaf: leaf[:, 0], histories), patient=patients)
    return result


@partial(jax.jit, static_argnames="past")
def _support(
    behavior: PolicyFn | None,
    key: jax.Array,
    observations: Observation,
    actions: jax.Array,
    *,
    past: int,
) -> jax.Array:
    """[B, K] probabilities under the behaviour policy, NaN without one."""
    if behavior is None:
        return jnp.full(actions.shape, jnp.nan)

    def of_patient(observation: Observation, chosen: jax.Array) -> jax.Array:
        return action_probability(behavior, policy_key(key), recent(observation, past), chosen)

    return jax.vmap(of_patient)(observations, actions)


@partial(jax.jit, static_argnames="members")
def _averages(
    values: jax.Array, scores: T, scaler: Scaler, *, members: int
) -> tuple[jax.Array, T, jax.Array]:
    """Means over the samples of values [B, K, S, 39] and scores [B, K, S]; the disagreement."""
    # Sample s belongs to member s mod E.
    by_member = values.reshape(*values.shape[:2], -1, members, schema.NUM_FEATURES).mean(2)
    disagreement = scaler.normalize(by_member).std(2).mean(-1)
    return values.mean(2), jax.tree.map(lambda leaf: leaf.mean(-1), scores), disagreement
