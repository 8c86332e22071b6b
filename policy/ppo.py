"""Proximal policy optimisation (Schulman et al., arXiv 1707.06347) in any `SepsisEnv`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from policy.base import Policy, decision_features
from policy.offline.algorithms import OfflinePolicy, Perceptron, pick
from worldmodel import schema, struct
from worldmodel.configuration import require
from worldmodel.envs.env import EnvState, SepsisEnv
from worldmodel.errors import InputError
from worldmodel.observation import Observation, recent
from worldmodel.scaling import Scaler

Progress = Callable[[int, int, float], None]
"""`progress(rounds done, rounds, mean return)`."""

_HUBER = 5.0  # reward units; beyond, the critic's errors count linearly


class Networks(NamedTuple):
    """Who acts, and who values."""

    actor: Perceptron  # [..., D] -> [..., 25] logits
    critic: Perceptron  # [..., D] -> [..., 1] return to come


class Experience(NamedTuple):
    """P episodes of at most T steps; what is not `valid` lies after the end."""

    features: jax.Array  # [T + 1, P, D]; the last row is what the last step led to
    action: jax.Array  # [T, P] int32
    reward: jax.Array  # [T, P]
    terminated: jax.Array  # [T, P] bool, the episode has its outcome
    done: jax.Array  # [T, P] bool, it has ended or was cut off
    valid: jax.Array  # [T, P] bool, the step was taken before the end


class Rows(NamedTuple):
    """R rows to learn from."""

    features: jax.Array  # [R, D]
    action: jax.Array  # [R] int32
    log_prob: jax.Array  # [R] of the action when it was taken
    advantage: jax.Array  # [R]
    target: jax.Array  # [R] of the critic


class History(NamedTuple):
    """The course of training, one number per round."""

    mean_return: np.ndarray  # undiscounted, of the policy that draws its actions
    entropy: np.ndarray  # nats, mean over the rows
    value_error: np.ndarray  # RMS of the critic against its targets, before the round's updates
    clipped: np.ndarray  # share of rows in the round's minibatches whose ratio was clipped


def train_ppo(
    key: jax.Array,
    env: SepsisEnv,
    scaler: Scaler,
    config: PPOConfig,
    *,
    start: OfflinePolicy | None = None,
    progress: Progress | None = None,
) -> tuple[OnlinePolicy, History]:
    """Trains a policy by playing.

    Args:
      key: of patients, actions, initialisation and minibatches; consumed.
      env: whose observations have at least `config.past` rows of `Observation.past`.
      scaler: of the features; kept in the policy.
      config: settings.
      start: an IQL policy; actor and critic start from those of its first seed.
      progress: called from within the training after every round.

    Raises:
      InputError: the environment shows no `Observation`, or too few rows of history; `start` is
        not of IQL, or has other sizes; the training diverged.
    """
    key_init, key_train = jax.random.split(key)
    shown = jax.eval_shape(env.reset, key_train)[1].observation
    if not isinstance(shown, Observation):
        raise InputError(
            "PPO: the environment must give `Observation`s; take the synthetic or learned one"
        )
    width = jax.eval_shape(partial(_features, scaler=scaler, past=config.past), shown).shape[-1]
    if start is None:
        networks = _fresh_networks(width, config, nnx.Rngs(key_init))
    else:
        networks = _networks_of(start, config)
    report = None if progress is None else partial(_report, progress, config.iterations)
    networks, history = _train(key_train, env, networks, scaler, config=config, report=report)
    history = History(*(np.asarray(values) for values in history))
    if not all(np.isfinite(values).all() for values in history):
        raise InputError("PPO: the training diverged; lower learning_rate")
    return OnlinePolicy(networks.actor, scaler, config), history


def _report(progress: Progress, rounds: int, number: jax.Array, value: jax.Array) -> None:
    progress(int(number) + 1, rounds, float(value))


def _features(observation: Observation, *, scaler: Scaler, past: int) -> jax.Array:
    return decision_features(recent(observation, past), scaler)


def _fresh_networks(width: int, config: PPOConfig, rngs: nnx.Rngs) -> Networks:
    return Networks(
        actor=Perceptron(width, config.hidden, schema.NUM_ACTIONS, rngs=rngs),
        critic=Perceptron(width, config.hidden, 1, rngs=rngs),
    )


def _networks_of(start: OfflinePolicy, config: PPOConfig) -> Networks:
    given = start.config
    if given.algorithm != "iql":
        raise InputError(f"PPO starts from a policy of iql, got one of {given.algorithm}")
    for name in ("past", "hidden"):
        wanted, found = getattr(config, name), getattr(given, name)
        if tuple(np.ravel(wanted)) != tuple(np.ravel(found)):
            raise InputError(f"{name}: the policy to start from has {found}, PPO {wanted}")
    first = jax.tree.map(lambda leaf: leaf[0], start.networks)
    return Networks(first["actor"], first["v"])


Learner = tuple[Networks, optax.OptState]


@partial(jax.jit, static_argnames=("config", "report"))
def _train(
    key: jax.Array,
    env: SepsisEnv,
    networks: Networks,
    scaler: Scaler,
    *,
    config: PPOConfig,
    report: Callable[[jax.Array], None] | None,
) -> tuple[Networks, tuple[jax.Array, ...]]:
    updates = config.iterations * config.minibatches
    rate = optax.linear_schedule(
        config.learning_rate, config.final_rate * config.learning_rate, updates
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(rate))

    def iteration(learner: Learner, number: jax.Array) -> tuple[Learner, tuple[jax.Array, ...]]:
        networks, state = learner
        key_play, key_rows = jax.random.split(jax.random.fold_in(key, number))
        experience = play(key_play, env, networks.actor, scaler, config)
        rows, value_error, entropy = rows_of(networks, experience, config)
        bonus = config.entropy * (1.0 - number / config.iterations)

        def update(learner: Learner, key: jax.Array) -> tuple[Learner, jax.Array]:
            networks, state = learner
            batch = draw_rows(key, rows, experience.valid, config.batch_size)
            gradient, clipped = jax.grad(ppo_loss, has_aux=True)(networks, batch, bonus, config)
            change, state = optimizer.update(gradient, state, networks)
            return (optax.apply_updates(networks, change), state), clipped

        keys = jax.random.split(key_rows, config.minibatches)
        learner, clipped = jax.lax.scan(update, (networks, state), keys)
        mean_return = experience.reward.sum(0).mean()
        if report is not None:
            jax.debug.callback(report, number, mean_return)
        return learner, (mean_return, entropy, value_error, clipped.mean())

    learner = (networks, optimizer.init(networks))
    (networks, _), history = jax.lax.scan(iteration, learner, jnp.arange(config.iterations))
    return networks, history


Playing = tuple[EnvState, jax.Array, jax.Array]  # states, what is seen, whether it is over


def play(
    key: jax.Array, env: SepsisEnv, actor: Perceptron, scaler: Scaler, config: PPOConfig
) -> Experience:
    """Episodes of `config.patients` fresh patients under the actor's drawn actions."""
    key_patients, key_actions = jax.random.split(key)
    state, first = jax.vmap(env.reset)(jax.random.split(key_patients, config.patients))

    def step(carry: Playing, key: jax.Array) -> tuple[Playing, tuple[jax.Array, ...]]:
        state, seen, over = carry
        action = jax.random.categorical(key, actor(seen)).astype(jnp.int32)
        state, timestep = jax.vmap(env.step)(state, action)
        after = _features(timestep.observation, scaler=scaler, past=config.past)
        out = (seen, action, timestep.reward, timestep.terminated, timestep.done, ~over)
        return (state, after, timestep.done), out

    seen = _features(first.observation, scaler=scaler, past=config.past)
    keys = jax.random.split(key_actions, config.steps)
    (_, last, _), (features, *rest) = jax.lax.scan(step, (state, seen, first.done), keys)
    return Experience(jnp.concatenate([features, last[None]]), *rest)


