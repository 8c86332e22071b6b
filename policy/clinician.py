"""Behaviour cloning: policies that treat as the records do, with calibrated probabilities.

Importance weights are only as good as the clinician's probabilities, so several models are fitted
on the training split and compared on held-out likelihood and calibration (Raghu et al. 2018; Luo
et al. 2024). The state of training that is likeliest on the validation split is kept, and a
temperature and a lapse rate fitted there calibrate it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from policy.clinician_models import (
    GRU,
    MLP,
    ClonedClinician,
    Clusters,
    Logistic,
    fit_calibration,
    judge,
)
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.observation import observation_at
from worldmodel.scaling import Scaler

_NETWORKS: dict[str, type[Logistic] | type[MLP] | type[GRU]] = {
    "logistic": Logistic,
    "mlp": MLP,
    "gru": GRU,
}
MODELS = (*_NETWORKS, "clusters", "marginal")
_ROWS_PER_CLUSTER = 50


@dataclass(frozen=True)
class BehaviorConfig:
    """Settings.

    Attributes:
      hidden: width of the MLP's and the GRU's layer.
      epochs: passes over the training rows; the best by validation likelihood is kept.
      updates: least number of updates, for small cohorts.
      batch: rows per update.
      learning_rate: of AdamW, at the start of a cosine decay.
      weight_decay: of AdamW, on all but the last layer.
      clusters: number of clusters; fewer where a cluster would hold less than 50 rows on average.
      smoothing: pseudo-rows per cluster, spread as the actions are overall.
    """

    hidden: int = 64
    epochs: int = 20
    updates: int = 1500
    batch: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.5
    clusters: int = 200
    smoothing: float = 5.0


@dataclass(frozen=True)
class BehaviorFit:
    """A cloned clinician, its probabilities, and how it does on stays it has not seen.

    Attributes:
      name: of the model.
      policy: calibrated; acts in any world.
      probs: [N, T, 25] on all stays; uniform on padding.
      report: `policy.clinician_models.judge` on the held-out split, with `temperature` and
        `lapse`.
      reliability: bins of the held-out split with predicted and observed frequency.
      uncalibrated_report, uncalibrated_reliability: the same before calibration.
    """

    name: str
    policy: ClonedClinician
    probs: np.ndarray
    report: dict[str, float]
    reliability: pd.DataFrame
    uncalibrated_report: dict[str, float]
    uncalibrated_reliability: pd.DataFrame


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
    rows = {name: _rows_of(episodes, name) for name in ("train", "validation", held_out)}
    empty = [name for name, (stay, _) in rows.items() if not len(stay)]
    if empty:
        raise InputError(f"split {empty[0]!r} has no stays; behaviour models need all three")
    episodes = jax.tree.map(jnp.asarray, episodes)
    scaler = Scaler.fit(episodes, split="train")
    action = np.asarray(episodes.action)
    reported = np.zeros(action.shape, bool)
    reported[rows[held_out]] = True
    fits = []
    for number, name in enumerate(models):
        model_key = jax.random.fold_in(key, number)
        policy = _fit(model_key, name, episodes, rows, scaler, config)
        raw = policy.action_probs(episodes)
        seen = rows["validation"]
        log_probs = np.log(np.maximum(raw[seen], 1e-30))
        calibration = fit_calibration(jnp.asarray(log_probs), jnp.asarray(action[seen]))
        policy = replace(policy, calibration=calibration)
        probs = policy.action_probs(episodes)
        report, reliability = judge(probs, action, reported)
        report.update({name: float(x) for name, x in calibration._asdict().items()})
        before = judge(raw, action, reported)
        fits.append(BehaviorFit(name, policy, probs, report, reliability, *before))
    return sorted(fits, key=lambda fitted: fitted.report["nll"])


def _rows_of(episodes: Episodes, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Stay and step of every recorded row of a split."""
    chosen = np.asarray(episodes.split) == schema.SPLITS.index(split)
    stay, step = np.nonzero(np.asarray(episodes.valid) & chosen[:, None])
    return stay, step


def _fit(
    key: jax.Array,
    name: str,
    episodes: Episodes,
    rows: dict[str, tuple[np.ndarray, np.ndarray]],
    scaler: Scaler,
    config: BehaviorConfig,
) -> ClonedClinician:
    if name in _NETWORKS:
        start_key, train_key = jax.random.split(key)
        start = _NETWORKS[name].initial(start_key, scaler, config.hidden)
        result: ClonedClinician = _train(
            train_key, start, episodes, rows["train"], rows["validation"], config=config
        )
        return result
    most = max(len(rows["train"][0]) // _ROWS_PER_CLUSTER, 1)
    clusters = 1 if name == "marginal" else min(config.clusters, most)
    return Clusters.fit(key, episodes, rows["train"], scaler, clusters, config.smoothing)


Params = dict[str, jax.Array]
Learner = tuple[Params, optax.OptState]


@partial(jax.jit, static_argnames="config")
def _train(
    key: jax.Array,
    policy: Any,  # flax adds `replace` to policies' classes, which type checkers do not see
    episodes: Episodes,
    train: tuple[jax.Array, jax.Array],
    validation: tuple[jax.Array, jax.Array],
    *,
    config: BehaviorConfig,
) -> Any:
    """The policy with the parameters that were likeliest on the validation rows."""
    count = train[0].shape[0]
    batch = min(config.batch, count)
    updates = max(count // batch, 1)
    epochs = max(config.epochs, -(-config.updates // updates))
    schedule = optax.cosine_decay_schedule(config.learning_rate, updates * epochs)
    # The head stays free: decayed, it could not follow habits as sharp as they are.
    decayed = {name: name not in ("out", "bias") for name in policy.params}
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay, mask=decayed)

    def loss(params: Params, stay: jax.Array, step: jax.Array) -> jax.Array:
        observation = observation_at(episodes, stay, step, past=policy.past)
        logits = jax.vmap(policy.replace(params=params).logits)(observation)
        action = episodes.action[stay, step]
        result: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, action).mean()
        return result

    def update(carry: Learner, rows: jax.Array) -> tuple[Learner, None]:
        params, state = carry
        gradient = jax.grad(loss)(params, train[0][rows], train[1][rows])
        change, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, change), state), None

    def epoch(carry: Any, k: jax.Array) -> tuple[Any, None]:
        current, best, least = carry
        order = jax.random.permutation(k, count)[: updates * batch].reshape(updates, batch)
        current, _ = jax.lax.scan(update, current, order)
        found = loss(current[0], *validation)
        better = found < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), current[0], best)
        return (current, best, jnp.minimum(found, least)), None

    params = policy.params
    start = ((params, optimizer.init(params)), params, jnp.inf)
    (_, best, _), _ = jax.lax.scan(epoch, start, jax.random.split(key, epochs))
    return policy.replace(params=best)
