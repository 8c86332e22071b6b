"""Pool of environments: all patients under treatment, stepped in batches on the device.

Each patient has a slot and a dialogue of its own. Requests of the dialogues that wait at the same
time, for a forecast (`simulate`) or for the next step (`prescribe`), are answered by one jitted
call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np

from policy.agent.forecast import Forecast, Forecaster
from policy.agent.tools import MAX_OPTIONS
from policy.serving.backend import Batcher, Lockstep
from worldmodel.envs.base import Timestep
from worldmodel.envs.env import EnvState, SepsisEnv
from worldmodel.errors import InputError
from worldmodel.resources import bucket

CAPACITY = 64
_SMALLEST = 8  # rows of the smallest program
_MAX_WAIT_S = 0.002

StateScorer = Callable[[EnvState], jax.Array]
"""Function of the states of B patients, leaves [B, ...], to values [B, 25] of all actions."""


@dataclass(frozen=True)
class EnvBatch:
    """The patients of a pool at the start of their episodes.

    There are M >= N states, so that numbers of patients share compiled programs; those after the
    first N repeat the last patient, and nobody treats them.
    """

    patients: np.ndarray  # [N] int32 identities, of stays or of synthetic patients
    states: EnvState  # leaves [M, ...], M a power of two


def reset_batch(
    env: SepsisEnv,
    keys: jax.Array,
    patients: np.ndarray,
    *,
    stays: np.ndarray | None = None,
) -> EnvBatch:
    """N patients at the start of their episodes.

    Args:
      env: environment whose observations include `Forecaster.past` past rows.
      keys: [N] random key of each episode.
      patients: [N] int32 identities.
      stays: [N] indices of recorded stays to start from, for a learned world model.

    Raises:
      InputError: there are no patients.
    """
    if not len(patients):
        raise InputError("patients: none to treat; pick a split that has some")
    rows = np.minimum(np.arange(bucket(len(patients), _SMALLEST)), len(patients) - 1)
    index = None if stays is None else jnp.asarray(np.asarray(stays, np.int32)[rows])
    states, _ = _reset(env, keys[rows], index)
    return EnvBatch(np.asarray(patients, np.int32), states)


class EnvPool:
    """Environments of N patients, addressed by slot.

    Args:
      env: the environment of the patients.
      batch: made by `reset_batch` with the same environment.
      forecaster: world model that answers simulations, which may differ from `env`; None for
        none.
      capacity: patients per jitted call.
      state_scorer: computes `values` of each new state; the language model does not see them.
      lockstep: shared with the generator of the model; makes runs reproducible.
      recorded: [N, T] joint actions that are given whatever is prescribed, so that every state is a
        recorded one; none for what is prescribed.
    """

    def __init__(
        self,
        env: SepsisEnv,
        batch: EnvBatch,
        forecaster: Forecaster | None,
        *,
        recorded: np.ndarray | None = None,
        capacity: int = CAPACITY,
        state_scorer: StateScorer | None = None,
        lockstep: Lockstep | None = None,
    ):
        self._env, self._states, self._patients = env, batch.states, batch.patients
        self._forecaster = forecaster
        self._capacity = min(capacity, len(batch.patients))
        self._rows = bucket(self._capacity, _SMALLEST)
        self._first = jax.device_get(batch.states.last)
        self._out_of_range = len(batch.states.taken)
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
        self._asked = np.zeros(len(batch.patients), np.int64)
        self._recorded = recorded
        self._taken = np.zeros(len(batch.patients), np.int64)
        self._state_scorer = state_scorer
        self._values: list[tuple[float, ...] | None] = [None] * len(batch.patients)
        for start in range(0, len(batch.patients), self._capacity):
            stop = min(start + self._capacity, len(batch.patients))
            self._score_states(range(start, stop))

    @property
    def can_simulate(self) -> bool:
        """Whether there is a world model that answers simulations."""
        return self._forecaster is not None

    @property
    def size(self) -> int:
        """Number of patients."""
        return len(self._patients)

    def initial(self, slot: int) -> Timestep:
        """The first time step of a patient, as NumPy arrays."""
        return _row(self._first, slot)

    def values(self, slot: int) -> tuple[float, ...] | None:
        """[25] values of the current state by the state scorer; None without one."""
        return self._values[slot]

    async def simulate(self, slot: int, actions: tuple[int, ...]) -> Forecast:
        """Forecasts of the world model for one to three joint actions; leaves [K, ...]."""
        return await self._questions.ask((slot, actions))

    def given(self, slot: int, action: int) -> int:
        """The joint action that is given where this one is prescribed."""
        return action if self._recorded is None else int(self._recorded[slot, self._taken[slot]])

    async def prescribe(self, slot: int, action: int) -> Timestep:
        """Steps a patient by a prescribed joint action; the time step as NumPy arrays."""
        action = self.given(slot, action)
        self._taken[slot] += 1
        return await self._orders.ask((slot, action))

    def close(self) -> None:
        """Shuts the thread down."""
        self._thread.shutdown(wait=False)

    def _forecast(self, asked: Sequence[tuple[int, tuple[int, ...]]]) -> list[Forecast]:
        assert self._forecaster is not None
        slots = self._padded([slot for slot, _ in asked], 0)
        actions = np.zeros((self._rows, MAX_OPTIONS), np.int32)
        for row, (_, options) in enumerate(asked):
            actions[row, : len(options)] = options
        before = self._asked[slots]
        found = self._forecaster.answer(
            self._env, self._states, slots, self._patients[slots], actions, before
        )
        self._asked[[slot for slot, _ in asked]] += 1
        return [
            jax.tree.map(itemgetter((row, slice(len(options)))), found)
            for row, (_, options) in enumerate(asked)
        ]

    def _move(self, orders: Sequence[tuple[int, int]]) -> list[Timestep]:
        # Padded rows have an index out of range: reads are clamped, writes are dropped.
        slots = self._padded([slot for slot, _ in orders], self._out_of_range)
        actions = self._padded([action for _, action in orders], 0)
        self._states, timesteps = _step(self._env, self._states, slots, actions)
        self._score_states([slot for slot, _ in orders])
        found = jax.device_get(timesteps)
        return [_row(found, row) for row in range(len(orders))]

    def _score_states(self, slots: Sequence[int]) -> None:
        if self._state_scorer is None:
            return
        found = np.asarray(self._state_scorer(_states(self._states, self._padded([*slots], 0))))
        for slot, values in zip(slots, found.tolist(), strict=False):  # the rest is padding
            self._values[slot] = tuple(values)

    def _padded(self, values: list[int], fill: int) -> np.ndarray:
        return np.asarray(values + [fill] * (self._rows - len(values)), np.int32)


@jax.jit
def _reset(env: SepsisEnv, keys: jax.Array, stays: jax.Array | None) -> tuple[EnvState, Timestep]:
    return jax.vmap(env.reset, in_axes=(0, None if stays is None else 0))(keys, stays)


@jax.jit
def _states(states: EnvState, slots: jax.Array) -> EnvState:
    result: EnvState = jax.tree.map(lambda leaf: leaf[slots], states)
    return result


@partial(jax.jit, donate_argnums=1)
def _step(
    env: SepsisEnv, states: EnvState, slots: jax.Array, actions: jax.Array
) -> tuple[EnvState, Timestep]:
    chosen = jax.tree.map(lambda leaf: leaf[slots], states)
    moved, timesteps = jax.vmap(env.step)(chosen, actions)
    after = jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), states, moved)
    # The dialogue has seen the past rows before, and they are most of the data to transfer.
    return after, replace(timesteps, observation=replace(timesteps.observation, past=None))


def _row(batch: Timestep, row: int) -> Timestep:
    result: Timestep = jax.tree.map(itemgetter(row), batch)
    return result
