"""Fitted Q evaluation with networks, all policies and folds trained together.

One batch of transitions serves every policy; parameters are stacked [F, K] and updated under vmap
against slowly moving copies (Voloshin, Le, Jiang & Yue 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import Values
from sepsis_jax.ope.fqe import after


@dataclass(frozen=True)
class NeuralConfig:
    """Settings of the training.

    Attributes:
      hidden: width of two hidden layers.
      steps: updates.
      batch: transitions per update.
      learning_rate: of Adam, falling to 0 by a cosine.
      weight_decay: of AdamW.
      target_rate: share by which the slow copy moves towards the parameters per update.
    """

    hidden: int = 64
    steps: int = 3000
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    target_rate: float = 0.01


def _init(key: jax.Array, sizes: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "w": jax.random.normal(k, (m, n)) * jnp.sqrt(2.0 / m),
            "b": jnp.zeros(n),
        }
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def _apply(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


@partial(jax.jit, static_argnames=("gamma", "folds", "config"))
def fit(
    key: jax.Array,
    data: OPEData,
    probs: jax.Array,
    fold: jax.Array,
    *,
    gamma: float,
    folds: int,
    config: NeuralConfig | None = None,
) -> Values:
    """Values of K policies, cross-fitted.

    Args:
      key: of initial parameters and batches; consumed.
      data: with features [N, T, D].
      probs: [K, N, T, A].
      fold: [N] int32.
      gamma: discount.
      folds: F; 1 fits and predicts on the same stays.
      config: settings.
    """
    features = data.features
    assert features is not None
    config = config or NeuralConfig()
    init_key, batch_key = jax.random.split(key)
    del key
    policies, actions = probs.shape[0], probs.shape[-1]
    sizes = (features.shape[-1], config.hidden, config.hidden, actions)
    scale = jnp.maximum(jnp.std(data.returns(gamma)), 1e-6)
    flat = {
        "x": features,
        "ahead": after(features, 1),
        "goes_on": after(data.alive, 1) & data.alive,
        "action": data.action,
        "reward": data.reward / scale,
        "train": jnp.broadcast_to(fold[:, None], data.action.shape),
    }
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), flat)
    policy_ahead = after(probs, 2).reshape(policies, -1, actions)
    one_key = jax.random.split(init_key, (folds, policies))
    params = jax.vmap(jax.vmap(lambda k: _init(k, sizes)))(one_key)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
    number = jnp.arange(folds)

    def loss(one: Any, slow: Any, f: jax.Array, policy: jax.Array, rows: Any) -> jax.Array:
        value = (policy * _apply(slow, rows["ahead"])).sum(-1) * rows["goes_on"]
        target = rows["reward"] + gamma * value
        q = jnp.take_along_axis(_apply(one, rows["x"]), rows["action"][:, None], -1)[:, 0]
        used = (rows["train"] != f) | (folds == 1)
        return (used * (q - target) ** 2).sum() / jnp.maximum(used.sum(), 1)

    def total(params: Any, slow: Any, policy: jax.Array, rows: Any) -> jax.Array:
        by_policy = jax.vmap(loss, (0, 0, None, 0, None))
        return jax.vmap(by_policy, (0, 0, 0, None, None))(params, slow, number, policy, rows).sum()

    def update(carry: Any, k: jax.Array) -> tuple[Any, None]:
        params, slow, state = carry
        index = jax.random.randint(k, (config.batch,), 0, valid_count)
        index = valid[index]
        rows = jax.tree.map(lambda leaf: leaf[index], flat)
        gradient = jax.grad(total)(params, slow, policy_ahead[:, index], rows)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        slow = optax.incremental_update(params, slow, config.target_rate)
        return (params, slow, state), None

    # Recorded transitions first, so that batches hold no padding.
    valid = jnp.argsort(~data.alive.reshape(-1), stable=True)
    valid_count = data.alive.sum()
    carry = (params, params, optimizer.init(params))
    (params, _, _), _ = jax.lax.scan(update, carry, jax.random.split(batch_key, config.steps))

    def predict(one: Any) -> jax.Array:
        return _apply(one, features) * scale

    every = jax.vmap(jax.vmap(predict))(params)  # [F, K, N, T, A]
    own = every[fold % folds, :, jnp.arange(data.num_stays)].swapaxes(0, 1)  # [K, N, T, A]
    q = jnp.take_along_axis(own, jnp.broadcast_to(data.action, own.shape[:-1])[..., None], -1)
    return Values(q[..., 0] * data.alive, (probs * own).sum(-1) * data.alive)
