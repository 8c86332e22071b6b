"""Judging a world model on episodes, beside baselines fitted on their training split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models import baselines, metrics
from worldmodel.models.baselines import HostPrediction
from worldmodel.models.windows import (
    Sequences,
    every_step_index,
    last_step_index,
    to_sequences,
    transition_index,
)
from worldmodel.models.world_model import WorldModel


def evaluate_world_model(
    world_model: WorldModel, episodes: Episodes, *, split: str = "test"
) -> dict[str, Any]:
    """Metrics of a world model on one split, beside both baselines.

    The baselines are fitted on the training split of the same episodes.

    Raises:
      InputError: one of the two splits holds no transition.
    """
    scaler = world_model.scaler
    train, test = episodes.of_split("train"), episodes.of_split(split)
    train_index, index = transition_index(train), transition_index(test)
    for name, found in (("train", train_index), (split, index)):
        if not len(found):
            raise InputError(f"the {name} split has no stay of two steps; use a larger cohort")
    train_sequences, sequences = to_sequences(train, scaler), to_sequences(test, scaler)
    train_rows = baselines.transition_rows(train_sequences, train_index)
    rows = baselines.transition_rows(sequences, index)
    predictions = {
        "model": predict(world_model, sequences, index),
        "last_value": baselines.last_value(train_rows, rows),
        "linear": baselines.linear_autoregression(train_rows, rows),
    }
    outcomes = {
        name: _judge_outcome(world_model, (train, rows_of(train)), (test, rows_of(test)))
        for name, rows_of in (("last", last_step_index), ("every", every_step_index))
    }
    return {
        "split": split,
        "stays": test.num_stays,
        "transitions": len(index),
        "state": {
            name: metrics.state_metrics(prediction, rows)
            for name, prediction in predictions.items()
        },
        "features": {
            name: metrics.feature_metrics(prediction, rows)
            for name, prediction in predictions.items()
        },
        "outcome": outcomes["last"],
        "outcome_every_step": outcomes["every"],
    }


def predict(world_model: WorldModel, sequences: Sequences, index: np.ndarray) -> HostPrediction:
    """The world model's (ensemble) prediction of the transitions `index` [K, 2]."""
    outputs = _in_batches(
        lambda rows: world_model.transition(*sequences.window(rows, schema.STATE_WINDOW)), index
    )
    return HostPrediction(
        mu=outputs[0],
        sigma=np.exp(outputs[1]),
        ventilation=1 / (1 + np.exp(-outputs[2].astype(np.float64))),
    )


def predict_mortality(
    world_model: WorldModel, sequences: Sequences, index: np.ndarray
) -> np.ndarray:
    """Probability [K] of death within 90 days, asked at the rows `index` [K, 2]."""
    logit = _in_batches(
        lambda rows: (world_model.mortality_logit(*sequences.window(rows, schema.OUTCOME_WINDOW)),),
        index,
    )[0]
    return 1 / (1 + np.exp(-logit.astype(np.float64)))


def predict_members(world_model: WorldModel, sequences: Sequences, index: np.ndarray) -> Any:
    outputs = _in_batches(
        lambda rows: jax.tree.map(
            lambda leaf: jnp.swapaxes(leaf, 0, 1),
            world_model.transitions(*sequences.window(rows, schema.STATE_WINDOW)),
        ),
        index,
    )
    return tuple(np.swapaxes(output, 0, 1) for output in outputs)


def _in_batches(function: Callable[[jax.Array], Any], index: np.ndarray, *, batch: int = 4096):
    """Applies a function of index rows in equal batches; the last one is padded and cut."""
    jitted = jax.jit(function)
    count = len(index)
    batch = min(batch, count)
    outputs = []
    for start in range(0, count, batch):
        rows = index[start : start + batch]
        padded = np.concatenate([rows, np.repeat(rows[:1], batch - len(rows), axis=0)])
        outputs.append([np.asarray(leaf)[: len(rows)] for leaf in jitted(jnp.asarray(padded))])
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def _judge_outcome(
    world_model: WorldModel, train: tuple[Episodes, np.ndarray], test: tuple[Episodes, np.ndarray]
) -> dict[str, dict[str, float | None]]:
    """Mortality asked at the given rows (stay, step), beside two logistic regressions."""
    sequences = [to_sequences(part, world_model.scaler) for part, _ in (train, test)]

    def row_inputs(k: int) -> np.ndarray:
        window = sequences[k].window((train, test)[k][1], 1)
        return np.concatenate([np.asarray(window.obs[:, 0]), np.asarray(window.static)], axis=1)

    def sofa(part: Episodes, index: np.ndarray) -> np.ndarray:
        return np.asarray(part.sofa)[index[:, 0], index[:, 1], None]

    def label(part: Episodes, index: np.ndarray) -> np.ndarray:
        return np.asarray(part.died_90d)[index[:, 0]].astype(float)

    died = label(*train)
    scores = {
        "model": predict_mortality(world_model, sequences[1], test[1]),
        "last_value": baselines.logistic(sofa(*train), died, sofa(*test)),
        "linear": baselines.logistic(row_inputs(0), died, row_inputs(1)),
    }
    return {name: metrics.outcome_metrics(score, label(*test)) for name, score in scores.items()}
