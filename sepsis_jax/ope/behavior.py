"""The clinician's action probabilities, where records do not hold them, and how good they are.

Importance weights are only as good as these, so several models are fitted on the training split
and compared on held-out likelihood and calibration (Raghu et al. 2018; Luo et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from sklearn.neighbors import NearestNeighbors

from sepsis_jax.ope.features import state_features
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.gru import gates
from worldmodel.scaling import Scaler

MODELS = ("logistic", "mlp", "gru", "knn", "marginal")
_BINS = 10


@dataclass(frozen=True)
class BehaviorConfig:
    """Settings.

    Attributes:
      hidden: width of the MLP's and the GRU's layer.
      epochs: passes over the training stays; the best by validation likelihood is kept.
      updates: least number of updates, for small cohorts.
      batch: stays per update.
      learning_rate: of Adam.
      weight_decay: of AdamW.
      neighbors: of the kNN model.
      smoothing: pseudo-neighbours, spread as the actions are overall, for the kNN model.
    """

    hidden: int = 64
    epochs: int = 40
    updates: int = 1500
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    neighbors: int = 100
    smoothing: float = 5.0


@dataclass(frozen=True)
class BehaviorFit:
    """Probabilities of one model, and how it does on stays it has not seen.

    Attributes:
      name: of the model.
      probs: [N, T, 25] on all stays.
      report: negative log-likelihood, top-1 accuracy, expected calibration error by split.
      reliability: bins of the held-out split with predicted and observed frequency.
    """

    name: str
    probs: np.ndarray
    report: dict[str, float]
    reliability: pd.DataFrame


def fit_behavior(
    key: jax.Array,
    episodes: Episodes,
    *,
    models: Sequence[str] = ("logistic", "mlp", "gru"),
    config: BehaviorConfig | None = None,
    held_out: str = "test",
) -> list[BehaviorFit]:
    """Fits models on the training split; best held-out likelihood first.

    Args:
      key: of parameters and batches; consumed.
      episodes: with stays in the training, validation and held-out splits.
      models: names of `MODELS`.
      config: settings.
      held_out: split of the report.

    Raises:
      InputError: an unknown model, or a split without stays.
    """
    config = config or BehaviorConfig()
    unknown = [name for name in models if name not in MODELS]
    if unknown or not models:
        raise InputError(f"behaviour model {unknown}: expected some of {', '.join(MODELS)}")
    splits = {name: np.asarray(episodes.split) == schema.SPLITS.index(name)
              for name in ("train", "validation", held_out)}  # fmt: skip
    empty = [name for name, mask in splits.items() if not mask.any()]
    if empty:
        raise InputError(f"split {empty[0]!r} has no stays; behaviour models need all three")
    scaler = Scaler.fit(episodes, split="train")
    features = np.asarray(state_features(episodes, scaler))
    action, alive = np.asarray(episodes.action), np.asarray(episodes.valid)
    fits = []
    for number, name in enumerate(models):
        if name in ("knn", "marginal"):
            probs = _counting(name, features, action, alive, splits["train"], config)
        else:
            probs = _network(
                jax.random.fold_in(key, number), name, features, action, alive,
                splits["train"], splits["validation"], config,
            )  # fmt: skip
        report, reliability = judge(probs, action, alive & splits[held_out][:, None])
        fits.append(BehaviorFit(name, probs, report, reliability))
    return sorted(fits, key=lambda fitted: fitted.report["nll"])


def judge(
    probs: np.ndarray, action: np.ndarray, used: np.ndarray
) -> tuple[dict[str, float], pd.DataFrame]:
    """Likelihood, accuracy and calibration of [N, T, A] probabilities on the steps `used` [N, T].

    The expected calibration error bins the probability of every action, not of the likeliest
    alone, since any of them may become the denominator of a weight.
    """
    rows, taken = np.asarray(probs)[used], np.asarray(action)[used]
    chosen = rows[np.arange(len(taken)), taken]
    hit = np.zeros_like(rows)
    hit[np.arange(len(taken)), taken] = 1.0
    edges = np.quantile(rows, np.linspace(0, 1, _BINS + 1)[1:-1])
    place = np.searchsorted(edges, rows.reshape(-1))
    table = (
        pd.DataFrame({"bin": place, "predicted": rows.reshape(-1), "observed": hit.reshape(-1)})
        .groupby("bin")
        .agg(predicted=("predicted", "mean"), observed=("observed", "mean"),
             count=("observed", "size"))
        .reset_index(drop=True)
    )  # fmt: skip
    gap = (table["predicted"] - table["observed"]).abs()
    report = {
        "nll": float(-np.log(np.maximum(chosen, 1e-12)).mean()),
        "top1": float((rows.argmax(-1) == taken).mean()),
        "ece": float((gap * table["count"]).sum() / table["count"].sum()),
        "least_taken": float(chosen.min()),
        "steps": len(taken),
    }
    return report, table


def _counting(
    name: str,
    features: np.ndarray,
    action: np.ndarray,
    alive: np.ndarray,
    train: np.ndarray,
    config: BehaviorConfig,
) -> np.ndarray:
    used = alive & train[:, None]
    base = np.bincount(action[used], minlength=schema.NUM_ACTIONS) + 1.0
    base = base / base.sum()
    probs = np.broadcast_to(base, (*action.shape, schema.NUM_ACTIONS)).astype(np.float32)
    if name == "marginal":
        return probs
    known, rows = action[used], features[alive]
    index = NearestNeighbors(n_neighbors=min(config.neighbors, len(known))).fit(features[used])
    near = index.kneighbors(rows, return_distance=False)
    # A training step is its own nearest neighbour and must not vote on itself.
    own = np.flatnonzero(used[alive])
    number = np.full(len(rows), -1)
    number[own] = np.arange(len(known))
    votes = (near != number[:, None]).astype(np.float32)
    counts = np.zeros((len(rows), schema.NUM_ACTIONS), np.float32)
    np.add.at(counts, (np.arange(len(rows))[:, None], known[near]), votes)
    counts += config.smoothing * base.astype(np.float32)
    probs = probs.copy()
    probs[alive] = counts / counts.sum(-1, keepdims=True)
    return probs


def _initial(key: jax.Array, name: str, width: int, hidden: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 3)
    out = schema.NUM_ACTIONS

    def matrix(k: jax.Array, rows: int, columns: int) -> jax.Array:
        return jax.random.normal(k, (rows, columns)) / jnp.sqrt(rows)

    if name == "logistic":
        return {"out": 0.1 * matrix(keys[0], width, out), "bias": jnp.zeros(out)}
    last = {"out": matrix(keys[2], hidden, out), "bias": jnp.zeros(out)}
    if name == "mlp":
        return {"in": matrix(keys[0], width, hidden), "in_bias": jnp.zeros(hidden), **last}
    return {
        "in": matrix(keys[0], width, 3 * hidden),
        "in_bias": jnp.zeros(3 * hidden),
        "hidden": matrix(keys[1], hidden, 3 * hidden),
        "hidden_bias": jnp.zeros(3 * hidden),
        **last,
    }


def _logits(params: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """[N, T, 25] from [N, T, D]; the model is told by its parameters."""
    rows = features
    if "hidden" in params:
        projected = features @ params["in"] + params["in_bias"]

        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = gates(x, h @ params["hidden"] + params["hidden_bias"], h)
            return h, h

        start = jnp.zeros((features.shape[0], params["out"].shape[0]))
        _, states = jax.lax.scan(step, start, projected.swapaxes(0, 1))
        rows = states.swapaxes(0, 1)
    elif "in" in params:
        rows = jax.nn.relu(features @ params["in"] + params["in_bias"])
    return rows @ params["out"] + params["bias"]


def _loss(params: dict[str, jax.Array], x: jax.Array, action: jax.Array, used: jax.Array) -> Any:
    log_probs = jax.nn.log_softmax(_logits(params, x))
    taken = jnp.take_along_axis(log_probs, action[..., None], -1)[..., 0]
    return -(taken * used).sum() / jnp.maximum(used.sum(), 1)


@partial(jax.jit, static_argnames=("name", "config"))
def _train(
    key: jax.Array,
    features: jax.Array,
    action: jax.Array,
    alive: jax.Array,
    train: jax.Array,
    validation: jax.Array,
    *,
    name: str,
    config: BehaviorConfig,
) -> dict[str, jax.Array]:
    init_key, batch_key = jax.random.split(key)
    params = _initial(init_key, name, features.shape[-1], config.hidden)
    batch = min(config.batch, train.shape[0])
    updates = max(train.shape[0] // batch, 1)
    epochs = max(config.epochs, -(-config.updates // updates))
    schedule = optax.cosine_decay_schedule(config.learning_rate, updates * epochs)
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)

    def update(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state = carry
        gradient = jax.grad(_loss)(params, features[rows], action[rows], alive[rows])
        change, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, change), state), None

    def epoch(carry: Any, k: jax.Array) -> tuple[Any, None]:
        current, best, best_loss = carry
        order = jax.random.permutation(k, train)[: updates * batch].reshape(updates, batch)
        current, _ = jax.lax.scan(update, current, order)
        params = current[0]
        loss = _loss(params, features[validation], action[validation], alive[validation])
        better = loss < best_loss
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best)
        return (current, best, jnp.minimum(loss, best_loss)), None

    start = ((params, optimizer.init(params)), params, jnp.inf)
    (_, best, _), _ = jax.lax.scan(epoch, start, jax.random.split(batch_key, epochs))
    return best


def _network(
    key: jax.Array,
    name: str,
    features: np.ndarray,
    action: np.ndarray,
    alive: np.ndarray,
    train: np.ndarray,
    validation: np.ndarray,
    config: BehaviorConfig,
) -> np.ndarray:
    params = _train(
        key, jnp.asarray(features), jnp.asarray(action), jnp.asarray(alive),
        jnp.asarray(np.flatnonzero(train)), jnp.asarray(np.flatnonzero(validation)),
        name=name, config=config,
    )  # fmt: skip
    return np.asarray(jax.nn.softmax(jax.jit(_logits)(params, jnp.asarray(features))))
