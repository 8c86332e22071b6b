"""The pool: all patients under treatment at once, on the device, behind two questions.

Dialogues run one by one and wait for each other; the device works in batches. Whatever they ask
meanwhile, what would happen (`simulate`) or what does happen (`prescribe`), is answered by one
jitted call for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from policy.agent.forecast import Forecast, Forecaster
from policy.agent.tools import MAX_OPTIONS
from policy.serving.batching import Batcher, Lockstep
from worldmodel.envs.base import Timestep
from worldmodel.envs.env import EnvState, SepsisEnv
from worldmodel.errors import InputError

CAPACITY = 64
_MAX_WAIT_S = 0.002

StateScorer = Callable[[EnvState], jax.Array]
"""Of the states of B patients, leaves [B, ...]: numbers [B, 25], one for each joint action."""


@dataclass(frozen=True)
class EnvBatch:
    """The patients of a pool at the start of their episodes."""

    patients: np.ndarray  # [N] int32 identities, of stays or of synthetic patients
    states: EnvState  # leaves [N, ...]


def reset_batch(
    env: SepsisEnv,
    keys: jax.Array,
    patients: np.ndarray,
    *,
    stays: np.ndarray | None = None,
) -> EnvBatch:
    """N patients at the start of their episodes.

    Args:
      env: whose observations are observations that look back `Forecaster.past` rows.
      keys: [N] the whole luck of each episode.
      patients: [N] int32 identities.
      stays: [N] indices of recorded stays to start from, for a learned world model.

    Raises:
      InputError: nobody to reset_batch.
    """
    if not len(patients):
        raise InputError("patients: none to treat; pick a split that has some")
    index = None if stays is None else jnp.asarray(stays, jnp.int32)
    states, _ = _reset(env, keys, index)
    return EnvBatch(np.asarray(patients, np.int32), states)


class EnvPool:
    """Patients who wait for decisions.

    Args:
      env: the world that the patients live in.
      admission: from `reset_batch` with the same environment.
      forecaster: the world model that answers questions; it may be another world than `env`.
        None where there is none to ask.
      capacity: patients in a batch.
      state_scorer: looks at everybody whose state is new, before anybody decides; what it says is
        found in `values` and never told to the model.
      lockstep: shared with the model's generator, for equal batches in equal runs.
    """

    def __init__(
        self,
        env: SepsisEnv,
        admission: EnvBatch,
        forecaster: Forecaster | None,
        *,
        capacity: int = CAPACITY,
        state_scorer: StateScorer | None = None,
        lockstep: Lockstep | None = None,
    ):
        self._env, self._states, self._patients = env, admission.states, admission.patients
        self._forecaster = forecaster
        self._capacity = min(capacity, len(admission.patients))
        self._first = jax.device_get(admission.states.last)
        thread = ThreadPoolExecutor(1, thread_name_prefix="pool")
        batcher = partial(
            Batcher,
            thread=thread,
            capacity=self._capacity,
            max_wait_s=_MAX_WAIT_S,
            lockstep=lockstep,
        )
        self._questions: Batcher[tuple[int, tuple[int, ...]], Forecast] = batcher(self._forecast)
        self._orders: Batcher[tuple[int, int], Timestep] = batcher(self._move)
        self._thread = thread
        self._state_scorer = state_scorer
        self._values: list[tuple[float, ...] | None] = [None] * len(admission.patients)
        for start in range(0, len(admission.patients), self._capacity):
            stop = min(start + self._capacity, len(admission.patients))
            self._score_states(range(start, stop))

    @property
    def can_simulate(self) -> bool:
        """Whether there is a world model to ask."""
        return self._forecaster is not None

    def initial(self, slot: int) -> Timestep:
        """What was seen of a patient at the start, as numpy arrays."""
        return _row(self._first, slot)

    def values(self, slot: int) -> tuple[float, ...] | None:
        """[25] by the state scorer, of the state that a patient is in now; None without one."""
        return self._values[slot]

    async def simulate(self, slot: int, actions: tuple[int, ...]) -> Forecast:
        """What the world model expects under one to three joint actions; leaves [K, ...]."""
        return await self._questions.ask((slot, actions))

    async def prescribe(self, slot: int, action: int) -> Timestep:
        """Four hours under a joint action, as numpy arrays."""
        return await self._orders.ask((slot, action))

    def close(self) -> None:
        """Lets go of the thread."""
        self._thread.shutdown(wait=False)

    def _forecast(self, asked: Sequence[tuple[int, tuple[int, ...]]]) -> list[Forecast]:
        assert self._forecaster is not None
        slots = self._padded([slot for slot, _ in asked], 0)
        actions = np.zeros((self._capacity, MAX_OPTIONS), np.int32)
        for row, (_, options) in enumerate(asked):
            actions[row, : len(options)] = options
        observations = _observations(self._states, slots)
        found = self._forecaster(observations, self._patients[slots], actions)
        return [
            jax.tree.map(itemgetter((row, slice(len(options)))), found)
            for row, (_, options) in enumerate(asked)
        ]

    def _move(self, orders: Sequence[tuple[int, int]]) -> list[Timestep]:
        # Rows beyond the last patient are read as the last one's and written nowhere.
        slots = self._padded([slot for slot, _ in orders], len(self._patients))
        actions = self._padded([action for _, action in orders], 0)
        self._states, timesteps = _step(self._env, self._states, slots, actions)
        self._score_states([slot for slot, _ in orders])
        found = jax.device_get(timesteps)
        return [_row(found, row) for row in range(len(orders))]

    def _score_states(self, slots: Sequence[int]) -> None:
        if self._state_scorer is None:
            return
        found = np.asarray(self._state_scorer(_states(self._states, self._padded([*slots], 0))))
        for slot, values in zip(slots, found.tolist(), strict=False):  # the rest fills the batch
            self._values[slot] = tuple(values)

    def _padded(self, values: list[int], fill: int) -> np.ndarray:
        return np.asarray(values + [fill] * (self._capacity - len(values)), np.int32)


@jax.jit
def _reset(env: SepsisEnv, keys: jax.Array, stays: jax.Array | None) -> tuple[EnvState, Timestep]:
    return jax.vmap(env.reset, in_axes=(0, None if stays is None else 0))(keys, stays)


@jax.jit
def _observations(states: EnvState, slots: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[slots], states.last.observation)


@jax.jit
def _states(states: EnvState, slots: jax.Array) -> EnvState:
    return jax.tree.map(lambda leaf: leaf[slots], states)


@partial(jax.jit, donate_argnums=1)
def _step(
    env: SepsisEnv, states: EnvState, slots: jax.Array, actions: jax.Array
) -> tuple[EnvState, Timestep]:
    chosen = jax.tree.map(lambda leaf: leaf[slots], states)
    moved, timesteps = jax.vmap(env.step)(chosen, actions)
    after = jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), states, moved)
    # Who asks has seen the past already, and it is most of what would travel to the host.
    return after, replace(timesteps, observation=replace(timesteps.observation, past=None))


def _row(batch: Timestep, row: int) -> Timestep:
    return jax.tree.map(itemgetter(row), batch)
