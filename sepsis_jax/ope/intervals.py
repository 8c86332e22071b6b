"""Intervals for estimates: bootstrap, delta method, and bounds for means.

Host-side NumPy on small arrays; all are two-sided at level 1 - alpha unless named otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num
from scipy import stats

from worldmodel.errors import InputError

Interval = tuple[np.ndarray, np.ndarray]


class Mean(NamedTuple):
    """A mean with its standard error and its normal interval at level 95%."""

    value: float
    se: float
    low: float
    high: float


def mean_of(numbers: Num[np.ndarray, " N"]) -> Mean:
    """The mean of independent numbers [N], at least two."""
    mean, error = float(numbers.mean()), float(numbers.std(ddof=1) / np.sqrt(len(numbers)))
    return Mean(mean, error, mean - 1.96 * error, mean + 1.96 * error)


def ends(name: str) -> tuple[str, str, str]:
    """Names of the columns that hold a value and the two ends of its interval."""
    return name, f"{name}_low", f"{name}_high"


def share_of(part: Num[np.ndarray, " N"], whole: Num[np.ndarray, " N"]) -> tuple[float, np.ndarray]:
    """Sum of a part [N] by the sum of the whole [N], and its influences [N] (delta method).

    Influences of two shares of the same stays may be subtracted, for an interval of the difference.
    """
    share = float(part.sum() / whole.sum())
    return share, (part - share * whole) / whole.mean()


def wilson(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share of `count` independent events (Wilson 1927)."""
    z = 1.96
    scale = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z / scale * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return float(middle - half), float(middle + half)


def percentile(resampled: Float[np.ndarray, " B *b"], alpha: float = 0.05) -> Interval:
    """Quantiles alpha/2 and 1 - alpha/2 of resampled values [B, ...], undefined ones left out."""
    return _quantiles(resampled, np.asarray(alpha / 2), np.asarray(1 - alpha / 2))


def bca(
    resampled: Float[np.ndarray, " B *b"],
    estimate: Float[np.ndarray, "*b"],
    left_out: Float[np.ndarray, " N *b"] | None,
    alpha: float = 0.05,
) -> Interval:
    """Bias-corrected and accelerated bootstrap (Efron 1987).

    z0 = Phi^-1(share of resamples below the estimate); a = sum d^3 / (6 (sum d^2)^1.5) with d the
    jackknife's deviations; quantiles Phi(z0 + (z0 + z) / (1 - a (z0 + z))).

    Args:
      resampled: [B, ...] values in resamples.
      estimate: [...] value of the whole sample.
      left_out: [N, ...] values without each stay; None for no acceleration.
      alpha: 1 - level.
    """
    defined = np.isfinite(resampled)
    below = ((resampled < estimate) & defined).sum(0) + 0.5 * (resampled == estimate).sum(0)
    count = np.maximum(defined.sum(0), 1)
    share = np.clip(below / count, 0.5 / count, 1 - 0.5 / count)
    z0 = stats.norm.ppf(share)
    acceleration = np.zeros_like(z0)
    if left_out is not None:
        acceleration = _acceleration(np.asarray(left_out, np.float64))

    def level(z: float) -> np.ndarray:
        shift = z0 + z
        found: np.ndarray = stats.norm.cdf(z0 + shift / np.maximum(1 - acceleration * shift, 1e-3))
        return found

    return _quantiles(resampled, level(stats.norm.ppf(alpha / 2)), level(stats.norm.isf(alpha / 2)))


def _acceleration(left_out: np.ndarray) -> np.ndarray:
    """Acceleration: sum d^3 / (6 (sum d^2)^1.5); 0 where nothing varies or a value is undefined."""
    defined = np.isfinite(left_out)
    values = np.where(defined, left_out, 0.0)
    mean = values.sum(0) / np.maximum(defined.sum(0), 1)
    deviation = np.where(defined, mean - values, 0.0)
    top = np.abs(deviation).max(0)
    deviation = deviation / np.where(top > 0, top, 1.0)
    scale = np.maximum((deviation**2).sum(0), 1e-30) ** 1.5
    found: np.ndarray = (deviation**3).sum(0) / (6 * scale)
    return found


