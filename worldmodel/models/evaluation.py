"""Evaluation of a world model beside baselines: errors, calibration, discrimination.

Baselines of the next row are the last value, which stays, and a linear autoregression; of
mortality, logistic regressions on the SOFA score and on the whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, roc_auc_score

from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.models.clinical_model import Prediction
from worldmodel.models.recurrent import (
    CompetingRisks,
    RecurrentStateModel,
    RowPrediction,
)
from worldmodel.models.recurrent_training import StayRows, to_stay_rows
from worldmodel.models.windows import (
    Sequences,
    every_step_index,
    last_step_index,
    require_transitions,
    to_sequences,
    transition_index,
)
from worldmodel.models.world_model import WorldModel
from worldmodel.resources import in_blocks

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
        result: np.ndarray = np.asarray(self.episodes.died_90d)[rows[:, 0]].astype(float)
        return result


class MortalityScores(NamedTuple):
    """Predicted mortality at M rows, by model, and who died."""

    at: np.ndarray  # [M, 2] (stay, step)
    scores: dict[str, np.ndarray]  # [M] probabilities of the model and of both baselines
    died: np.ndarray  # [M] 0 or 1


class Predicted(NamedTuple):
    """Predictions of one split, of the model and of both baselines."""

    stays: int
    at: np.ndarray  # [K, 2] (stay, step) of the transitions
    rows: Rows
    states: dict[str, HostPrediction]
    mortality: dict[str, MortalityScores]  # "last" row of each stay, and "every" row


def predict_split(world_model: WorldModel, episodes: Episodes, *, split: str = "test") -> Predicted:
    """Predictions of a split beside those of baselines fitted on the training split.

    Raises:
      InputError: one of the two splits holds no transition.
    """
    train, test = (
        _Side(part, to_sequences(part, world_model.scaler))
        for part in (episodes.of_split("train"), episodes.of_split(split))
    )
    train_index = require_transitions(transition_index(train.episodes), "train")
    index = require_transitions(transition_index(test.episodes), split)
    train_rows = transition_rows(train.sequences, train_index)
    rows = transition_rows(test.sequences, index)
    if world_model.is_recurrent:
        by_row, died = predict_stays(world_model, test.episodes)
        prediction = HostPrediction(*(leaf[index[:, 0], index[:, 1]] for leaf in by_row))
    else:
        died = None
        prediction = predict(world_model, test.sequences, index)
    predictions = {
        "model": prediction,
        "last_value": last_value(train_rows, rows),
        "linear": linear_autoregression(train_rows, rows),
    }
    mortality = {
        name: _mortality_scores(world_model, train, test, rows_of, died)
        for name, rows_of in (("last", last_step_index), ("every", every_step_index))
    }
    return Predicted(test.episodes.num_stays, index, rows, predictions, mortality)


def evaluate_world_model(
    world_model: WorldModel, episodes: Episodes, *, split: str = "test"
) -> dict[str, Any]:  # nested numbers by name, as JSON holds them
    """Metrics of a world model on one split, beside both baselines.

    The baselines are fitted on the training split of the same episodes.

    Raises:
      InputError: one of the two splits holds no transition.
    """
    found = predict_split(world_model, episodes, split=split)
    rows, predictions = found.rows, found.states
    outcomes = {
        name: {who: outcome_metrics(score, of.died) for who, score in of.scores.items()}
        for name, of in found.mortality.items()
    }
    return {
        "split": split,
        "stays": found.stays,
        "transitions": len(found.at),
        "state": {
            name: state_metrics(prediction, rows) for name, prediction in predictions.items()
        },
        "features": {
            name: feature_metrics(prediction, rows) for name, prediction in predictions.items()
        },
        "outcome": outcomes["last"],
        "outcome_every_step": outcomes["every"],
    }


def predict(
    world_model: WorldModel, sequences: Sequences, index: Int[np.ndarray, "K 2"]
) -> HostPrediction:
    """The world model's (ensemble) prediction of the transitions `index` [K, 2]."""
    outputs = _in_batches(_transition, world_model, sequences, index)
    return HostPrediction(
        mu=outputs[0],
        sigma=np.exp(outputs[1]),
        ventilation=1 / (1 + np.exp(-outputs[2].astype(np.float64))),
    )


