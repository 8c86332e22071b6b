"""Patients of a loop that asks for one thing at a time and waits for it.

Trainers such as TRL call the tools of one dialogue after those of another, so that requests never
wait together (`policy.agent.env_pool` answers those that do). Here the first request after a step
is answered for all patients and all treatments in one jitted call, and the others find their
answers ready: speculative execution, for a simulator that costs less per patient the more there
are.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np

from policy.agent.env_pool import CAPACITY, EnvBatch
from policy.agent.forecast import Forecast, Forecaster
from policy.agent.tools import MAX_OPTIONS
from worldmodel import schema
from worldmodel.envs.base import Timestep
from worldmodel.envs.env import EnvState, SepsisEnv
from worldmodel.resources import bucket

_SMALLEST = 8  # rows of the smallest program
_ALL = schema.NUM_ACTIONS


class SpeculativePool:
    """Environments addressed by slot, for callers that wait for each answer.

    Slots are numbers from 0; a slot holds the patient of its last `reset`. Methods may be called
    from several threads.

    Args:
      env: the environment of the patients, with the 25 actions.
      forecaster: world model that answers simulations; None for none. Where equal questions have no
        equal answers (`ForecastConfig.fresh`), or where the answer to one treatment depends on the
        others (`shuffled`, mode "reference"), each question is answered alone.
      capacity: patients per jitted call.
    """

    def __init__(self, env: SepsisEnv, forecaster: Forecaster | None, *, capacity: int = CAPACITY):
        self._env, self._forecaster, self._capacity = env, forecaster, capacity
        self._states: EnvState | None = None  # of all slots, leaves [M, ...]
        self._unwritten: dict[int, _Row] = {}  # newer states than those of `_states`, by slot
        self._patients: dict[int, int] = {}
        self._asked: Counter[int] = Counter()  # questions about the patient of a slot
        self._treated: set[int] = set()  # slots whose stay goes on
        self._forecasts: dict[int, Forecast] = {}  # of the present state, leaves [25, ...]
        self._moves: dict[int, _Move] = {}  # from the present state
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()

    @property
    def can_simulate(self) -> bool:
        """Whether there is a world model that answers simulations."""
        return self._forecaster is not None

    @property
    def calls(self) -> Mapping[str, int]:
        """Number of jitted calls so far that simulated or prescribed, by these names."""
        return self._calls

    def reset(self, slot: int, batch: EnvBatch, row: int) -> None:
        """Puts a patient of a batch into a slot."""
        with self._lock:
            self._unwritten[slot] = _Row(batch.states, row)
            self._patients[slot] = int(batch.patients[row])
            self._asked[slot] = 0
            self._treated.add(slot)
            self._forget(slot)

    def simulate(self, slot: int, actions: tuple[int, ...]) -> Forecast:
        """Forecasts of the world model for one to three joint actions; leaves [K, ...]."""
        assert self._forecaster is not None
        with self._lock:
            config = self._forecaster.config
            if config.fresh or config.shuffled or config.mode != "corrected":
                options = np.zeros((1, MAX_OPTIONS), np.int32)
                options[0, : len(actions)] = actions
                (found,) = self._forecast([slot], options)
                at = np.arange(len(actions))
            else:
                if slot not in self._forecasts:
                    wanted = self._next(slot, self._treated - self._forecasts.keys())
                    every = np.arange(_ALL, dtype=np.int32)[None]
                    answers = self._forecast(wanted, every)
                    self._forecasts |= dict(zip(wanted, answers, strict=True))
                found, at = self._forecasts[slot], np.array(actions)
            self._asked[slot] += 1
            result: Forecast = jax.tree.map(lambda leaf: leaf[at], found)
            return result

    def prescribe(self, slot: int, action: int) -> Timestep:
        """Steps a patient by a joint action; the time step as NumPy arrays."""
        with self._lock:
            if slot not in self._moves:
                self._move(self._next(slot, self._treated - self._moves.keys()))
            move = self._moves[slot]
            after: Timestep = jax.tree.map(itemgetter(move.first + action), move.timesteps)
            self._unwritten[slot] = _Row(move.states, move.first + action)
            self._forget(slot)
            if after.done:
                self._treated.discard(slot)
            return after

    def _forget(self, slot: int) -> None:
        self._forecasts.pop(slot, None)
        self._moves.pop(slot, None)

    def _next(self, slot: int, others: set[int]) -> list[int]:
        """At most `capacity` slots, in the order in which they are asked about from this one on."""
        wanted = sorted(others | {slot}, key=lambda other: (other < slot, other))
        return wanted[: self._capacity]

    def _forecast(self, slots: list[int], actions: np.ndarray) -> list[Forecast]:
        """Leaves [K, ...] per slot, for actions [1, K]."""
        assert self._forecaster is not None
        self._calls["simulate"] += 1
        rows = _padded(slots)
        found = self._forecaster.answer(
            self._env,
            self._written(),
            rows,
            np.array([self._patients[slot] for slot in rows.tolist()], np.int32),
            np.repeat(actions, len(rows), 0),
            np.array([self._asked[slot] for slot in rows.tolist()]),
        )
        return [jax.tree.map(itemgetter(row), found) for row in range(len(slots))]

    def _move(self, slots: list[int]) -> None:
        """Steps patients by every action, and keeps what may follow."""
        self._calls["prescribe"] += 1
        states, timesteps = _every_step(self._env, self._written(), _padded(slots))
        found = jax.device_get(timesteps)
        for row, slot in enumerate(slots):
            self._moves[slot] = _Move(states, found, row * _ALL)

    def _written(self) -> EnvState:
        """The states of all slots."""
        by_source: dict[int, list[int]] = {}
        for slot, row in self._unwritten.items():
            by_source.setdefault(id(row.states), []).append(slot)
        size = bucket(max(self._patients) + 1, _SMALLEST)
        for slots in by_source.values():
            source = self._unwritten[slots[0]].states
            old = source if self._states is None else self._states
            if old is source or len(old.taken) < size:
                old = _resized(old, np.minimum(np.arange(size), len(old.taken) - 1))
            to = _padded(slots)
            at = np.array([self._unwritten[slot].number for slot in to.tolist()], np.int32)
            self._states = _write(old, source, to, at)
        self._unwritten.clear()
        assert self._states is not None
        return self._states


class _Row:
    """A state among others."""

    def __init__(self, states: EnvState, number: int):
        self.states, self.number = states, number


class _Move:
    """What follows each action: rows `first` to `first + 24` of states and time steps."""

    def __init__(self, states: EnvState, timesteps: Timestep, first: int):
        self.states, self.timesteps, self.first = states, timesteps, first


def _padded(slots: list[int]) -> np.ndarray:
    """[B] slots, the last one repeated, so that there are few programs."""
    return np.array(slots + slots[-1:] * (bucket(len(slots), _SMALLEST) - len(slots)), np.int32)


@jax.jit
def _resized(states: EnvState, rows: jax.Array) -> EnvState:
    result: EnvState = jax.tree.map(lambda leaf: leaf[rows], states)
    return result


@partial(jax.jit, donate_argnums=0)
def _write(states: EnvState, source: EnvState, slots: jax.Array, rows: jax.Array) -> EnvState:
    result: EnvState = jax.tree.map(lambda old, new: old.at[slots].set(new[rows]), states, source)
    return result


@jax.jit
def _every_step(env: SepsisEnv, states: EnvState, slots: jax.Array) -> tuple[EnvState, Timestep]:
    """States and time steps [B * 25, ...] after each action, by slot and then by action."""
    chosen = jax.tree.map(lambda leaf: jnp.repeat(leaf[slots], _ALL, 0), states)
    moved, timesteps = jax.vmap(env.step)(chosen, jnp.tile(jnp.arange(_ALL), len(slots)))
    # The dialogue has seen the past rows before, and they are most of the data to transfer.
    return moved, replace(timesteps, observation=replace(timesteps.observation, past=None))
