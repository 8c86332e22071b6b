"""`SepsisEnv` behind the Gymnasium interface, for off-the-shelf agents.

    env = SepsisGymEnv(SepsisEnv.learned(world_model, episodes))
    observation, info = env.reset(seed=0)

Importing this module registers `IDS`, so that an environment can be had by its name, which may name
the module too:

    env = gymnasium.make("worldmodel.gym:sepsis_jax/Sepsis-v0", max_steps=18)

Needs the package `gymnasium` (`pip install 'sepsis-jax[gym]'`). Nothing in the package imports
this module. Agents in JAX train faster on `SepsisEnv` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import registry
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from worldmodel import schema
from worldmodel.envs.base import REWARD_TERMS, Info, Timestep
from worldmodel.envs.env import (
    NEXT_STEP,
    SAME_STEP,
    AutoReset,
    AutoResetState,
    EnvState,
    SepsisEnv,
    episode_key,
)
from worldmodel.episode_files import load_episodes_for
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import load_world_model
from worldmodel.observation import Observation, state_feature_bounds, state_features
from worldmodel.scaling import Scaler

# an `Observation`, or the number of a state.
Features = Callable[[Any], jax.Array]

IDS: Mapping[str, str] = {
    "sepsis_jax/Sepsis-v0": "synthetic",
    "sepsis_jax/LearnedSepsis-v0": "learned",
    "sepsis_jax/ICUSepsis-v0": "icu_sepsis",
    "sepsis_jax/GumbelMaxSepsis-v0": "gumbel_max",
}
"""Registered ids, and the constructor of `SepsisEnv` that takes the settings."""

_SEEDS = 2**31
_MODES = {AutoresetMode.NEXT_STEP: NEXT_STEP, AutoresetMode.SAME_STEP: SAME_STEP}


_Shown = tuple[jax.Array, jax.Array, Timestep, Info]


class _Encoder(NamedTuple):
    """Conversion of observations to arrays, and the space of these arrays."""

    features: Features  # a PyTree that can be called
    space: spaces.Box | spaces.Discrete


class SepsisGymEnv(gymnasium.Env):
    """One patient at a time.

    Episode n after `reset(seed=s)` has the key `episode_key(jax.random.key(s), n)`. The info holds
    those fields of `Info` that are known, the terms of the reward by name.

    Args:
      env: over any dynamics.
      features: from an `Observation` to a float32 vector; by default `state_features` with
        the world's scaler, 49 numbers, or the number of the state where states are
        discrete.
      observation_space: of the values of `features`, where given.

    Raises:
      InputError: `features` is given without `observation_space`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        env: SepsisEnv,
        *,
        features: Features | None = None,
        observation_space: spaces.Box | None = None,
    ):
        self.env = env
        self._encoder = _encoder(env, features, observation_space)
        self.observation_space = self._encoder.space
        self.action_space = spaces.Discrete(env.num_actions)
        self._key: jax.Array | None = None
        self._episode = 0
        self._state: EnvState | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, object] | None = None
    ) -> tuple[np.ndarray | np.int64, dict[str, object]]:
        """The next episode; with a seed, the first of that seed."""
        super().reset(seed=seed, options=options)
        if seed is not None or self._key is None:
            self._key = _seed_key(seed, self.np_random)
            self._episode = 0
        key = episode_key(self._key, self._episode)
        self._episode += 1
        self._state, seen = _reset(self.env, self._encoder.features, key)
        observation, timestep = jax.device_get(seen)
        return self._observation(observation), _info(timestep.info)

    def step(
        self, action: object
    ) -> tuple[np.ndarray | np.int64, float, bool, bool, dict[str, object]]:
        """One step.

        Raises:
          InputError: the action is no integer from 0 to A - 1.
          ResetNeeded: there was no reset before.
        """
        if self._state is None:
            raise ResetNeeded("call reset() before step()")
        number = jnp.asarray(_checked_actions(action, (), self.env.num_actions))
        self._state, seen = _step(
            self.env, self._encoder.features, self._state, jnp.asarray(number)
        )
        observation, timestep = jax.device_get(seen)
        return (
            self._observation(observation),
            float(timestep.reward),
            bool(timestep.terminated),
            bool(timestep.truncated),
            _info(timestep.info),
        )

    def _observation(self, observation: np.ndarray) -> np.ndarray | np.int64:
        if isinstance(self.observation_space, spaces.Discrete):
            return np.int64(observation)
        return np.array(observation)


