"""Negative controls: what holds if the clinician's probabilities are right, and nothing is hidden.

What a clinician does at a step must not follow from what they did before, once the recorded state
is known; residuals 1[a_t = a] - b(a | s_t) of one stay are then uncorrelated. A cause that is not
in the state and lasts for longer than a step (a hidden diagnosis, a colleague's habit, a model of
the clinician that forgets) makes them agree. And weights must not move what was there before the
first treatment: the weighted mean of the first row's features is their mean (a negative control
outcome; Lipsitch, Tchetgen Tchetgen & Cohen 2010).

Neither finds a hidden cause that changes with every step. They can only refuse.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sepsis_jax.ope.data import BLOCK, Inspected


class Controls(NamedTuple):
    """Distances from what must hold, in standard errors."""

    habit: float  # agreement of a stay's residuals; NaN where not all probabilities are known
    baseline: np.ndarray  # [K] largest over the first row's features; NaN without features
    features: int  # D, for the level at which the largest of D is judged


def negative_controls(
    found: Inspected,
    index: np.ndarray,
    log_weight: Float[np.ndarray, "K N"],
    features: Float[np.ndarray, "N D"] | None,
) -> Controls:
    """Both controls.

    Args:
      found: inspected input.
      index: [N] numbers of the stays, in the order of the weights.
      log_weight: [K, N] final log weights.
      features: [N, D] of the first row, in the same order.
    """
    if features is None:
        return Controls(habit(found, index), np.full(len(log_weight), np.nan), 0)
    spread = features.std(0)
    varied = spread > 1e-6
    x = (features[:, varied] - features[:, varied].mean(0)) / spread[varied]
    baseline = np.array([_moved(row, x) for row in log_weight])
    return Controls(habit(found, index), baseline, x.shape[1])


def habit(found: Inspected, index: np.ndarray) -> float:
    """Mean agreement of residuals within stays, in standard errors; NaN if it cannot be told.

    A stay adds the sum over t of r_t . (r_0 + ... + r_t-1), whose mean is 0 if nothing that lasts
    is hidden.
    """
    if found.behavior is None:
        return float("nan")
    parts = []
    for first in range(0, len(index), BLOCK):
        chosen = index[first : first + BLOCK]
        stays = found.stays(chosen)
        residual = -found.behavior.of(chosen, found.steps)
        action = np.asarray(stays.action)[..., None]
        taken = np.take_along_axis(residual, action, -1)
        np.put_along_axis(residual, action, taken + 1, -1)
        residual *= np.asarray(stays.alive)[..., None]
        square = (residual.sum(1, dtype=np.float64) ** 2).sum(-1)
        parts.append((square - (residual.astype(np.float64) ** 2).sum((1, 2))) / 2)
    each = np.concatenate(parts)
    error = each.std(ddof=1) / np.sqrt(len(each))
    return float(each.mean() / error) if error > 0 else 0.0


def _moved(log_weight: np.ndarray, x: Float[np.ndarray, "N D"]) -> float:
    """Largest |z| of the weighted means of standardised features, by the delta method."""
    top = log_weight.max()
    if not np.isfinite(top) or not x.shape[1]:
        return float("nan")
    weight = np.exp(log_weight - top)
    weight = weight[:, None] / weight.mean()
    mean = (weight * x).mean(0)
    error = np.sqrt(((weight * (x - mean) - x) ** 2).mean(0) / len(x))
    clear = error > 1e-5
    return float(np.max(np.abs(mean[clear]) / error[clear], initial=0.0))
