"""Offline reinforcement learning for discrete actions: networks, losses, and the learned policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from policy.base import Policy, decision_features
from worldmodel import schema, struct
from worldmodel.configuration import require
from worldmodel.errors import InputError
from worldmodel.observation import Observation, recent
from worldmodel.scaling import Scaler

NAMES = ("dqn", "wd3qne", "cql", "iql", "bcq")


@dataclass(frozen=True)
class OfflineConfig:
    """Settings of offline reinforcement learning.

    Attributes:
      algorithm: one of `NAMES`; see `policy.offline.algorithms`.
      hidden: widths of the networks' layers.
      updates: number of gradient steps.
      batch_size: transitions per step.
      learning_rate: peak of a warm-up and cosine schedule.
      weight_decay: decoupled, on matrices only.
      gamma: discount per step.
      polyak: weight of the networks in the moving average of their targets, per step.
      copy_every: steps between copies of the networks to the targets; 0 for Polyak averaging.
      cql_alpha: weight of CQL's penalty.
      expectile: of IQL's value.
      beta: inverse temperature of the advantage weights of IQL's actor.
      support: BCQ allows an action where its behaviour probability is at least this share of the
        likeliest one's.
      past: rows that the features look back on, the newest included; 0 for the state alone.
      seeds: networks trained side by side; the policy averages their scores.
      seed: of initialisation and minibatches.
    """

    algorithm: str = "iql"
    hidden: tuple[int, ...] = (128, 128)
    updates: int = 4000
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    gamma: float = 0.99
    polyak: float = 0.01
    copy_every: int = 0
    cql_alpha: float = 1.0
    expectile: float = 0.7
    beta: float = 1.0
    support: float = 0.3
    past: int = 4
    seeds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in NAMES:
            raise InputError(
                f"algorithm: got {self.algorithm!r}, expected one of {', '.join(NAMES)}"
            )
        require(self, "at least 1", lambda count: count >= 1, "updates", "batch_size", "seeds")
        require(self, "widths of at least 1", lambda widths: widths and min(widths) >= 1, "hidden")
        if not self.copy_every and not self.polyak:
            raise InputError("polyak: got 0, so that targets never move; set it or copy_every")
        if self.copy_every > self.updates:
            raise InputError(
                f"copy_every: got {self.copy_every}, expected at most the {self.updates} updates"
            )
        shares = ("gamma", "polyak", "expectile", "support")
        require(self, "within [0, 1]", lambda share: 0 <= share <= 1, *shares)
        sizes = ("learning_rate", "weight_decay", "copy_every", "cql_alpha", "beta")
        require(self, "0 or more", lambda size: size >= 0, *sizes)
        most = schema.OUTCOME_WINDOW
        require(self, f"0 to {most} rows", lambda rows: 0 <= rows <= most, "past")


class Perceptron(nnx.Module):
    """Dense layers with layer normalisation and ReLU: [..., D] -> [..., O]."""

    def __init__(self, width: int, hidden: tuple[int, ...], out: int, *, rngs: nnx.Rngs):
        sizes = (width, *hidden)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairwise(sizes)])
        self.norms = nnx.List([nnx.LayerNorm(b, rngs=rngs) for b in hidden])
        self.out = nnx.Linear(
            sizes[-1], out, kernel_init=nnx.initializers.orthogonal(0.1), rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., O] of features [..., D]."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.relu(norm(layer(x)))
        return self.out(x)


class DuelingQ(nnx.Module):
    """Q = V + A - mean A (Wang et al. 2016): [..., D] -> [..., 25]."""

    def __init__(self, width: int, hidden: tuple[int, ...], actions: int, *, rngs: nnx.Rngs):
        self.trunk = Perceptron(width, hidden, 1 + actions, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., 25] action values of features [..., D]."""
        value, advantage = jnp.split(self.trunk(x), [1], axis=-1)
        return value + advantage - advantage.mean(-1, keepdims=True)


# networks of several classes, by role
Networks = dict[str, Any]

LOW_SOFA = 4.0  # below it WD3QNE uses the value of the clinician's action
_HUBER = 5.0  # reward units; beyond, errors count linearly
_LARGEST_WEIGHT = 100.0  # of IQL's actor