def _quantiles(resampled: np.ndarray, low: np.ndarray, high: np.ndarray) -> Interval:
    """Interpolated quantiles along the first axis at a level per column; NaN without values."""
    ordered = np.sort(np.where(np.isfinite(resampled), resampled, np.nan), axis=0)  # NaN last
    count = np.isfinite(ordered).sum(0)

    def at(level: np.ndarray) -> np.ndarray:
        position = np.nan_to_num(np.clip(level, 0, 1)) * np.maximum(count - 1, 0)
        left = np.floor(position).astype(int)
        right = np.minimum(left + 1, np.maximum(count - 1, 0))
        lower = np.take_along_axis(ordered, left[None], 0)[0]
        upper = np.take_along_axis(ordered, right[None], 0)[0]
        found: np.ndarray = lower + (upper - lower) * (position - left)
        return found

    return at(low), at(high)


def delta(
    estimate: Float[np.ndarray, "*b"], influence: Float[np.ndarray, " N *b"], alpha: float = 0.05
) -> Interval:
    """Estimate +- z standard errors from influences [N, ...]."""
    half = stats.norm.isf(alpha / 2) * standard_error(influence)
    return estimate - half, estimate + half


def student_t(
    estimate: Float[np.ndarray, "*b"], influence: Float[np.ndarray, " N *b"], alpha: float = 0.05
) -> Interval:
    """Estimate +- t_{1 - alpha/2, N - 1} standard errors; exact in the limit of normal values."""
    half = stats.t.isf(alpha / 2, len(influence) - 1) * standard_error(influence)
    return estimate - half, estimate + half


def adaptive_t(
    estimate: Float[np.ndarray, "*b"],
    influence: Float[np.ndarray, " N *b"],
    alpha: float = 0.05,
    extra: Float[np.ndarray, "*b"] | float = 0.0,
) -> Interval:
    """Estimate +- t standard errors, with as many degrees of freedom as the tail leaves.

    A variance from N influences of kurtosis k errs like one with 2 N / (k - 1) degrees of freedom
    (Satterthwaite 1946): where a few large weights carry the error, the quantile is wider. Twice as
    many are used: the count is for errors that are symmetric, and intervals of weighted estimates
    were too wide with it (docs/ope.md).

    Args:
      estimate: [...].
      influence: [N, ...] of each stay.
      alpha: 1 - level.
      extra: [...] variance from elsewhere.
    """
    quantile = stats.t.isf(alpha / 2, degrees_of_freedom(influence))
    half = quantile * np.sqrt(standard_error(influence) ** 2 + extra)
    return estimate - half, estimate + half


def degrees_of_freedom(influence: Float[np.ndarray, " N *b"]) -> Float[np.ndarray, "*b"]:
    """4 N / (kurtosis - 1), between 1 and N - 1; N - 1 where nothing varies."""
    stays = len(influence)
    squares = np.asarray(influence, np.float64) ** 2
    top = squares.max(0)
    squares = squares / np.where(top > 0, top, 1.0)
    total = squares.sum(0)
    kurtosis = stays * (squares**2).sum(0) / np.where(total > 0, total, 1.0) ** 2
    excess = np.where(total > 0, kurtosis - 1, 0.0)
    found: np.ndarray = np.clip(4 * stays / np.maximum(excess, 1e-9), 1.0, max(stays - 1, 1))
    return found


def standard_error(influence: Float[np.ndarray, " N *b"]) -> Float[np.ndarray, "*b"]:
    """Root of sum_i influence_i^2 / (N (N - 1)); for a mean, the usual s / sqrt(N)."""
    stays = len(influence)
    found: np.ndarray = np.sqrt(
        (np.asarray(influence, np.float64) ** 2).sum(0) / (stays * (stays - 1))
    )
    return found


def empirical_bernstein(
    values: Num[np.ndarray, " N"], low: float, high: float, alpha: float = 0.05
) -> tuple[float, float]:
    """Two-sided bound for the mean of values known to lie in [low, high] (Maurer & Pontil 2009).

    half = sqrt(2 s^2 ln(4 / alpha) / N) + 7 (high - low) ln(4 / alpha) / (3 (N - 1)).

    Each side has level 1 - alpha/2, hence the 4.
    """
    values = _bounded(values, low, high)
    stays, log = len(values), np.log(4 / alpha)
    half = np.sqrt(2 * values.var(ddof=1) * log / stays) + 7 * (high - low) * log / (
        3 * (stays - 1)
    )
    return float(values.mean() - half), float(values.mean() + half)