def predict_mortality(
    world_model: WorldModel, sequences: Sequences, index: Int[np.ndarray, "K 2"]
) -> Float[np.ndarray, " K"]:
    """Probability [K] of death within 90 days, at the rows `index` [K, 2]."""
    (logit,) = _in_batches(_mortality_logit, world_model, sequences, index)
    result: np.ndarray = 1 / (1 + np.exp(-logit.astype(np.float64)))
    return result


def predict_stays(world_model: WorldModel, episodes: Episodes) -> tuple[HostPrediction, np.ndarray]:
    """Predictions of a recurrent world model in every row of N stays, with its ensemble's moments.

    Returns:
      The next rows, leaves [N, T, ...] (undefined after the end of a stay), and the mortality
      [N, T] where the clinician goes on from the row.
    """
    rows = to_stay_rows(episodes, world_model.scaler, world_model.dose_edges)
    models = world_model.stay_models()
    state_models, _ = models
    found = [
        jax.tree.map(
            np.asarray, _predict_stays(jax.tree.map(lambda leaf, i=i: leaf[i], models), rows)
        )
        for i in range(world_model.num_members)
    ]
    mu = np.stack([prediction.mu for prediction, _ in found])
    variance = np.stack([np.exp(2 * prediction.log_sigma) for prediction, _ in found])
    # The noise factor holds what calibration found about each sigma.
    factor = np.asarray(state_models.noise_factor[...])  # [E, 39, 39]
    variance = variance * np.square(factor).sum(-1)[:, None, None]
    ventilation = np.mean([1 / (1 + np.exp(-p.vent_logit)) for p, _ in found], axis=0)
    prediction = HostPrediction(
        mu=mu.mean(0), sigma=np.sqrt(variance.mean(0) + mu.var(0)), ventilation=ventilation
    )
    return prediction, np.mean([died for _, died in found], axis=0)


@jax.jit
def _predict_stays(
    member: tuple[RecurrentStateModel, CompetingRisks], rows: StayRows
) -> tuple[RowPrediction, jax.Array]:
    state_model, risks = member
    found = state_model.read(rows.inputs, rows.obs, rows.action)
    later = risks.continuation(found.hidden, rows.inputs)
    return found.prediction, jax.nn.sigmoid(later.mortality_logit)


def predict_members(
    world_model: WorldModel, sequences: Sequences, index: Int[np.ndarray, "K 2"]
) -> tuple[Float[np.ndarray, "E K 39"], Float[np.ndarray, "E K 39"], Float[np.ndarray, "E K"]]:
    """Every member's (mu [E, K, 39], log_sigma [E, K, 39], vent_logit [E, K])."""
    outputs = _in_batches(_transitions, world_model, sequences, index)
    mu, log_sigma, vent_logit = (np.swapaxes(output, 0, 1) for output in outputs)
    return mu, log_sigma, vent_logit


@jax.jit
def _transition(world_model: WorldModel, sequences: Sequences, rows: jax.Array) -> Prediction:
    return world_model.transition(*sequences.window(rows, schema.STATE_WINDOW))


@jax.jit
def _transitions(world_model: WorldModel, sequences: Sequences, rows: jax.Array) -> Prediction:
    found = world_model.transitions(*sequences.window(rows, schema.STATE_WINDOW))
    result: Prediction = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), found)
    return result


@jax.jit
def _mortality_logit(
    world_model: WorldModel, sequences: Sequences, rows: jax.Array
) -> tuple[jax.Array]:
    return (world_model.mortality_logit(*sequences.window(rows, schema.OUTCOME_WINDOW)),)