class Batch(NamedTuple):
    """B transitions; the next state of a stay's last row is undefined and has discount 0."""

    features: jax.Array  # [B, D]
    action: jax.Array  # [B] int32
    reward: jax.Array  # [B]
    discount: jax.Array  # [B] gamma, 0 where the stay ends
    next_features: jax.Array  # [B, D]
    next_action: jax.Array  # [B] int32, the clinician's
    next_sofa: jax.Array  # [B]


Loss = Callable[[Networks, Networks, Batch, OfflineConfig], jax.Array]


class Algorithm(NamedTuple):
    """Networks, loss and scores of an algorithm."""

    extra: dict[str, int]  # networks beside Q, and how many numbers they give
    loss: Loss  # (networks, target networks, batch, config) -> []
    score: Callable[[Networks, jax.Array, OfflineConfig], jax.Array]  # features [D] -> [25]


def make_networks(
    algorithm: Algorithm, width: int, config: OfflineConfig, rngs: nnx.Rngs
) -> Networks:
    """Untrained networks on features of the given width."""
    networks: Networks = {"q": DuelingQ(width, config.hidden, schema.NUM_ACTIONS, rngs=rngs)}
    for name, out in algorithm.extra.items():
        networks[name] = Perceptron(width, config.hidden, out, rngs=rngs)
    return networks


def pick(values: jax.Array, action: jax.Array) -> jax.Array:
    """[B] the values [B, 25] of the actions [B]."""
    return jnp.take_along_axis(values, action[:, None], -1)[:, 0]


def allowed_actions(logits: jax.Array, share: float) -> jax.Array:
    """[..., 25] bool: behaviour probability at least `share` of the likeliest action's."""
    if share <= 0:
        return jnp.ones(logits.shape, bool)
    return logits >= logits.max(-1, keepdims=True) + jnp.log(share)


def double_q_value(
    networks: Networks, targets: Networks, features: jax.Array, allowed: jax.Array | None = None
) -> jax.Array:
    """[B] the target network's value of the online network's greedy action."""
    online = networks["q"](features)
    if allowed is not None:
        online = jnp.where(allowed, online, -jnp.inf)
    return pick(targets["q"](features), online.argmax(-1))


def _q_error(taken: jax.Array, batch: Batch, following: jax.Array) -> jax.Array:
    target = jax.lax.stop_gradient(batch.reward + batch.discount * following)
    error = taken - target
    result: jax.Array = optax.losses.huber_loss(error, delta=_HUBER).mean()
    return result


def dqn_loss(
    networks: Networks, targets: Networks, batch: Batch, config: OfflineConfig
) -> Float[Array, ""]:
    """Huber loss to r + gamma Q'(s', argmax Q(s', .))."""
    del config
    taken = pick(networks["q"](batch.features), batch.action)
    return _q_error(taken, batch, double_q_value(networks, targets, batch.next_features))


def wd3qne_value(networks: Networks, targets: Networks, batch: Batch) -> Float[Array, " B"]:
    """[B] value of the next state.

    The published description leaves the weights of the two greedy actions open; they are the
    softmax of their target values here.
    """
    values = targets["q"](batch.next_features)
    online = pick(values, networks["q"](batch.next_features).argmax(-1))
    both = jnp.stack([online, values.max(-1)], -1)
    mixed = (jax.nn.softmax(both, -1) * both).sum(-1)
    return jnp.where(batch.next_sofa < LOW_SOFA, pick(values, batch.next_action), mixed)


def wd3qne_loss(
    networks: Networks, targets: Networks, batch: Batch, config: OfflineConfig
) -> Float[Array, ""]:
    """Huber loss to r + gamma `wd3qne_value`."""
    del config
    taken = pick(networks["q"](batch.features), batch.action)
    return _q_error(taken, batch, wd3qne_value(networks, targets, batch))


def cql_loss(
    networks: Networks, targets: Networks, batch: Batch, config: OfflineConfig
) -> Float[Array, ""]:
    """Double DQN plus alpha (log sum exp Q(s, .) - Q(s, a))."""
    q = networks["q"](batch.features)
    taken = pick(q, batch.action)
    penalty = jax.nn.logsumexp(q, -1) - taken
    following = double_q_value(networks, targets, batch.next_features)
    return _q_error(taken, batch, following) + config.cql_alpha * penalty.mean()


