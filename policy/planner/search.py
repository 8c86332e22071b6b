"""Planning: imagine what the actions lead to in the world model, and choose.

A sequence of actions is worth what it gains over the clinician's habit along the imagined path,
less a price for leaving that habit (KL-regularised policy improvement; the gains add up to the
difference of the two policies' values, Kakade & Langford 2002):

    J(a_0 ... a_H-1) = sum_t gamma^t [ A(s_t, a_t) + w log b(a_t | s_t) ] - k std over members

Three searches: all 25 first steps ("one-step"), the cross-entropy method over sequences (Rubinstein
1999), and sequential halving (Karnin et al. 2013) over first actions, each followed by the
clinician's likeliest ones, with more samples of the noise for the better half.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from policy.base import Policy
from policy.planner.advantage import Advantage
from policy.planner.configuration import PlannerConfig
from worldmodel import schema
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import History, history_of, view_of
from worldmodel.simulate.step import follow
from worldmodel.view import View, recent

_OUT = -1e9  # score of an action that is not supported


@struct.dataclass
class Planner(Policy):
    """Searches the world model before every prescription."""

    world_model: WorldModel
    advantage: Advantage
    clinician: Policy
    config: PlannerConfig = struct.field(pytree_node=False)
    past: ClassVar[int] = schema.OUTCOME_WINDOW

    def __call__(self, key: jax.Array, view: View) -> jax.Array:
        values = self.action_values(key, view)
        if self.config.temperature <= 0:
            return jax.nn.one_hot(values.argmax(), schema.NUM_ACTIONS)
        return jax.nn.softmax(values / self.config.temperature)

    def action_values(self, key: jax.Array, view: View) -> jax.Array:
        """[25] J of the best sequence found that starts with each action; -1e9 for none."""
        search = {
            "one-step": _one_step,
            "cross-entropy": _cross_entropy,
            "sequential-halving": _sequential_halving,
        }[self.config.search]
        habit = self.habit(view)
        values = search(self, key, view, habit)
        supported = habit >= self.config.support * habit.max()
        return jnp.where(supported, values, _OUT)

    def habit(self, view: View) -> jax.Array:
        """[25] the clinician's probabilities."""
        return self.clinician(jax.random.key(0), recent(view, self.clinician.past))


def _one_step(planner: Planner, key: jax.Array, view: View, habit: jax.Array) -> jax.Array:
    """[25] by one batched prediction, without imagining further."""
    del key
    every = jnp.arange(schema.NUM_ACTIONS)
    here = _repeat(history_of(planner.world_model, view), schema.NUM_ACTIONS).choose(every)
    mu = planner.world_model.transitions(*here.window(schema.STATE_WINDOW)).mu  # [E, 25, 39]
    gains = planner.advantage.of_actions(view, mu, habit)
    return _cautious(gains, planner.config) + planner.config.prior_weight * _log(habit)


def _cautious(values: jax.Array, config: PlannerConfig) -> jax.Array:
    """[...] mean over members [E, ...] less the price of their disagreement."""
    return values.mean(0) - config.risk * values.std(0)


def _log(probability: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(probability, 1e-12))  # clinicians may rule an action out


def _repeat(history: History, count: int) -> History:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape[1:])), history)


def play(
    planner: Planner,
    key: jax.Array,
    view: View,
    sequences: jax.Array,
    samples: int,
) -> jax.Array:
    """J [K] of sequences [K, H] of joint actions; -1 stands for the clinician's likeliest.

    All sequences meet the same noise (common random numbers); 0 samples play the noise-free path.
    """
    config = planner.config
    count, horizon = sequences.shape
    repeats = max(samples, 1)
    noise = jnp.zeros((horizon, repeats, schema.NUM_FEATURES))
    if samples:
        noise = jax.random.normal(key, noise.shape)
    start = _repeat(history_of(planner.world_model, view), count * repeats)
    planned = jnp.repeat(sequences, repeats, axis=0)  # [K S, H]

    def of_member(state_model: object) -> jax.Array:
        member = replace(
            planner.world_model, state_model=jax.tree.map(lambda leaf: leaf[None], state_model)
        )

        def step(history: History, inputs: tuple[jax.Array, ...]) -> tuple[History, jax.Array]:
            given, eps = inputs
            seen = view_of(member, history, past=planner.past)
            habits = jax.vmap(planner.habit)(seen)
            action = jnp.where(given < 0, habits.argmax(-1), given).astype(jnp.int32)
            history = history.choose(action)
            prediction = member.transition(*history.window(schema.STATE_WINDOW))
            gain = jax.vmap(planner.advantage.of_action)(seen, prediction.mu, habits, action)
            price = _log(jnp.take_along_axis(habits, action[:, None], -1)[:, 0])
            eps = jnp.tile(eps, (count, 1))
            history, _ = follow(member, history, prediction, eps, mode="corrected")
            return history, gain + config.prior_weight * price

        _, worth = jax.lax.scan(step, start, (planned.T, noise))
        total = config.gamma ** jnp.arange(horizon) @ worth
        return total.reshape(count, repeats).mean(1)

    return _cautious(jax.lax.map(of_member, planner.world_model.state_model), config)


def _best_by_first(values: jax.Array, first: jax.Array) -> jax.Array:
    """[25] the best of the values [K] among sequences that start with each action."""
    return jnp.full(schema.NUM_ACTIONS, _OUT).at[first].max(values)


def _cross_entropy(planner: Planner, key: jax.Array, view: View, habit: jax.Array) -> jax.Array:
    config = planner.config
    key_noise, key_draw = jax.random.split(key)
    allowed = jnp.where(habit >= config.support * habit.max(), habit, 0.0)
    start = jnp.broadcast_to(allowed / allowed.sum(), (config.horizon, schema.NUM_ACTIONS))

    def iterate(probs: jax.Array, key_iteration: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (config.candidates, config.horizon)
        sequences = jax.random.categorical(key_iteration, jnp.log(probs), shape=shape)
        values = play(planner, key_noise, view, sequences, config.samples)
        elite = sequences[jax.lax.top_k(values, config.elites)[1]]
        share = jax.nn.one_hot(elite, schema.NUM_ACTIONS).mean(0)
        return 0.7 * share + 0.3 * probs, _best_by_first(values, sequences[:, 0])

    _, found = jax.lax.scan(iterate, start, jax.random.split(key_draw, config.iterations))
    return found.max(0)


def _sequential_halving(
    planner: Planner, key: jax.Array, view: View, habit: jax.Array
) -> jax.Array:
    config = planner.config
    kept = min(config.candidates, schema.NUM_ACTIONS)
    first = jax.lax.top_k(_one_step(planner, key, view, habit), kept)[1]
    values = jnp.full(schema.NUM_ACTIONS, _OUT)
    samples = max(config.samples, 1)
    make = partial(jnp.full, fill_value=-1, dtype=jnp.int32)
    while True:
        key, key_round = jax.random.split(key)
        sequences = make((kept, config.horizon)).at[:, 0].set(first)
        worth = play(planner, key_round, view, sequences, samples)
        # Whoever was dropped keeps a rank below those that went on.
        values = jnp.where(values > _OUT, values - 1e3, values).at[first].set(worth)
        if kept == 1:
            return values
        kept, samples = (kept + 1) // 2, 2 * samples
        first = first[jax.lax.top_k(worth, kept)[1]]
