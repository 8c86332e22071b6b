"""Table (a): what a world model predicts, with intervals over stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Num, Shaped
from sklearn.metrics import average_precision_score, roc_auc_score

from sepsis_jax.ope.intervals import delta, ends, mean_of, percentile, share_of, wilson
from sepsis_jax.pipelines.audit import (
    STEPS,
    VALUES,
    AuditConfig,
    recorded_futures,
    simulate_clinician,
    usable_stays,
)
from worldmodel.episodes import Episodes
from worldmodel.models.evaluation import (
    MortalityScores,
    Predicted,
    expected_calibration_error,
)
from worldmodel.models.world_model import WorldModel

BASELINES = {"model": "world model", "last_value": "last value", "linear": "linear model"}
_LAST_SOFA = "SOFA alone"  # the baseline of mortality in the place of the last value
_RESAMPLES = 500


def world_model_table(
    world_model: WorldModel,
    episodes: Episodes,
    found: Predicted,
    *,
    split: str,
    samples: int,
    seed: int,
) -> pd.DataFrame:
    """Errors, discrimination and calibration of a world model, beside two baselines.

    Args:
      world_model: to evaluate.
      episodes: recorded stays.
      found: of `worldmodel.models.evaluation.predict_split`, of the split.
      split: that is predicted.
      samples: simulated futures per stay and member, for the errors some steps ahead.
      seed: of noise and resamples.

    Returns:
      Columns who, metric, value, low, high: 95% intervals over stays, by the delta method for
      means and by a bootstrap of stays otherwise; no interval for calibration errors. Errors of the
      next row in z-scores, over values really measured; those some steps ahead in units of the
      value, of the mean of the simulated futures under the clinician.

    Raises:
      InputError: the split holds too little.
    """
    random = np.random.default_rng(seed)
    lines = [*_state_lines(found, random)]
    for when in ("last", "every"):
        lines += _mortality_lines(found.mortality[when], f"{when} row", random)
    config = AuditConfig(split=split, samples=samples, seed=seed)
    lines += _ahead_lines(world_model, episodes.of_split(split), config)
    return pd.DataFrame(lines, columns=["who", "metric", "value", "low", "high"])


def calibration_table(found: Predicted, *, bins: int = 10) -> pd.DataFrame:
    """Predicted and observed mortality, in groups of rows of equal size by predicted risk.

    Args:
      found: predictions of a split.
      bins: number of groups.

    Returns:
      Columns when ("last" row of each stay, "every" row), who, predicted and observed (percent)
      with observed_low and observed_high (Wilson's 95% interval, which counts stays and not
      rows), rows, stays.
    """
    lines = []
    for when, of in found.mortality.items():
        for name, score in of.scores.items():
            who = _LAST_SOFA if name == "last_value" else BASELINES[name]
            for part in np.array_split(np.argsort(score, kind="stable"), bins):
                if not len(part):
                    continue
                died, stays = float(of.died[part].mean()), len(np.unique(of.at[part, 0]))
                low, high = wilson(died, stays)
                lines.append((when, who, 100 * float(score[part].mean()), 100 * died, 100 * low,
                              100 * high, len(part), stays))  # fmt: skip
    columns = ["when", "who", "predicted", *ends("observed"), "rows", "stays"]
    return pd.DataFrame(lines, columns=columns)


_Line = tuple[str, str, float, float, float]


def _state_lines(found: Predicted, random: np.random.Generator) -> list[_Line]:
    lines = []
    stay, rows = found.at[:, 0], found.rows
    measured = rows.measured.sum(-1).astype(np.float64)
    for name, prediction in found.states.items():
        error = (np.abs(rows.target - prediction.mu) * rows.measured).sum(-1)
        share, low, high = _ratio(error, measured, stay)
        lines.append((BASELINES[name], "state MAE", share, low, high))
        lines.append(
            (BASELINES[name], "ventilation AUC",
             *_ranked(roc_auc_score, rows.ventilated, prediction.ventilation, stay, random))
        )  # fmt: skip
    return lines


def _mortality_lines(found: MortalityScores, when: str, random: np.random.Generator) -> list[_Line]:
    lines: list[_Line] = []
    for name, score in found.scores.items():
        who = _LAST_SOFA if name == "last_value" else BASELINES[name]
        for metric, function in (("AUROC", roc_auc_score), ("AUPRC", average_precision_score)):
            values = _ranked(function, found.died, score, found.at[:, 0], random)
            lines.append((who, f"mortality {metric}, {when}", *values))
        error = expected_calibration_error(score, found.died)
        lines.append((who, f"mortality calibration error, {when}", error, np.nan, np.nan))
    return lines


def _ahead_lines(world_model: WorldModel, episodes: Episodes, config: AuditConfig) -> list[_Line]:
    """Mean absolute error of what is simulated under the clinician, some steps ahead."""
    random = np.random.default_rng(config.seed)
    episodes = usable_stays(world_model, episodes, config, random)
    recorded = recorded_futures(episodes, config.step, all_entries=world_model.is_recurrent)
    simulated = simulate_clinician(world_model, episodes, config)
    lines = []
    for name in VALUES:
        for steps in STEPS:
            use = recorded.known[name][:, steps - 1]
            if use.sum() < 2:
                continue
            drawn = simulated.values[name][use, :, steps - 1]
            weight = None if simulated.alive is None else simulated.alive[use, :, steps - 1]
            mean = drawn.mean(1) if weight is None else _mean(drawn, weight)
            error = mean_of(np.abs(mean - recorded.values[name][use, steps - 1]))
            metric = f"{name} MAE, {steps} steps ahead"
            lines.append((BASELINES["model"], metric, error.value, error.low, error.high))
    return lines


def _mean(
    values: Float[np.ndarray, "P S"], weight: Float[np.ndarray, "P S"]
) -> Float[np.ndarray, " P"]:
    total: np.ndarray = weight.sum(1)
    result: np.ndarray = (values * weight).sum(1) / np.maximum(total, 1e-9)
    return result


def _ratio(
    part: Num[np.ndarray, " K"], whole: Num[np.ndarray, " K"], stay: Int[np.ndarray, " K"]
) -> tuple[float, float, float]:
    """A pooled ratio and its interval over stays."""
    _, row = np.unique(stay, return_inverse=True)
    share, influence = share_of(np.bincount(row, part), np.bincount(row, whole))
    low, high = delta(np.asarray(share), influence)
    return share, float(low), float(high)


def _ranked(
    metric: Callable[..., float],
    label: Shaped[np.ndarray, " K"],
    score: Float[np.ndarray, " K"],
    stay: Int[np.ndarray, " K"],
    random: np.random.Generator,
) -> tuple[float, float, float]:
    """A metric of ranking, and its interval by a bootstrap of stays; NaN with one class alone."""
    if label.min() == label.max():
        return np.nan, np.nan, np.nan
    stays, row = np.unique(stay, return_inverse=True)
    resampled = []
    for _ in range(_RESAMPLES):
        weight = np.bincount(random.integers(len(stays), size=len(stays)), minlength=len(stays))
        kept = weight[row] > 0
        if label[kept].min() < label[kept].max():
            resampled.append(metric(label[kept], score[kept], sample_weight=weight[row][kept]))
    low, high = percentile(np.array(resampled))
    return float(metric(label, score)), float(low), float(high)
