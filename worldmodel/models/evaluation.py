"""Judging a world model on episodes, beside baselines fitted on their training split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import schema
from worldmodel.blocks import in_blocks
from worldmodel.episodes import Episodes
from worldmodel.models import baselines, metrics
from worldmodel.models.baselines import HostPrediction
from worldmodel.models.windows import (
    Sequences,
    every_step_index,
    last_step_index,
    require_transitions,
    to_sequences,
    transition_index,
)
from worldmodel.models.world_model import WorldModel

_BATCH = 4096  # rows per call


class _Side(NamedTuple):
    """A split as recorded and as models see it; rows are (stay, step) pairs [K, 2]."""

    episodes: Episodes
    sequences: Sequences

    def inputs(self, rows: np.ndarray) -> np.ndarray:
        """[K, 42] z-scores and statics."""
        window = self.sequences.window(rows, 1)
        return np.concatenate([np.asarray(window.obs[:, 0]), np.asarray(window.static)], axis=1)

    def sofa(self, rows: np.ndarray) -> np.ndarray:
        """[K, 1] SOFA score."""
        return np.asarray(self.episodes.sofa)[rows[:, 0], rows[:, 1], None]

    def died(self, rows: np.ndarray) -> np.ndarray:
        """[K] death within 90 days, 0 or 1."""
        return np.asarray(self.episodes.died_90d)[rows[:, 0]].astype(float)


def evaluate_world_model(
    world_model: WorldModel, episodes: Episodes, *, split: str = "test"
) -> dict[str, Any]:
    """Metrics of a world model on one split, beside both baselines.

    The baselines are fitted on the training split of the same episodes.

    Raises:
      InputError: one of the two splits holds no transition.
    """
    train, test = (
        _Side(part, to_sequences(part, world_model.scaler))
        for part in (episodes.of_split("train"), episodes.of_split(split))
    )
    train_index = require_transitions(transition_index(train.episodes), "train")
    index = require_transitions(transition_index(test.episodes), split)
    train_rows = baselines.transition_rows(train.sequences, train_index)
    rows = baselines.transition_rows(test.sequences, index)
    predictions = {
        "model": predict(world_model, test.sequences, index),
        "last_value": baselines.last_value(train_rows, rows),
        "linear": baselines.linear_autoregression(train_rows, rows),
    }
    outcomes = {
        name: _judge_outcome(world_model, train, test, rows_of)
        for name, rows_of in (("last", last_step_index), ("every", every_step_index))
    }
    return {
        "split": split,
        "stays": test.episodes.num_stays,
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
    """Every member's (mu [E, K, 39], log_sigma [E, K, 39], vent_logit [E, K])."""
    outputs = _in_batches(
        lambda rows: jax.tree.map(
            lambda leaf: jnp.swapaxes(leaf, 0, 1),
            world_model.transitions(*sequences.window(rows, schema.STATE_WINDOW)),
        ),
        index,
    )
    return tuple(np.swapaxes(output, 0, 1) for output in outputs)


def _in_batches(function: Callable[[jax.Array], Any], index: np.ndarray) -> Any:
    """Applies a function of index rows [B, 2] batch by batch."""
    jitted = jax.jit(function)
    batch = min(_BATCH, len(index))
    return in_blocks(lambda rows: jitted(jnp.asarray(index[rows])), len(index), batch)


def _judge_outcome(
    world_model: WorldModel,
    train: _Side,
    test: _Side,
    rows_of: Callable[[Episodes], np.ndarray],
) -> dict[str, dict[str, float | None]]:
    """Mortality asked at the rows `rows_of` picks, beside two logistic regressions."""
    train_rows, rows = rows_of(train.episodes), rows_of(test.episodes)
    died = train.died(train_rows)
    scores = {
        "model": predict_mortality(world_model, test.sequences, rows),
        "last_value": baselines.logistic(train.sofa(train_rows), died, test.sofa(rows)),
        "linear": baselines.logistic(train.inputs(train_rows), died, test.inputs(rows)),
    }
    return {name: metrics.outcome_metrics(score, test.died(rows)) for name, score in scores.items()}