class SepsisVectorEnv(VectorEnv):
    """N patients at a time in one compiled call, with automatic reset.

    Sub-environment i has the seed `seed + i`, and its episodes are those of a `SepsisGymEnv` with
    that seed.

    Args:
      env: over any dynamics.
      num_envs: patients N.
      autoreset_mode: `AutoresetMode.NEXT_STEP` or `SAME_STEP`; see `envs.autoreset`.
      features, observation_space: as for `SepsisGymEnv`.

    Raises:
      InputError: no patient, another mode, or own features without their space.
    """

    def __init__(
        self,
        env: SepsisEnv,
        num_envs: int,
        *,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
        features: Features | None = None,
        observation_space: spaces.Box | None = None,
    ):
        if num_envs < 1:
            raise InputError(f"num_envs: got {num_envs}, expected at least 1")
        if autoreset_mode not in _MODES:
            raise InputError(f"autoreset_mode: got {autoreset_mode}, expected one of {[*_MODES]}")
        self.num_envs = num_envs
        self.metadata = {"render_modes": [], "autoreset_mode": autoreset_mode}
        self._env = AutoReset(env, _MODES[autoreset_mode])
        self._encoder = _encoder(env, features, observation_space)
        self.single_observation_space = self._encoder.space
        self.single_action_space = spaces.Discrete(env.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._same_step = autoreset_mode is AutoresetMode.SAME_STEP
        self._seed_keys: jax.Array | None = None
        self._state: AutoResetState | None = None

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, object] | None = None,
    ) -> tuple[np.ndarray, dict[str, object]]:
        """Starts all sub-environments anew.

        Args:
          seed: one, counted up, or one each; without any, the episodes that follow.
          options: none are known.

        Raises:
          InputError: there are not as many seeds as sub-environments.
        """
        single = isinstance(seed, int | np.integer)
        super().reset(seed=int(seed) if single else None, options=options)  # type: ignore[arg-type]
        if seed is None and self._seed_keys is not None:
            self._state, seen = _next_all(self._env, self._encoder.features, self._state)
        else:
            if single or seed is None:
                first = int(seed) if single else int(self.np_random.integers(_SEEDS))  # type: ignore[arg-type]
                seeds: list[int | None] = [first + i for i in range(self.num_envs)]
            else:
                seeds = list(seed)  # type: ignore[arg-type]
            if len(seeds) != self.num_envs:
                raise InputError(
                    f"seed: got {len(seeds)} seeds for {self.num_envs} sub-environments"
                )
            keys = jax.numpy.stack([_seed_key(s, self.np_random) for s in seeds])
            self._seed_keys = keys
            self._state, seen = _reset_all(self._env, self._encoder.features, keys)
        observation, _, _, info = jax.device_get(seen)
        return self._observations(observation), _infos(info)

    def step(
        self, actions: object
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, object]]:
        """One step of every sub-environment, with actions [N].

        Raises:
          InputError: an action is no integer from 0 to A - 1, or there are not N.
          ResetNeeded: there was no reset before.
        """
        if self._state is None:
            raise ResetNeeded("call reset() before step()")
        numbers = jnp.asarray(_checked_actions(actions, (self.num_envs,), self._env.num_actions))
        self._state, seen = _step_all(
            self._env, self._encoder.features, self._state, jnp.asarray(numbers)
        )
        observation, final, timestep, shown = jax.device_get(seen)
        infos: dict[str, object] = {**_infos(shown)}
        done = timestep.terminated | timestep.truncated
        if self._same_step and done.any():
            ends = np.full(self.num_envs, None, object)
            for i in np.flatnonzero(done):
                ends[i] = np.array(final[i])
            infos |= {
                "final_obs": ends,
                "_final_obs": done.copy(),
                "final_info": _infos(timestep.info, done),
                "_final_info": done.copy(),
            }
        return (
            self._observations(observation),
            np.array(timestep.reward, np.float64),
            np.array(timestep.terminated),
            np.array(timestep.truncated),
            infos,
        )

    def _observations(self, observation: np.ndarray) -> np.ndarray:
        return np.array(observation, self.observation_space.dtype)


def make_single(*, source: str, **settings: object) -> SepsisGymEnv:
    """What `gymnasium.make` calls: one patient of a world.

    Args:
      source: one of the values of `IDS`.
      **settings: of the constructor of `SepsisEnv` of that name. "learned" takes `model`, the
        folder of a world model, `episodes`, a folder of episodes to start from, and `split`, by
        default "train".

    Raises:
      InputError: an unknown setting, or a folder that is missing or holds something else.
    """
    return SepsisGymEnv(_world(source, settings))


def make_vector(
    *,
    source: str,
    num_envs: int,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    **settings: object,
) -> SepsisVectorEnv:
    """What `gymnasium.make_vec` calls: N patients of a world in one compiled call.

    Args:
      source, **settings: as for `make_single`.
      num_envs: patients N.
      autoreset_mode: as for `SepsisVectorEnv`, or its value.
    """
    mode = AutoresetMode(autoreset_mode)
    return SepsisVectorEnv(_world(source, settings), num_envs, autoreset_mode=mode)


def _world(source: str, settings: dict[str, object]) -> SepsisEnv:
    given = dict(settings)
    parts: list[object] = []
    try:
        if source == "learned":
            model = load_world_model(str(given.pop("model")))
            stays = load_episodes_for(model, str(given.pop("episodes")))
            split = str(given.pop("split", "train"))
            if split not in (*schema.SPLITS, "all"):
                raise InputError(f"split: got {split!r}, expected one of {schema.SPLITS} or all")
            parts = [model, stays if split == "all" else stays.of_split(split)]
        env: SepsisEnv = getattr(SepsisEnv, source)(*parts, **given)
    except KeyError as error:
        raise InputError(f"{error.args[0]}: give a folder") from None
    except TypeError as error:
        raise InputError(f"{source}: {error}") from None
    return env


