"""Planning by search in the world model.

The `rollout` search improves on the clinician by simulating them (Tesauro & Galperin 1996;
Bertsekas 2019): each treatment is held for some steps, the clinician goes on, and the best total
reward is chosen, anew at every step. The other searches are for world models that cannot be
asked that: they score predicted rows by an advantage that is learned from records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from policy.base import Policy
from policy.offline.algorithms import OfflinePolicy
from policy.offline.data import Transitions, transitions
from policy.planner_advantage import (
    PAST,
    Advantage,
    effects,
    fit_advantage,
    moderators,
    untrained_advantage,
)
from worldmodel import schema, struct
from worldmodel.clinical import rules
from worldmodel.configuration import require
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.evaluation import predict_stays
from worldmodel.models.windows import to_sequences
from worldmodel.models.world_model import Models, WorldModel
from worldmodel.observation import Observation, observation_at, recent
from worldmodel.resources import in_blocks
from worldmodel.simulate.history import History, history_from_observation, observe
from worldmodel.simulate.rollout import rollout
from worldmodel.simulate.stay_unroll import append_row, predict_next, step_history
from worldmodel.simulate.stays import encode_past, memory_of, pack_stays
from worldmodel.simulate.step import follow

_OUT = -1e9  # score of an action that is not supported


def is_supported(values: jax.Array) -> jax.Array:
    """[25] bool, of `Planner.action_values`."""
    return values > _OUT / 2


@struct.dataclass
class Planner(Policy):
    """Searches the world model before every prescription."""

    world_model: WorldModel
    advantage: Advantage
    clinician: Policy
    config: PlannerConfig = struct.field(pytree_node=False)
    past: ClassVar[int] = schema.OUTCOME_WINDOW

    def __call__(self, key: jax.Array, observation: Observation) -> jax.Array:
        """[25] probabilities of the actions."""
        values = self.action_values(key, observation)
        if self.config.temperature <= 0:
            return jax.nn.one_hot(values.argmax(), schema.NUM_ACTIONS)
        return jax.nn.softmax(values / self.config.temperature)

    def action_values(self, key: jax.Array, observation: Observation) -> jax.Array:
        """[25] J of the best sequence found that starts with each action; -1e9 for none."""
        search = {
            "rollout": _rollouts,
            "one-step": _one_step,
            "cross-entropy": _cross_entropy,
            "sequential-halving": _sequential_halving,
        }[self.config.search]
        prior = self.prior(observation)
        values = search(self, key, observation, prior)
        values -= self.config.rule_penalty * _breaks_rules(observation)
        supported = prior >= self.config.support * prior.max()
        return jnp.where(supported, values, _OUT)

    def prior(self, observation: Observation) -> jax.Array:
        """[25] the clinician's probabilities."""
        return self.clinician(jax.random.key(0), recent(observation, self.clinician.past))


def _rollouts(
    planner: Planner, key: jax.Array, observation: Observation, prior: jax.Array
) -> jax.Array:
    """[25] total reward of holding each treatment for the horizon; then the clinician goes on."""
    config, members = planner.config, planner.world_model.num_members
    found = rollout(
        planner.world_model,
        key,
        history_from_observation(planner.world_model, observation),
        np.repeat(np.arange(schema.NUM_ACTIONS)[:, None], config.horizon, axis=1),
        samples=max(config.samples, 1) * members,
        features=(),
    )
    total = found.total_reward[0].reshape(schema.NUM_ACTIONS, -1, members)  # sample s: s mod E
    return _cautious(total.mean(1).T, config) + config.prior_weight * _log(prior)


def _one_step(
    planner: Planner, key: jax.Array, observation: Observation, prior: jax.Array
) -> jax.Array:
    """[25] by one batched one-step prediction."""
    del key
    every = jnp.arange(schema.NUM_ACTIONS)
    here = _repeat(
        history_from_observation(planner.world_model, observation), schema.NUM_ACTIONS
    ).choose(every)
    mu = predict_next(planner.world_model, here)  # [E, 25, 39]
    gains = planner.advantage.of_actions(observation, mu, prior)
    return _cautious(gains, planner.config) + planner.config.prior_weight * _log(prior)


