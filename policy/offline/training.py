"""Settings and the training loop of offline reinforcement learning: one jitted scan over seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from policy.offline.algorithms import (
    ALGORITHMS,
    Batch,
    Networks,
    OfflineConfig,
    OfflinePolicy,
    make_networks,
)
from policy.offline.data import Transitions
from worldmodel.errors import InputError
from worldmodel.resources import usable_cores
from worldmodel.scaling import Scaler

Progress = Callable[[int, int, float], None]
"""`progress(updates done, updates, latest loss)`; updates as the mean over seeds."""

RECORDS = 20  # points of the loss curve
_WARM_UP = 100  # updates


class _Learner(NamedTuple):
    networks: Networks
    targets: Networks
    optimizer: optax.OptState


class Learned(NamedTuple):
    """What training gives."""

    policy: OfflinePolicy  # of the averaged (target) networks of all seeds
    losses: np.ndarray  # [S, RECORDS] mean loss of each twentieth of the updates


def train_offline(
    transitions: Transitions,
    scaler: Scaler,
    config: OfflineConfig,
    *,
    progress: Progress | None = None,
) -> Learned:
    """Trains `config.seeds` sets of networks.

    Args:
      transitions: of the training split, from `policy.offline.data.transitions`.
      scaler: that their features were made with; kept in the policy.
      config: algorithm and settings; `updates` is rounded up to a multiple of 20.
      progress: called from within the training about twenty times.

    Raises:
      InputError: there are no transitions, or the loss is not finite.
    """
    if transitions.num_rows < 2:
        raise InputError("offline training: needs at least two recorded steps; use more stays")
    keys = seed_keys(config)
    report = _reporter(progress, config)
    networks, loss = _train(keys, transitions, config=config, report=report)
    losses = np.asarray(loss)
    if not np.isfinite(losses).all():
        raise InputError(
            f"offline training ({config.algorithm}): the loss is not finite; lower "
            "learning_rate or look for extreme values in the episodes"
        )
    return Learned(OfflinePolicy(networks, scaler, config), losses)


def _reporter(
    progress: Progress | None, config: OfflineConfig
) -> Callable[[jax.Array], None] | None:
    if progress is None:
        return None
    reports = itertools.count(1)  # of every seed, in any order

    def report(loss: jax.Array) -> None:
        records, rest = divmod(next(reports), config.seeds)
        if not rest:
            progress(records * config.updates // RECORDS, config.updates, float(loss))

    return report


def _optimizer(config: OfflineConfig, updates: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(_WARM_UP, updates // 2),
        decay_steps=updates,
        end_value=0.05 * config.learning_rate,
    )
    matrices = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(10.0),
        optax.adamw(schedule, weight_decay=config.weight_decay, mask=matrices),
    )


def seed_keys(config: OfflineConfig) -> jax.Array:
    """[S] a key for each seed, the same whatever the number of seeds."""
    world = jax.random.key(config.seed)
    return jax.vmap(jax.random.fold_in, (None, 0))(world, jnp.arange(config.seeds))


def _train(
    keys: jax.Array,
    transitions: Transitions,
    *,
    config: OfflineConfig,
    report: Callable[[jax.Array], None] | None,
) -> tuple[Networks, jax.Array]:
    if jax.default_backend() != "cpu":
        batched: tuple[Networks, jax.Array] = train_all(
            keys, transitions, config=config, report=report
        )
        return batched

    def run(key: jax.Array) -> tuple[Networks, jax.Array]:
        done: tuple[Networks, jax.Array] = jax.block_until_ready(
            _train_one(key, transitions, config=config, report=report)
        )
        return done

    with ThreadPoolExecutor(usable_cores()) as pool:
        parts = list(pool.map(run, keys))
    result: tuple[Networks, jax.Array] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    return result


@partial(jax.jit, static_argnames=("config", "report"))
def _train_one(
    key: jax.Array,
    transitions: Transitions,
    *,
    config: OfflineConfig,
    report: Callable[[jax.Array], None] | None,
) -> tuple[Networks, jax.Array]:
    algorithm = ALGORITHMS[config.algorithm]
    per_record = -(-config.updates // RECORDS)
    optimizer = _optimizer(config, RECORDS * per_record)

    def update(
        learner: _Learner, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[_Learner, jax.Array]:
        key, number = inputs
        batch = draw_batch(key, transitions, config)
        loss, gradient = jax.value_and_grad(algorithm.loss)(
            learner.networks, learner.targets, batch, config
        )
        change, state = optimizer.update(gradient, learner.optimizer, learner.networks)
        networks = optax.apply_updates(learner.networks, change)
        share = jnp.float32(config.polyak)
        if config.copy_every:
            share = jnp.where((number + 1) % config.copy_every == 0, 1.0, 0.0)
        targets = optax.incremental_update(networks, learner.targets, share)
        return _Learner(networks, targets, state), loss

    def record(
        learner: _Learner, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[_Learner, jax.Array]:
        learner, losses = jax.lax.scan(update, learner, inputs)
        loss = losses.mean()
        if report is not None:
            jax.debug.callback(report, loss)
        return learner, loss

    key_init, key_batches = jax.random.split(key)
    networks = make_networks(algorithm, transitions.features.shape[-1], config, nnx.Rngs(key_init))
    numbers = jnp.arange(RECORDS * per_record).reshape(RECORDS, per_record)
    batch_keys = jax.random.split(key_batches, numbers.shape)
    learner = _Learner(networks, networks, optimizer.init(networks))
    learner, losses = jax.lax.scan(record, learner, (batch_keys, numbers))
    return learner.targets, losses


@partial(jax.jit, static_argnames=("config", "report"))
def train_all(
    keys: jax.Array,
    transitions: Transitions,
    *,
    config: OfflineConfig,
    report: Callable[[jax.Array], None] | None,
) -> tuple[Networks, jax.Array]:
    """Networks [S, ...] and losses [S, RECORDS] of all seeds in one batched program."""
    train_one = partial(_train_one, config=config, report=report)
    result: tuple[Networks, jax.Array] = jax.vmap(train_one, (0, None))(keys, transitions)
    return result


def draw_batch(key: jax.Array, transitions: Transitions, config: OfflineConfig) -> Batch:
    """A minibatch drawn with replacement; the key is consumed."""
    count = transitions.num_rows
    row = jax.random.randint(key, (config.batch_size,), 0, count)
    after = jnp.minimum(row + 1, count - 1)
    return Batch(
        features=transitions.features[row],
        action=transitions.action[row],
        reward=transitions.reward[row],
        discount=jnp.where(transitions.last[row], 0.0, config.gamma),
        next_features=transitions.features[after],
        next_action=transitions.action[after],
        next_sofa=transitions.sofa[after],
    )