def _encoder(
    env: SepsisEnv, features: Features | None, observation_space: spaces.Box | None
) -> _Encoder:
    if (features is None) != (observation_space is None):
        raise InputError("features, observation_space: give both or neither")
    if features is not None and observation_space is not None:
        return _Encoder(jax.tree_util.Partial(features), observation_space)
    dynamics: Any = env.dynamics
    if hasattr(dynamics, "num_states"):
        return _Encoder(jax.tree_util.Partial(_same), spaces.Discrete(dynamics.num_states))
    low, high = state_feature_bounds(dynamics.last_step)
    return _Encoder(
        jax.tree_util.Partial(_scaled_features, dynamics.scaler),
        spaces.Box(low, high, dtype=np.float32),
    )


def _scaled_features(scaler: Scaler, observation: Observation) -> jax.Array:
    return state_features(observation, scaler)


def _same(observation: jax.Array) -> jax.Array:
    return observation


@jax.jit
def _reset(
    env: SepsisEnv, features: Features, key: jax.Array
) -> tuple[EnvState, tuple[jax.Array, Timestep]]:
    state, timestep = env.reset(key)
    return state, _shown(features, timestep)


@jax.jit
def _step(
    env: SepsisEnv, features: Features, state: EnvState, action: jax.Array
) -> tuple[EnvState, tuple[jax.Array, Timestep]]:
    state, timestep = env.step(state, action)
    return state, _shown(features, timestep)


@jax.jit
def _reset_all(
    env: AutoReset, features: Features, keys: jax.Array
) -> tuple[AutoResetState, _Shown]:
    state, timestep = jax.vmap(env.reset)(keys)
    return state, _shown_to_all(features, state, timestep)


@jax.jit
def _next_all(
    env: AutoReset, features: Features, state: AutoResetState
) -> tuple[AutoResetState, _Shown]:
    state, timestep = jax.vmap(env.next_episode)(state)
    return state, _shown_to_all(features, state, timestep)


@jax.jit
def _step_all(
    env: AutoReset, features: Features, state: AutoResetState, actions: jax.Array
) -> tuple[AutoResetState, _Shown]:
    state, timestep = jax.vmap(env.step)(state, actions)
    return state, _shown_to_all(features, state, timestep)


def _shown(features: Features, timestep: Timestep) -> tuple[jax.Array, Timestep]:
    """The encoded observation, and the rest without the observation."""
    info = timestep.info.replace(final_observation=None)  # type: ignore[attr-defined]
    return features(timestep.observation), timestep.replace(observation=None, info=info)  # type: ignore[attr-defined]


def _shown_to_all(features: Features, state: AutoResetState, timestep: Timestep) -> _Shown:
    """Observations, last ones, the rest of the timestep, and the info of the running episodes."""
    observation, rest = jax.vmap(partial(_shown, features))(timestep)
    final = jax.vmap(features)(timestep.info.final_observation)
    return observation, final, rest, state.env.last.info


def _seed_key(seed: int | None, random: np.random.Generator) -> jax.Array:
    return jax.random.key(int(random.integers(_SEEDS)) if seed is None else seed)


def _checked_actions(actions: object, shape: tuple[int, ...], num_actions: int) -> np.ndarray:
    array = np.asarray(actions)
    if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"action: got {array.dtype} of shape {array.shape}, expected integers of shape {shape}"
        )
    bad = (array < 0) | (array >= num_actions)
    if bad.any():
        raise InputError(f"action: got {array[bad].flat[0]}, expected 0 to {num_actions - 1}")
    return array.astype(np.int32)


def _named(info: Info) -> Mapping[str, np.ndarray]:
    """Fields [...] of an info on the host, the terms of the reward apart."""
    fields = {
        name: getattr(info, name)
        for name in ("sofa", "ventilation", "mortality", "projected", "support", "disagreement")
    }
    terms = {f"reward_{name}": info.reward_terms[..., i] for i, name in enumerate(REWARD_TERMS)}
    return {**fields, **terms}


def _info(info: Info) -> dict[str, object]:
    return {name: value.item() for name, value in _named(info).items() if not np.isnan(value)}


def _infos(info: Info, among: np.ndarray | bool = True) -> dict[str, object]:
    """Gymnasium's form of infos: `_name` marks the sub-environments where `name` is known."""
    infos: dict[str, object] = {}
    for name, value in _named(info).items():
        known = ~np.isnan(value) & among
        infos[name], infos[f"_{name}"] = np.where(known, value, 0).astype(value.dtype), known
    return infos


def _register() -> None:
    for name, source in IDS.items():
        if name not in registry:  # a second import would warn
            gymnasium.register(
                name,
                entry_point=f"{__name__}:{make_single.__name__}",
                vector_entry_point=f"{__name__}:{make_vector.__name__}",
                kwargs={"source": source},
            )


_register()