def hoeffding(
    values: Num[np.ndarray, " N"], low: float, high: float, alpha: float = 0.05
) -> tuple[float, float]:
    """Two-sided bound: (high - low) sqrt(ln(2 / alpha) / (2 N)) on either side of the mean."""
    values = _bounded(values, low, high)
    half = (high - low) * np.sqrt(np.log(2 / alpha) / (2 * len(values)))
    return float(values.mean() - half), float(values.mean() + half)


def _bounded(values: np.ndarray, low: float, high: float) -> np.ndarray:
    values = np.asarray(values, np.float64)
    slack = 1e-5 * (abs(high - low) + abs(low) + abs(high))
    if not (np.isfinite([low, high]).all() and low < high):
        raise InputError(f"range: got [{low}, {high}], expected two finite numbers in order")
    if values.min() < low - slack or values.max() > high + slack:
        raise InputError(
            f"range: values span [{values.min():.4g}, {values.max():.4g}], outside the stated "
            f"[{low:.4g}, {high:.4g}]; clip the weights or state the true range"
        )
    return values


def hcope_lower(
    weights: Float[np.ndarray, " N"],
    returns: Float[np.ndarray, " N"],
    least_return: float,
    rng: np.random.Generator,
    alpha: float = 0.05,
    share: float = 0.05,
) -> float:
    """One-sided lower bound of the value at level 1 - alpha (HCOPE; Thomas et al. 2015).

    With X_i = w_i (G_i - least return) >= 0, truncated at c:
    mean min(X, c) - 7 c ln(2/alpha) / (3 (n - 1)) - sqrt(2 var ln(2/alpha) / n), shifted back
    by the least return; c is the value that promises most on a held-out share of the stays.

    Args:
      weights: [N] unnormalised.
      returns: [N].
      least_return: a lower bound of any return, not of the sample's.
      rng: draws the held-out share.
      alpha: 1 - level.
      share: of the stays that choose c.
    """
    if returns.min() < least_return:
        raise InputError(
            f"least_return: got {least_return}, but a return is {returns.min():.4g}; "
            "state a bound that holds"
        )
    values = np.asarray(weights, np.float64) * (np.asarray(returns, np.float64) - least_return)
    order = rng.permutation(len(values))
    first = max(int(share * len(values)), 2)
    pilot, rest = values[order[:first]], values[order[first:]]
    log, n = np.log(2 / alpha), len(rest)

    def bound(sample: np.ndarray, c: float) -> float:
        y = np.minimum(sample, c)
        found: float = y.mean() - 7 * c * log / (3 * (n - 1)) - np.sqrt(2 * y.var(ddof=1) * log / n)
        return found

    top = max(pilot.max(), 1e-12)
    c = max(np.geomspace(top * 1e-3, top * 1e3, 200), key=lambda c: bound(pilot, c))
    return float(least_return + bound(rest, c))


METHODS: dict[str, str] = {
    "adaptive_t": "delta method, Student t with the degrees of freedom that the tail leaves",
    "bca": "bias-corrected and accelerated bootstrap",
    "percentile": "percentile bootstrap",
    "delta": "delta method, normal",
    "t": "delta method, Student t",
}


def make(
    method: str,
    *,
    estimate: np.ndarray,
    resampled: np.ndarray | None,
    influence: np.ndarray,
    left_out: Callable[[], np.ndarray],
    alpha: float,
    extra: np.ndarray | float = 0.0,
) -> Interval:
    """The interval of a named method for estimates [...]; `left_out` is called only for BCa.

    A variance `extra` [...] from elsewhere stretches every interval as it does the standard error.
    """
    if method not in METHODS:
        raise InputError(f"interval: got {method!r}, expected one of {', '.join(METHODS)}")
    if method == "adaptive_t":
        return adaptive_t(estimate, influence, alpha, extra)
    if method == "delta":
        interval = delta(estimate, influence, alpha)
    elif method == "t":
        interval = student_t(estimate, influence, alpha)
    elif resampled is None:
        raise InputError(f"interval {method!r} needs resamples; raise n_bootstrap above 0")
    elif method == "percentile":
        interval = percentile(resampled, alpha)
    else:
        interval = bca(resampled, estimate, left_out(), alpha)
    return _stretched(interval, estimate, standard_error(influence), extra)


def _stretched(
    interval: Interval, estimate: np.ndarray, error: np.ndarray, extra: np.ndarray | float
) -> Interval:
    share = np.sqrt(1 + extra / np.where(error > 0, error, np.inf) ** 2)
    low, high = interval
    return estimate - share * (estimate - low), estimate + share * (high - estimate)