def _breaks_rules(observation: Observation) -> jax.Array:
    """[25] bool; which actions break G1 or G2."""
    vasopressor, fluid = schema.action_levels(jnp.arange(schema.NUM_ACTIONS))
    meanbp, lactate = (observation.dynamic[schema.INDEX[name]] for name in ("meanbp", "lactate"))
    return rules.breaks_guideline(
        meanbp, lactate, vasopressor, fluid, observation.vasopressor, observation.step
    )


def _cautious(values: jax.Array, config: PlannerConfig) -> jax.Array:
    """[...] mean over members [E, ...] minus a penalty on their standard deviation."""
    return values.mean(0) - config.risk * values.std(0)


def _log(probability: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(probability, 1e-12))  # clinicians may rule an action out


def _repeat(history: History, count: int) -> History:
    result: History = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape[1:])), history
    )
    return result


def play(
    planner: Planner,
    key: jax.Array,
    observation: Observation,
    sequences: jax.Array,
    samples: int,
) -> jax.Array:
    """J [K] of sequences [K, H] of joint actions; -1 stands for the clinician's likeliest.

    All sequences meet the same noise (common random numbers); 0 samples play the noise-free path.
    """
    config = planner.config
    count, horizon = sequences.shape
    repeats = max(samples, 1)
    noise = jnp.zeros((horizon, repeats, planner.world_model.noise_width))
    if samples:
        noise = jax.random.normal(key, noise.shape)
    start = _repeat(history_from_observation(planner.world_model, observation), count * repeats)
    planned = jnp.repeat(sequences, repeats, axis=0)  # [K S, H]

    def of_member(models: Models) -> jax.Array:
        member = planner.world_model.with_models(models)
        begin, move = _stepping(member)

        def step(
            carry: tuple[History, jax.Array], inputs: tuple[jax.Array, ...]
        ) -> tuple[tuple[History, jax.Array], jax.Array]:
            history, hidden = carry
            given, eps = inputs
            seen = observe(member, history, past=planner.past)
            priors = jax.vmap(planner.prior)(seen)
            action = jnp.where(given < 0, priors.argmax(-1), given).astype(jnp.int32)
            eps = jnp.tile(eps, (count, 1))
            carry, mu = move(history.choose(action), hidden, eps)
            gain = jax.vmap(planner.advantage.of_action)(seen, mu, priors, action)
            penalty = _log(jnp.take_along_axis(priors, action[:, None], -1)[:, 0])
            return carry, gain + config.prior_weight * penalty

        _, returns = jax.lax.scan(step, (start, begin(start)), (planned.T, noise))
        total = config.gamma ** jnp.arange(horizon) @ returns
        return total.reshape(count, repeats).mean(1)

    models = (planner.world_model.state_model, planner.world_model.outcome_model)
    return _cautious(jax.lax.map(of_member, models), config)


_Move = Callable[[History, jax.Array, jax.Array], tuple[tuple[History, jax.Array], jax.Array]]


def _stepping(member: WorldModel) -> tuple[Callable[[History], jax.Array], _Move]:
    """Functions that begin and continue branches in a model of one member.

    The first gives the hidden state of histories; the second takes histories with a chosen
    treatment, their hidden state and noise, and gives both after the step, and the mean [B, 39].
    """
    if not member.is_recurrent:

        def follow_window(
            history: History, hidden: jax.Array, eps: jax.Array
        ) -> tuple[tuple[History, jax.Array], jax.Array]:
            prediction = member.transition(*history.window(schema.STATE_WINDOW))
            moved, _ = follow(member, history, prediction, eps, mode="corrected")
            return (moved, hidden), prediction.mu

        return lambda history: jnp.zeros(()), follow_window
    kernel = pack_stays(member)

    def follow_stay(
        history: History, hidden: jax.Array, eps: jax.Array
    ) -> tuple[tuple[History, jax.Array], jax.Array]:
        after, found = step_history(member, kernel, history, hidden, eps)
        moved, _ = append_row(member, history, after, found)
        return (moved, after.hidden), found.prediction.mu

    return lambda history: encode_past(kernel, memory_of(history)), follow_stay