def advantages(
    reward: jax.Array,
    values: jax.Array,
    terminated: jax.Array,
    done: jax.Array,
    *,
    gamma: float,
    trace: float,
) -> jax.Array:
    """[T, P] generalised advantage estimates; undefined after the end of an episode.

    Args:
      reward, terminated, done: [T, P] of each step; an episode that is done but not terminated
        was cut off, and is valued by the critic.
      values: [T + 1, P] before each step and after the last.
      gamma: discount per step.
      trace: lambda.
    """
    surprise = reward + gamma * jnp.where(terminated, 0.0, values[1:]) - values[:-1]

    def back(following: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        surprise, done = now
        advantage = surprise + gamma * trace * jnp.where(done, 0.0, following)
        return advantage, advantage

    nothing = jnp.zeros_like(reward[0])
    result: jax.Array = jax.lax.scan(back, nothing, (surprise, done), reverse=True)[1]
    return result


def rows_of(
    networks: Networks, experience: Experience, config: PPOConfig
) -> tuple[Rows, jax.Array, jax.Array]:
    """All T P rows with normalised advantages, the critic's RMS error and the entropy."""
    values = networks.critic(experience.features)[..., 0]
    log_probs = jax.nn.log_softmax(networks.actor(experience.features[:-1]))
    advantage = advantages(
        experience.reward,
        values,
        experience.terminated,
        experience.done,
        gamma=config.gamma,
        trace=config.trace,
    )
    valid = experience.valid
    target = advantage + values[:-1]
    error = jnp.sqrt(jnp.mean(advantage**2, where=valid))
    entropy = -jnp.mean((jnp.exp(log_probs) * log_probs).sum(-1), where=valid)
    scale = jnp.std(advantage, where=valid) + 1e-8
    advantage = (advantage - jnp.mean(advantage, where=valid)) / scale
    taken = jnp.take_along_axis(log_probs, experience.action[..., None], -1)[..., 0]
    rows = Rows(experience.features[:-1], experience.action, taken, advantage, target)
    return Rows(*(leaf.reshape(-1, *leaf.shape[2:]) for leaf in rows)), error, entropy


def draw_rows(key: jax.Array, rows: Rows, valid: jax.Array, count: int) -> Rows:
    """[count] of the valid rows, drawn with replacement; the key is consumed."""
    valid = valid.reshape(-1)
    total = jnp.cumsum(valid)
    number = jax.random.randint(key, (count,), 0, total[-1])
    index = jnp.searchsorted(total, number, side="right")
    return Rows(*(leaf[index] for leaf in rows))


def ppo_loss(
    networks: Networks, batch: Rows, bonus: jax.Array, config: PPOConfig
) -> tuple[jax.Array, jax.Array]:
    """Clipped surrogate, the critic's Huber loss and the entropy bonus; share of clipped rows."""
    log_probs = jax.nn.log_softmax(networks.actor(batch.features))
    ratio = jnp.exp(pick(log_probs, batch.action) - batch.log_prob)
    bounded = jnp.clip(ratio, 1.0 - config.clip, 1.0 + config.clip)
    gain = jnp.minimum(ratio * batch.advantage, bounded * batch.advantage).mean()
    error = networks.critic(batch.features)[:, 0] - batch.target
    value_loss = optax.losses.huber_loss(error, delta=_HUBER).mean()
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
    clipped = jnp.mean(bounded != ratio)
    return -gain + config.value_weight * value_loss - bonus * entropy, clipped


@dataclass(frozen=True)
class PPOConfig:
    """Settings of proximal policy optimisation.

    Attributes:
      hidden: widths of the networks' layers.
      iterations: rounds of playing and learning.
      patients: fresh patients per round, run side by side from their first row on.
      steps: most steps of an episode; a longer one is cut off there, and the
        critic values what would have followed.
      minibatches: gradient steps per round.
      batch_size: rows per gradient step, drawn from those of the round.
      learning_rate: at the start; falls linearly to `final_rate` of it.
      final_rate: share of the learning rate that is left at the end.
      gamma: discount per step.
      trace: lambda of generalised advantage estimation.
      clip: how far the probability ratio of an action may pay.
      value_weight: of the critic's Huber loss.
      entropy: weight of the entropy bonus at the start; falls linearly to 0.
      max_grad_norm: largest norm of a gradient.
      past: rows that the features look back on, the newest included; 0 for the state alone.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "clip_norm": "max_grad_norm",
    }

    hidden: tuple[int, ...] = (128, 128)
    iterations: int = 50
    patients: int = 6144
    steps: int = 20
    minibatches: int = 60
    batch_size: int = 2048
    learning_rate: float = 3e-4
    final_rate: float = 1.0
    gamma: float = 1.0
    trace: float = 0.97
    clip: float = 0.2
    value_weight: float = 0.05
    entropy: float = 0.01
    max_grad_norm: float = 1.0
    past: int = 4

    def __post_init__(self) -> None:
        counts = ("iterations", "patients", "steps", "minibatches", "batch_size")
        require(self, "at least 1", lambda count: count >= 1, *counts)
        require(self, "widths of at least 1", lambda widths: widths and min(widths) >= 1, "hidden")
        shares = ("final_rate", "gamma", "trace")
        require(self, "within [0, 1]", lambda share: 0 <= share <= 1, *shares)
        require(
            self, "more than 0", lambda value: value > 0, "learning_rate", "clip", "max_grad_norm"
        )
        require(self, "0 or more", lambda weight: weight >= 0, "value_weight", "entropy")
        most = schema.OUTCOME_WINDOW
        require(self, f"0 to {most} rows", lambda rows: 0 <= rows <= most, "past")


@struct.dataclass
class OnlinePolicy(Policy):
    """Acts on the logits of its actor.

    The probabilities are softmax(logits / temperature); at temperature 0 the best action has all.
    At temperature 1 it is the policy that was trained.
    """

    actor: Perceptron
    scaler: Scaler
    config: PPOConfig = struct.field(pytree_node=False)
    temperature: float = struct.field(pytree_node=False, default=0.0)

    @property
    def past(self) -> int:  # type: ignore[override]
        """Rows of `Observation.past` that the features look back on."""
        return self.config.past

    def logits(self, observation: Observation) -> jax.Array:
        """[25] of the actor."""
        return self.actor(decision_features(recent(observation, self.past), self.scaler))

    def __call__(self, key: jax.Array, observation: Observation) -> jax.Array:
        """[25] probabilities of the actions; the key is not used."""
        del key
        logits = self.logits(observation)
        if self.temperature <= 0:
            return jax.nn.one_hot(logits.argmax(), schema.NUM_ACTIONS)
        return jax.nn.softmax(logits / self.temperature)
