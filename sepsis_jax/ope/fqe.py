"""Fitted Q evaluation: features, linear and tabular regression, and networks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import Values
from worldmodel import observation, schema
from worldmodel.episodes import Episodes
from worldmodel.observation import observations
from worldmodel.scaling import Scaler

Network = list[dict[str, jax.Array]]  # layers


def state_features(episodes: Episodes, scaler: Scaler | None = None) -> Float[Array, "N T 49"]:
    """[N, T, 49] `worldmodel.observation.state_features` of every recorded row; 0 after the end.

    Args:
      episodes: the stays.
      scaler: fitted on `episodes` when not given.
    """
    scaler = scaler or Scaler.fit(episodes, split=None)
    return jnp.where(
        episodes.valid[..., None], observation.state_features(observations(episodes), scaler), 0
    )


_KEY_COLUMNS = (
    0,
    *(1 + schema.INDEX[name] for name in ("meanbp", "lactate", "creatinine", "output_4hourly")),
    *range(1 + schema.NUM_FEATURES, 1 + schema.NUM_FEATURES + schema.NUM_STATIC + 6),
)


def key_features(episodes: Episodes, scaler: Scaler | None = None) -> Float[Array, "N T 14"]:
    """[N, T, 14] the few of `state_features` that matter most, for small samples."""
    return state_features(episodes, scaler)[..., np.array(_KEY_COLUMNS)]


def dose_basis() -> Float[np.ndarray, "25 6"]:
    """[25, 6] for linear values: 1, v, f, v^2, f^2, v f with levels scaled to [0, 1]."""
    v, f = (level / (schema.NUM_LEVELS - 1) for level in schema.action_levels(np.arange(25)))
    return np.stack([np.ones(25), v, f, v**2, f**2, v * f], -1).astype(np.float32)


def action_basis(actions: int) -> Float[np.ndarray, "A J"]:
    """The dose basis for 25 actions, otherwise one indicator per action."""
    if actions == schema.NUM_ACTIONS:
        return dose_basis()
    return np.eye(actions, dtype=np.float32)


def fold_of(key: jax.Array, stays: int, folds: int) -> Int[Array, " N"]:
    """[N] int32 folds of equal size up to one."""
    return jax.random.permutation(key, jnp.arange(stays) % folds)


def after(values: jax.Array, axis: int) -> jax.Array:
    """The next step's values along an axis, 0 beyond the last."""
    values = jnp.moveaxis(values, axis, 0)
    return jnp.moveaxis(jnp.concatenate([values[1:], jnp.zeros_like(values[:1])]), 0, axis)


def expand(
    features: Float[Array, "*#b D"], action: Float[Array, "*#b J"]
) -> Float[Array, "*#b DJ"]:
    """Products of state features [..., D] and action features [..., J]: [..., D * J]."""
    return (features[..., :, None] * action[..., None, :]).reshape(*features.shape[:-1], -1)


@partial(jax.jit, static_argnames=("gamma", "folds", "iterations"))
def linear(
    data: OPEData,
    probs: Float[Array, "K N T A"],
    basis: Float[Array, "A J"],
    fold: Int[Array, " N"],
    *,
    gamma: float,
    folds: int,
    ridge: float = 1e-3,
    iterations: int | None = None,
) -> Values:
    """Linear values of K policies, Q(s, a) = x(s)' Theta u(a).

    The Gram matrix is shared by all policies; one iteration is a matrix times a vector.

    Args:
      data: with features [N, T, D].
      probs: [K, N, T, A].
      basis: [A, J] action features u.
      fold: [N] int32.
      gamma: discount.
      folds: number of folds F; 1 fits and predicts on the same stays.
      ridge: penalty, as a share of the mean of the Gram matrix' diagonal.
      iterations: of the regression; default T.
    """
    assert data.features is not None
    stays, steps = data.reward.shape
    alive = data.alive.astype(jnp.float32)
    taken = basis[data.action]
    phi = (expand(data.features, taken) * alive[..., None]).reshape(stays * steps, -1)
    size = phi.shape[1]
    next_features = after(data.features, 1)

    train = jnp.stack([(fold != f) | (folds == 1) for f in range(folds)]).astype(jnp.float32)
    rows = jnp.repeat(train, steps, 1)  # [F, N * T]
    gram = jnp.stack([phi.T @ (phi * row[:, None]) for row in rows])
    penalty = ridge * jnp.trace(gram, axis1=1, axis2=2) / size + 1e-6
    gram += penalty[:, None, None] * jnp.eye(size)
    factor = jnp.linalg.cholesky(gram)
    target = jnp.einsum("np,fn->fp", phi, rows * data.reward.reshape(-1))

    def solve(vector: jax.Array) -> jax.Array:
        return jax.vmap(lambda c, v: jax.scipy.linalg.cho_solve((c, True), v))(factor, vector)

    def of_policy(policy: jax.Array) -> Values:
        mean_action = policy @ basis  # [N, T, J]
        ahead = expand(next_features, after(mean_action, 1)).reshape(stays * steps, -1)
        cross = jnp.stack([(phi * row[:, None]).T @ ahead for row in rows])

        def once(theta: jax.Array, _: None) -> tuple[jax.Array, None]:
            return solve(target + gamma * jnp.einsum("fpq,fq->fp", cross, theta)), None

        start = jnp.zeros_like(target)
        theta, _ = jax.lax.scan(once, start, None, length=iterations or steps)
        own = theta[fold % folds].reshape(stays, -1, basis.shape[1])
        state = jnp.einsum("ntd,ndj->ntj", data.features, own)
        return Values(
            q=(state * taken).sum(-1) * alive,
            v=(state * mean_action).sum(-1) * alive,
        )

    found: Values = jax.lax.map(of_policy, probs)
    return found