def _best_by_first(values: jax.Array, first: jax.Array) -> jax.Array:
    """[25] the best of the values [K] among sequences that start with each action."""
    return jnp.full(schema.NUM_ACTIONS, _OUT).at[first].max(values)


def _cross_entropy(
    planner: Planner, key: jax.Array, observation: Observation, prior: jax.Array
) -> jax.Array:
    config = planner.config
    key_noise, key_draw = jax.random.split(key)
    allowed = jnp.where(prior >= config.support * prior.max(), prior, 0.0)
    start = jnp.broadcast_to(allowed / allowed.sum(), (config.horizon, schema.NUM_ACTIONS))

    def iterate(probs: jax.Array, key_iteration: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (config.candidates, config.horizon)
        sequences = jax.random.categorical(key_iteration, jnp.log(probs), shape=shape)
        values = play(planner, key_noise, observation, sequences, config.samples)
        elite = sequences[jax.lax.top_k(values, config.elites)[1]]
        share = jax.nn.one_hot(elite, schema.NUM_ACTIONS).mean(0)
        return 0.7 * share + 0.3 * probs, _best_by_first(values, sequences[:, 0])

    _, found = jax.lax.scan(iterate, start, jax.random.split(key_draw, config.iterations))
    return found.max(0)


def _sequential_halving(
    planner: Planner, key: jax.Array, observation: Observation, prior: jax.Array
) -> jax.Array:
    config = planner.config
    kept = min(config.candidates, schema.NUM_ACTIONS)
    first = jax.lax.top_k(_one_step(planner, key, observation, prior), kept)[1]
    values = jnp.full(schema.NUM_ACTIONS, _OUT)
    samples = max(config.samples, 1)
    make = partial(jnp.full, fill_value=-1, dtype=jnp.int32)
    while True:
        key, key_round = jax.random.split(key)
        sequences = make((kept, config.horizon)).at[:, 0].set(first)
        returns = play(planner, key_round, observation, sequences, samples)
        # Actions that were dropped rank below those that remain.
        values = jnp.where(values > _OUT, values - 1e3, values).at[first].set(returns)
        if kept == 1:
            return values
        kept, samples = (kept + 1) // 2, 2 * samples
        first = first[jax.lax.top_k(returns, kept)[1]]


SEARCHES = ("rollout", "one-step", "cross-entropy", "sequential-halving")


@dataclass(frozen=True)
class PlannerConfig:
    """Settings of the search.

    Attributes:
      search: one of `SEARCHES`.
      horizon: steps of a sequence, or for which a treatment is held; the one-step search has 1.
      samples: noise samples per member and sequence, at least 1 of rollouts; in sequential
        halving those of the first round. 0 for the noise-free path.
      candidates: sequences per iteration of cross-entropy, first actions of sequential halving.
      iterations: of cross-entropy.
      elites: best sequences that the next iteration is drawn around.
      prior_weight: w, reward units per nat of leaving the clinician's policy; learned advantages
        need about 0.5.
      risk: k, reward units per standard deviation over ensemble members.
      support: least probability of an action, as a share of the clinician's likeliest one's.
      rule_penalty: reward units that an action against guideline rule G1 or G2 costs.
      gamma: discount per step.
      temperature: probabilities are softmax(J / temperature) over first actions; 0 for the best.
      ridge: of a learned advantage.
    """

    search: str = "rollout"
    horizon: int = 3
    samples: int = 1
    candidates: int = 32
    iterations: int = 3
    elites: int = 6
    prior_weight: float = 0.0
    risk: float = 0.0
    support: float = 0.01
    rule_penalty: float = 0.0
    gamma: float = 0.99
    temperature: float = 0.0
    ridge: float = 100.0

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise InputError(f"search: got {self.search!r}, expected one of {', '.join(SEARCHES)}")
        counts = ("horizon", "candidates", "iterations", "elites")
        require(self, "at least 1", lambda count: count >= 1, *counts)
        if self.search == "one-step" and self.horizon != 1:
            raise InputError(
                f"horizon: got {self.horizon}, the one-step search has 1; longer sequences need "
                "search=cross-entropy or search=sequential-halving"
            )
        if self.elites > self.candidates:
            raise InputError(
                f"elites: got {self.elites}, expected at most the {self.candidates} candidates"
            )
        if self.search == "sequential-halving" and self.candidates > schema.NUM_ACTIONS:
            raise InputError(f"candidates: got {self.candidates}, there are 25 first actions")
        sizes = ("samples", "prior_weight", "risk", "rule_penalty", "temperature", "ridge")
        require(self, "0 or more", lambda size: size >= 0, *sizes)
        require(self, "within [0, 1]", lambda share: 0 <= share <= 1, "support", "gamma")

    @property
    def learns_advantage(self) -> bool:
        """Whether predicted rows are scored by an advantage that is learned from records."""
        return self.search != "rollout"


_BLOCK = 2048  # rows per call


def fit_planner(
    episodes: Episodes,
    world_model: WorldModel,
    critic: OfflinePolicy | None,
    clinician: Policy,
    config: PlannerConfig | None = None,
) -> Planner:
    """A planner for the world model.

    Args:
      episodes: of which the training split is used, if an advantage is learned.
      world_model: to search.
      critic: trained by implicit Q-learning on the same split; its value V is used, if an advantage
        is learned.
      clinician: whose prior the planner improves on, such as a clone.
      config: settings.

    Raises:
      InputError: the critic is missing or has no value function, or there are no training stays.
    """
    config = config or PlannerConfig()
    scaler = world_model.scaler
    if not config.learns_advantage:
        return Planner(world_model, untrained_advantage(scaler), clinician, config)
    if critic is None:
        raise InputError(f"planner: search={config.search} needs a critic; give one trained by iql")
    if "v" not in critic.networks:
        raise InputError(
            f"planner: a critic trained by {critic.config.algorithm} has no value of states; "
            "give one trained by iql"
        )
    train = episodes.of_split("train")
    if not train.num_stays:
        raise InputError("planner: the training split has no stays; use a larger cohort")
    stay, step = np.nonzero(np.asarray(train.valid))
    features = np.asarray(transitions(train, scaler, past=PAST).features)
    moderator = np.asarray(
        moderators(observation_at(train, jnp.asarray(stay), jnp.asarray(step)), scaler)
    )
    advantage = fit_advantage(
        features,
        moderator,
        _predicted_effects(world_model, train, stay, step),
        clinician.action_probs(train)[stay, step],
        np.asarray(train.action)[stay, step],
        temporal_difference(critic, transitions(train, critic.scaler, past=critic.past)),
        scaler,
        ridge=config.ridge,
    )
    return Planner(world_model, advantage, clinician, config)


def temporal_difference(critic: OfflinePolicy, rows: Transitions) -> np.ndarray:
    """[M] r + gamma V(s') - V(s); at the end of a stay r - V(s)."""

    @jax.jit
    def value(features: jax.Array) -> jax.Array:
        result: jax.Array = jax.vmap(lambda net: net(features)[:, 0])(critic.networks["v"]).mean(0)
        return result

    values = np.asarray(value(rows.features))
    following = np.where(np.asarray(rows.last), 0.0, np.roll(values, -1))
    result: np.ndarray = np.asarray(rows.reward) + critic.config.gamma * following - values
    return result


def _predicted_effects(
    world_model: WorldModel, train: Episodes, stay: np.ndarray, step: np.ndarray
) -> np.ndarray:
    """[M, 8] of the treatments that were given."""
    if world_model.is_recurrent:
        mu = predict_stays(world_model, train)[0].mu[stay, step]
        return np.asarray(effects(jnp.asarray(mu), world_model.scaler))
    sequences = to_sequences(train, world_model.scaler)
    index = np.stack([stay, step], axis=1).astype(np.int32)

    @jax.jit
    def of_rows(rows: jax.Array) -> jax.Array:
        mu = world_model.transition(*sequences.window(rows, schema.STATE_WINDOW)).mu
        return effects(mu, world_model.scaler)

    result: np.ndarray = in_blocks(
        lambda rows: of_rows(jnp.asarray(index[rows])), len(index), _BLOCK
    )
    return result
