"""What hidden causes of treatment could do to a conclusion, and the traces that they leave.

**Confounding** (a marginal sensitivity model). If a cause that nobody recorded made the clinician's
true probabilities differ from those given, the right weight of a stay is the given one times a
factor. Allowing factors between 1 / Gamma and Gamma, the self-normalised value lies between two
bounds, found by sorting stays by return (Tan 2006; Zhao, Small & Bhattacharya 2019; for policies,
Kallus & Zhou 2018). The Gamma at which the bounds reach as far as a conclusion allows is the
strength at which it falls. `sepsis_jax.ope.robustness` has the bounds themselves.

**Negative controls** hold if the clinician's probabilities are right and nothing is hidden. What a
clinician does at a step must not follow from what they did before, once the recorded state is
known: residuals 1[a_t = a] - b(a | s_t) of one stay are then uncorrelated. A cause that is not in
the state and lasts for longer than a step (a hidden diagnosis, a colleague's habit, a model of the
clinician that forgets) makes them agree. And weights must not move what was there before the first
treatment: the weighted mean of the first row's features is their mean (a negative control outcome;
Lipsitch, Tchetgen Tchetgen & Cohen 2010). Neither finds a hidden cause that changes with every
step. They can only refuse.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from sepsis_jax.ope.data import BLOCK, Inspected

STRONGEST = 20.0  # Gamma; stronger ones are not told apart
_GRID = np.exp(np.linspace(0.0, np.log(STRONGEST) ** 0.5, 80) ** 2)  # finest near 1

BETTER, WORSE, NEITHER = "better than the clinician", "worse than the clinician", "no difference"


def conclusions(table: pd.DataFrame) -> list[str]:
    """What each row of `sepsis_jax.ope.evaluate` concludes from its interval of the difference."""
    low, high = table["difference_low"].to_numpy(), table["difference_high"].to_numpy()
    return [
        BETTER if least > 0 else WORSE if most < 0 else NEITHER
        for least, most in zip(low, high, strict=True)
    ]


def strengths(
    table: pd.DataFrame, returns: Float[np.ndarray, " N"], log_weight: Float[np.ndarray, "K N"]
) -> Float[np.ndarray, " R"]:
    """[R] Gamma at which the conclusion of each row falls; NaN without an interval or weights.

    "better" falls when the least value drops by as much as the interval keeps from the clinician's,
    "worse" likewise; "no difference" when a bound leaves the interval of the value, which then says
    less than confounding of that strength.

    Args:
      table: rows of `sepsis_jax.ope.evaluate`, policies in the order of the weights.
      returns: [N] ascending.
      log_weight: [K, N] final log weights.
    """
    policies = list(dict.fromkeys(table["policy"]))
    found = np.full(len(table), np.nan)
    concluded = np.asarray(conclusions(table))
    columns = ["estimate", "low", "high", "difference_low", "difference_high"]
    numbers = table[columns].to_numpy(np.float64)
    owner = table["policy"].to_numpy()
    weighted = ~table["estimator"].isin(["on_policy", "dm"]).to_numpy()
    for policy, weights in zip(policies, log_weight, strict=True):
        drop, rise = _moves(returns, weights)
        for place in np.flatnonzero((owner == policy) & weighted):
            value, low, high, less, more = numbers[place]
            if concluded[place] == BETTER:
                found[place] = _falls(drop, less)
            elif concluded[place] == WORSE:
                found[place] = _falls(rise, -more)
            elif np.isfinite([value, low, high]).all():
                found[place] = min(_falls(drop, value - low), _falls(rise, high - value))
    return found


def _moves(returns: np.ndarray, log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[G] how far the WIS value may drop and rise at each Gamma of the grid."""
    top = log_weight.max()
    if not np.isfinite(top):
        return np.full(len(_GRID), np.inf), np.full(len(_GRID), np.inf)
    weight = np.exp(log_weight.astype(np.float64) - top)
    mass = np.append(0.0, weight.cumsum())
    gain = np.append(0.0, (weight * returns).cumsum())
    value = gain[-1] / mass[-1]
    lows: list[np.ndarray] = []
    highs: list[np.ndarray] = []
    for gamma in _GRID:
        for first, rest, into in ((gamma, 1 / gamma, lows), (1 / gamma, gamma, highs)):
            total = first * mass + rest * (mass[-1] - mass)
            into.append((first * gain + rest * (gain[-1] - gain)) / total)
    drop = value - np.array([each.min() for each in lows])
    return drop, np.array([each.max() for each in highs]) - value


def _falls(moves: np.ndarray, margin: float) -> float:
    """Least Gamma whose move exceeds a margin, between points of the grid; the largest if none."""
    if margin <= 0 or not np.isfinite(moves).all():
        return 1.0
    return float(np.interp(margin, moves, _GRID))


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
