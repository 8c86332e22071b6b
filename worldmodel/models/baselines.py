"""Baselines of the world model: persistence of the last value, and a linear autoregression.

For mortality: logistic regressions on the SOFA score and on the whole row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge

from worldmodel.models.windows import Sequences

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


def transition_rows(sequences: Sequences, index: np.ndarray) -> Rows:
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


def logistic(inputs: np.ndarray, label: np.ndarray, test_inputs: np.ndarray) -> np.ndarray:
    """Probability [K] by logistic regression; the base rate where only one class was seen."""
    if label.min() == label.max():
        return np.full(len(test_inputs), float(label.mean()))
    model = LogisticRegression(max_iter=500).fit(inputs, label)
    result: np.ndarray = model.predict_proba(test_inputs)[:, 1]
    return result


def spread(error: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Root mean square error of each feature [39] over its measured entries [K, 39]."""
    total = np.maximum(measured.sum(0), 1)
    result: np.ndarray = np.maximum(
        np.sqrt((np.square(error) * measured).sum(0) / total), _MIN_SIGMA
    )
    return result


def _repeated(sigma: np.ndarray, rows: Rows) -> np.ndarray:
    return np.broadcast_to(sigma, rows.target.shape)
