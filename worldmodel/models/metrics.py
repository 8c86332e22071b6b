"""Quality of predictions: errors, calibration, discrimination.

MAE, NLL, CRPS and coverage are over the entries that were really measured in the next row
(urine: above 0 mL); `mae_all` counts imputed entries too, as the published figure may.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from worldmodel import schema
from worldmodel.models.baselines import HostPrediction, Rows


def gaussian_crps(target: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of a normal (Gneiting & Raftery 2007, eq. 21)."""
    z = (target - mu) / sigma
    return sigma * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))


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


def outcome_metrics(probability: np.ndarray, died: np.ndarray) -> dict[str, float | None]:
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
    probability: np.ndarray, label: np.ndarray, *, bins: int = 10
) -> float:
    """Mean gap between predicted and observed frequency over equal-width bins."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    gap = np.bincount(which, probability - label, minlength=bins)
    return float(np.abs(gap).sum() / count.sum())


def _auc(label: np.ndarray, score: np.ndarray) -> float | None:
    return float(roc_auc_score(label, score)) if label.min() != label.max() else None