def _in_batches(
    function: Callable[[WorldModel, Sequences, jax.Array], tuple[jax.Array, ...]],
    world_model: WorldModel,
    sequences: Sequences,
    index: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Applies a jitted function of index rows [B, 2] batch by batch."""
    batch = min(_BATCH, len(index))
    result: tuple[np.ndarray, ...] = in_blocks(
        lambda rows: function(world_model, sequences, jnp.asarray(index[rows])), len(index), batch
    )
    return result


def _mortality_scores(
    world_model: WorldModel,
    train: _Side,
    test: _Side,
    rows_of: Callable[[Episodes], np.ndarray],
    by_row: np.ndarray | None,
) -> MortalityScores:
    """Mortality at the rows that `rows_of` picks, beside two logistic regressions.

    `by_row` [N, T] is the model's mortality where it is known already.
    """
    train_rows, rows = rows_of(train.episodes), rows_of(test.episodes)
    if by_row is None:
        predicted = predict_mortality(world_model, test.sequences, rows)
    else:
        predicted = by_row[rows[:, 0], rows[:, 1]]
    died = train.died(train_rows)
    scores = {
        "model": predicted,
        "last_value": logistic(train.sofa(train_rows), died, test.sofa(rows)),
        "linear": logistic(train.inputs(train_rows), died, test.inputs(rows)),
    }
    return MortalityScores(rows, scores, test.died(rows))


def gaussian_crps(
    target: Float[np.ndarray, "*#b"], mu: Float[np.ndarray, "*#b"], sigma: Float[np.ndarray, "*#b"]
) -> Float[np.ndarray, "*#b"]:
    """Continuous ranked probability score of a normal (Gneiting & Raftery 2007, eq. 21)."""
    z = (target - mu) / sigma
    result: np.ndarray = sigma * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    return result


def state_metrics(
    prediction: HostPrediction, rows: Rows, *, level: float = 0.9
) -> dict[str, float | None]:
    """One model's figures over all features.

    Args:
      prediction: of the next rows.
      rows: what was recorded.
      level: nominal coverage of the central interval.

    Returns:
      mae, mae_all, nll, crps, coverage and ventilation_auc (None where one class is absent).
    """
    use = rows.measured
    error = rows.target - prediction.mu
    z = error / prediction.sigma
    nll = 0.5 * np.square(z) + np.log(prediction.sigma) + 0.5 * np.log(2 * np.pi)
    crps = gaussian_crps(rows.target, prediction.mu, prediction.sigma)
    return {
        "mae": float(np.abs(error)[use].mean()),
        "mae_all": float(np.abs(error).mean()),
        "nll": float(nll[use].mean()),
        "crps": float(crps[use].mean()),
        "coverage": float((np.abs(z) <= norm.ppf(0.5 + level / 2))[use].mean()),
        "ventilation_auc": _auc(rows.ventilated, prediction.ventilation),
    }


def feature_metrics(prediction: HostPrediction, rows: Rows) -> dict[str, dict[str, float]]:
    """MAE (z-space) and 90% coverage per feature, over measured entries; absent ones left out."""
    error = np.abs(rows.target - prediction.mu)
    inside = error <= norm.ppf(0.95) * prediction.sigma
    out = {}
    for j, name in enumerate(schema.FEATURE_NAMES):
        use = rows.measured[:, j]
        if use.any():
            out[name] = {
                "mae": float(error[use, j].mean()),
                "coverage": float(inside[use, j].mean()),
                "measured": int(use.sum()),
            }
    return out


def outcome_metrics(
    probability: Float[np.ndarray, " K"], died: Shaped[np.ndarray, " K"]
) -> dict[str, float | None]:
    """Discrimination and calibration of predicted mortality.

    Returns:
      auroc, auprc (None where one class is absent), brier, ece (ten equal-width bins).
    """
    both = died.min() != died.max()
    return {
        "auroc": _auc(died, probability),
        "auprc": float(average_precision_score(died, probability)) if both else None,
        "brier": float(np.square(probability - died).mean()),
        "ece": expected_calibration_error(probability, died),
        "prevalence": float(died.mean()),
    }


def expected_calibration_error(
    probability: Float[np.ndarray, " K"], label: Shaped[np.ndarray, " K"], *, bins: int = 10
) -> float:
    """Mean gap between predicted and observed frequency over equal-width bins."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    gap = np.bincount(which, probability - label, minlength=bins)
    return float(np.abs(gap).sum() / count.sum())


def _auc(label: np.ndarray, score: np.ndarray) -> float | None:
    return float(roc_auc_score(label, score)) if label.min() != label.max() else None


_MIN_SIGMA = 1e-3


class Rows(NamedTuple):
    """Transitions on the host, in z-space."""

    last: np.ndarray  # [K, 39] row t
    inputs: np.ndarray  # [K, 90] row t: obs, measured, static, action
    ventilated_now: np.ndarray  # [K] bool
    target: np.ndarray  # [K, 39] row t + 1
    measured: np.ndarray  # [K, 39] bool
    ventilated: np.ndarray  # [K] bool


class HostPrediction(NamedTuple):
    """A Gaussian prediction of the next row and a ventilation score, on the host."""

    mu: np.ndarray  # [K, 39]
    sigma: np.ndarray  # [K, 39]
    ventilation: np.ndarray  # [K] score; higher means more likely ventilated


def transition_rows(sequences: Sequences, index: Int[np.ndarray, "K 2"]) -> Rows:
    """Last rows and targets of the transitions `index` [K, 2] (stay, step)."""
    window = sequences.window(index, 1)
    target = sequences.target(index)
    blocks = (window.obs[:, 0], window.observed[:, 0], window.static, window.action[:, 0])
    return Rows(
        last=np.asarray(blocks[0]),
        inputs=np.concatenate([np.asarray(block) for block in blocks], axis=1),
        ventilated_now=np.asarray(
            sequences.ventilated[index[:, 0], sequences.padding + index[:, 1]]
        ),
        target=np.asarray(target.obs),
        measured=np.asarray(target.measured),
        ventilated=np.asarray(target.ventilated),
    )


def last_value(train: Rows, test: Rows) -> HostPrediction:
    """The last value stays; spread from the training split's measured changes."""
    return HostPrediction(
        mu=test.last,
        sigma=_repeated(spread(train.target - train.last, train.measured), test),
        ventilation=test.ventilated_now.astype(np.float64),
    )


def linear_autoregression(train: Rows, test: Rows) -> HostPrediction:
    """Ridge regression of each feature's measured values on the last row."""
    features = train.target.shape[1]
    mu = np.empty_like(test.last)
    residual = np.zeros_like(train.target)
    for j in range(features):
        use = train.measured[:, j]
        if use.sum() <= train.inputs.shape[1]:
            mu[:, j], residual[:, j] = test.last[:, j], train.target[:, j] - train.last[:, j]
            continue
        model = Ridge(alpha=1.0).fit(train.inputs[use], train.target[use, j])
        mu[:, j] = model.predict(test.inputs)
        residual[use, j] = train.target[use, j] - model.predict(train.inputs[use])
    return HostPrediction(
        mu=mu,
        sigma=_repeated(spread(residual, train.measured), test),
        ventilation=logistic(train.inputs, train.ventilated, test.inputs),
    )


def logistic(
    inputs: Float[np.ndarray, "M D"],
    label: Shaped[np.ndarray, " M"],
    test_inputs: Float[np.ndarray, "K D"],
) -> Float[np.ndarray, " K"]:
    """Probability [K] by logistic regression; the base rate where only one class was seen."""
    if label.min() == label.max():
        return np.full(len(test_inputs), float(label.mean()))
    model = LogisticRegression(max_iter=500).fit(inputs, label)
    result: np.ndarray = model.predict_proba(test_inputs)[:, 1]
    return result


def spread(
    error: Float[np.ndarray, "K F"], measured: Bool[np.ndarray, "K F"]
) -> Float[np.ndarray, " F"]:
    """Root mean square error of each feature [39] over its measured entries [K, 39]."""
    total = np.maximum(measured.sum(0), 1)
    result: np.ndarray = np.maximum(
        np.sqrt((np.square(error) * measured).sum(0) / total), _MIN_SIGMA
    )
    return result


def _repeated(sigma: np.ndarray, rows: Rows) -> np.ndarray:
    return np.broadcast_to(sigma, rows.target.shape)