@partial(jax.jit, static_argnames=("num_states", "gamma", "folds", "iterations"))
def tabular(
    data: OPEData,
    state: Int[Array, "N T"],
    probs: Float[Array, "K N T A"],
    fold: Int[Array, " N"],
    *,
    num_states: int,
    gamma: float,
    folds: int,
    prior: float = 1.0,
    iterations: int | None = None,
) -> Values:
    """Values by state and action from counts.

    A pair seen n times is worth the mean of its targets, shrunk towards the value of its state by
    `prior` pseudo-observations, so that unseen pairs get the state's value.

    Args:
      data: recorded stays.
      state: [N, T] int32.
      probs: [K, N, T, A].
      fold: [N] int32.
      num_states: S.
      gamma: discount.
      folds: F; 1 fits and predicts on the same stays.
      prior: pseudo-observations per pair.
      iterations: default T.
    """
    actions, steps = probs.shape[-1], data.num_steps
    pair = state * actions + data.action
    train = jnp.stack([(fold != f) | (folds == 1) for f in range(folds)])

    def sums(values: jax.Array, index: jax.Array, size: int) -> jax.Array:
        return jax.ops.segment_sum(values.reshape(-1), index.reshape(-1), size)

    def of_policy(policy: jax.Array) -> Values:
        def of_fold(used: jax.Array) -> tuple[jax.Array, jax.Array]:
            weight = (used[:, None] & data.alive).astype(jnp.float32)
            count = sums(weight, pair, num_states * actions)
            visits = sums(weight, state, num_states)

            def once(table: jax.Array, _: None) -> tuple[jax.Array, None]:
                value = (policy * table[state]).sum(-1) * data.alive
                target = weight * (data.reward + gamma * after(value, 1))
                overall = target.sum() / weight.sum()
                total = sums(target, state, num_states)
                base = jnp.where(visits > 0, total / jnp.maximum(visits, 1), overall)
                shrunk = sums(target, pair, num_states * actions).reshape(num_states, actions)
                seen = count.reshape(num_states, actions)
                return (shrunk + prior * base[:, None]) / (seen + prior), None

            start = jnp.zeros((num_states, actions))
            table, _ = jax.lax.scan(once, start, None, length=iterations or steps)
            rows = table[state]
            q = jnp.take_along_axis(rows, data.action[..., None], -1)[..., 0]
            return q * data.alive, (policy * rows).sum(-1) * data.alive

        q, v = jax.lax.map(of_fold, train)
        stays = jnp.arange(data.num_stays)
        return Values(q[fold % folds, stays], v[fold % folds, stays])

    found: Values = jax.lax.map(of_policy, probs)
    return found


def clinician_value(values: Values, k: int) -> float:
    """Mean fitted value at the first step of the k-th policy."""
    return float(np.asarray(values.v[k, :, 0]).mean())


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


def _init(key: jax.Array, sizes: tuple[int, ...]) -> Network:
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "w": jax.random.normal(k, (m, n)) * jnp.sqrt(2.0 / m),
            "b": jnp.zeros(n),
        }
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def _apply(params: Network, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


@partial(jax.jit, static_argnames=("gamma", "folds", "config"))
def fit_neural(
    key: jax.Array,
    data: OPEData,
    probs: Float[Array, "K N T A"],
    fold: Int[Array, " N"],
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

    def loss(
        one: Network, slow: Network, f: jax.Array, policy: jax.Array, rows: dict[str, jax.Array]
    ) -> jax.Array:
        value = (policy * _apply(slow, rows["ahead"])).sum(-1) * rows["goes_on"]
        target = rows["reward"] + gamma * value
        q = jnp.take_along_axis(_apply(one, rows["x"]), rows["action"][:, None], -1)[:, 0]
        used = (rows["train"] != f) | (folds == 1)
        mean: jax.Array = (used * (q - target) ** 2).sum() / jnp.maximum(used.sum(), 1)
        return mean

    def total(
        params: Network, slow: Network, policy: jax.Array, rows: dict[str, jax.Array]
    ) -> jax.Array:
        by_policy = jax.vmap(loss, (0, 0, None, 0, None))
        return jax.vmap(by_policy, (0, 0, 0, None, None))(params, slow, number, policy, rows).sum()

    def update(
        carry: tuple[Network, Network, optax.OptState], k: jax.Array
    ) -> tuple[tuple[Network, Network, optax.OptState], None]:
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

    def predict(one: Network) -> jax.Array:
        return _apply(one, features) * scale

    every = jax.vmap(jax.vmap(predict))(params)  # [F, K, N, T, A]
    own = every[fold % folds, :, jnp.arange(data.num_stays)].swapaxes(0, 1)  # [K, N, T, A]
    q = jnp.take_along_axis(own, jnp.broadcast_to(data.action, own.shape[:-1])[..., None], -1)
    return Values(q[..., 0] * data.alive, (probs * own).sum(-1) * data.alive)