def iql_loss(
    networks: Networks, targets: Networks, batch: Batch, config: OfflineConfig
) -> Float[Array, ""]:
    """Expectile regression of V to Q', Q to r + gamma V(s'), actor weighted by exp(beta A)."""
    taken = jax.lax.stop_gradient(pick(targets["q"](batch.features), batch.action))
    advantage = taken - networks["v"](batch.features)[:, 0]
    weight = jnp.where(advantage > 0, config.expectile, 1.0 - config.expectile)
    value_loss = (weight * advantage**2).mean()
    log_probs = jax.nn.log_softmax(networks["actor"](batch.features))
    trust = jnp.exp(config.beta * jax.lax.stop_gradient(advantage))
    actor_loss = -(jnp.minimum(trust, _LARGEST_WEIGHT) * pick(log_probs, batch.action)).mean()
    predicted = pick(networks["q"](batch.features), batch.action)
    q_loss = _q_error(predicted, batch, networks["v"](batch.next_features)[:, 0])
    result: jax.Array = value_loss + q_loss + actor_loss
    return result


def bcq_loss(
    networks: Networks, targets: Networks, batch: Batch, config: OfflineConfig
) -> Float[Array, ""]:
    """Double DQN among actions the clinician may choose, plus cloning of the clinician."""
    allowed = allowed_actions(networks["behavior"](batch.next_features), config.support)
    following = double_q_value(networks, targets, batch.next_features, allowed)
    log_probs = jax.nn.log_softmax(networks["behavior"](batch.features))
    taken = pick(networks["q"](batch.features), batch.action)
    return _q_error(taken, batch, following) - pick(log_probs, batch.action).mean()


def _by_q(networks: Networks, features: jax.Array, config: OfflineConfig) -> jax.Array:
    del config
    result: jax.Array = networks["q"](features)
    return result


def _by_actor(networks: Networks, features: jax.Array, config: OfflineConfig) -> jax.Array:
    del config
    return jax.nn.log_softmax(networks["actor"](features))


def _by_supported_q(networks: Networks, features: jax.Array, config: OfflineConfig) -> jax.Array:
    allowed = allowed_actions(networks["behavior"](features), config.support)
    return jnp.where(allowed, networks["q"](features), -1e9)


ALGORITHMS: dict[str, Algorithm] = {
    "dqn": Algorithm({}, dqn_loss, _by_q),
    "wd3qne": Algorithm({}, wd3qne_loss, _by_q),
    "cql": Algorithm({}, cql_loss, _by_q),
    "iql": Algorithm({"v": 1, "actor": schema.NUM_ACTIONS}, iql_loss, _by_actor),
    "bcq": Algorithm({"behavior": schema.NUM_ACTIONS}, bcq_loss, _by_supported_q),
}


@struct.dataclass
class OfflinePolicy(Policy):
    """Acts on the scores of its networks, averaged over seeds.

    The probabilities are softmax(score / temperature); at temperature 0 the best action has all.
    Scores are values of actions, for IQL log-probabilities of its actor.
    """

    networks: Networks  # leaves [S, ...]
    scaler: Scaler
    config: OfflineConfig = struct.field(pytree_node=False)
    temperature: float = struct.field(pytree_node=False, default=0.0)

    @property
    def past(self) -> int:  # type: ignore[override]
        """Rows of `Observation.past` that the features look back on."""
        return self.config.past

    @property
    def num_seeds(self) -> int:
        """Number of networks trained side by side."""
        result: int = jax.tree.leaves(self.networks)[0].shape[0]
        return result

    def member(self, index: int) -> OfflinePolicy:
        """The policy of one seed."""
        networks = jax.tree.map(lambda leaf: leaf[index][None], self.networks)
        return replace(self, networks=networks)

    def scores(self, observation: Observation) -> Float[Array, "S 25"]:
        """[S, 25] of every seed."""
        features = decision_features(recent(observation, self.past), self.scaler)
        score = ALGORITHMS[self.config.algorithm].score
        return jax.vmap(lambda networks: score(networks, features, self.config))(self.networks)

    def __call__(self, key: jax.Array, observation: Observation) -> jax.Array:
        """[25] probabilities of the actions; the key is not used."""
        del key
        scores = self.scores(observation).mean(0)
        if self.temperature <= 0:
            return jax.nn.one_hot(scores.argmax(), schema.NUM_ACTIONS)
        return jax.nn.softmax(scores / self.temperature)
