"""Checks with verdicts, and statistics with intervals over patients.

Intervals are by the infinitesimal jackknife: the variance of a statistic is the sum over patients
of their squared influence on it (Efron, The Jackknife, the Bootstrap and Other Resampling Plans,
1982), the limit of a bootstrap over patients at a hundredth of its cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Num
from scipy.stats import norm

from sepsis_jax.report import words
from sepsis_jax.report.html import Section, Table
from worldmodel.errors import InputError
from worldmodel.files import read_json

PASS, SUSPECT, FAIL, NOT_RUN = "pass", "suspect", "fail", "not run"
LEAST_EVENTS = 10  # starts or deaths, and as many rows or stays without
_FOLDS = 3  # of patients
_QUANTILES = (0.2, 0.4, 0.6, 0.8)
_CONSTANT = 1e-6  # standard deviation below which a column is constant
_RIDGE = 1e-3  # of correlations: some columns are functions of others
_RIDGE_ROWS = 20.0  # of predictions, in rows
_RISK = 0.05  # that an interval of `compare_means` excludes a true model
SURE = 3.3  # standard errors: one in a thousand, since the worst of many columns is looked at


@dataclass(frozen=True)
class Check:
    """One check and what came of it.

    Attributes:
      name: what is asked.
      verdict: "pass", "suspect", "fail", or "not run".
      value: the number behind the verdict; None where it was not run.
      bound: end of the interval of `value` that is held against the limit; None without interval.
      limit: beyond which the check fails.
      text: one sentence.
    """

    name: str
    verdict: str
    value: float | None
    bound: float | None
    limit: float | None
    text: str


class Estimate(NamedTuple):
    """A statistic with its standard error over patients."""

    value: float
    error: float

    def low(self, sure: float = SURE) -> float:
        """Lower end of the interval."""
        return self.value - sure * self.error


def check_rows(checks: Sequence[Check]) -> list[dict[str, object]]:
    """Checks as JSON holds them."""
    return [asdict(check) for check in checks]


def summary_line(checks: Sequence[Check]) -> str:
    """One line: how many pass, and the names of those that do not."""
    passed = sum(check.verdict == PASS for check in checks)
    named = [
        f"{verdict}: {', '.join(names)}"
        for verdict in (FAIL, SUSPECT, NOT_RUN)
        if (names := [check.name for check in checks if check.verdict == verdict])
    ]
    return "; ".join([f"{passed} of {len(checks)} checks pass", *named])


def read_checks(folder: str | Path) -> list[Check]:
    """Checks of a folder that `sepsis-jax audit` wrote.

    Raises:
      InputError: it is no such folder.
    """
    file = Path(folder) / "audit.json"
    if not file.is_file():
        raise InputError(f"{folder}: holds no audit.json; name a folder of `sepsis-jax audit`")
    found = read_json(file)
    try:
        return [Check(**row) for row in found["checks"]]
    except (KeyError, TypeError):
        raise InputError(f"{file}: not of `sepsis-jax audit`") from None


AUDIT_COLUMNS = ("check", "verdict", "what was found", "value", "bound", "limit")


def table_rows(checks: Sequence[Check]) -> list[tuple[object, ...]]:
    """Checks in the columns of `AUDIT_COLUMNS`."""
    return [
        (words.plain(one.name), one.verdict, words.plain(one.text), one.value, one.bound, one.limit)
        for one in checks
    ]


def section(checks: Sequence[Check]) -> Section:
    """Checks as a part of a report."""
    return Section(
        "Audit",
        (f"{words.plain(summary_line(checks))}.",
         "A check fails where its value is beyond the limit and the bound, an end of its interval, "
         "leaves little doubt; it is suspect where one of the two is so."),
        tables=(
            Table("", AUDIT_COLUMNS, table_rows(checks), "audit", pd.DataFrame(check_rows(checks))),
        ),
    )  # fmt: skip


def none_found(name: str, found: int, text: str) -> Check:
    """Passes if none was found."""
    return Check(name, FAIL if found else PASS, float(found), None, 0.0, text)


def not_run(name: str, text: str) -> Check:
    """There was not enough to look at."""
    return Check(name, NOT_RUN, None, None, None, text)


def above(
    name: str, value: float, bound: float | None, text: str, *, suspect: float, fail: float
) -> Check:
    """The verdict of a number that should be small.

    It fails beyond `fail` if the bound, where there is one, is beyond `suspect`; beyond one of the
    two it is suspect.
    """
    sure = value if bound is None else bound
    verdict = PASS
    if value > fail or sure > suspect:
        verdict = FAIL if value > fail and sure > suspect else SUSPECT
    return Check(name, verdict, float(value), None if bound is None else float(bound), fail, text)


def within(name: str, value: float, reach: float, allowed: tuple[float, float], text: str) -> Check:
    """The verdict of a number that should lie within limits; `reach` is half its interval."""
    low, high = allowed
    limit = low if value < (low + high) / 2 else high
    beyond = max(low - value, value - high)
    verdict = PASS if beyond <= 0 else FAIL if beyond > reach else SUSPECT
    bound = value + reach if limit == low else value - reach
    return Check(name, verdict, value, bound, limit, text)


def slope(of: np.ndarray, on: np.ndarray, patient: np.ndarray) -> Estimate:
    """Slope of a line through the origin."""
    square = float(np.square(on).sum())
    slope = float((of * on).sum()) / square
    return Estimate(slope, spread((of - slope * on) * on / square, patient))


def spread(influence: np.ndarray, patient: np.ndarray) -> float:
    """Standard error from the influence of each row."""
    return float(np.sqrt(np.square(np.bincount(patient, influence)).sum()))


def auroc(
    score: Num[np.ndarray, " K"], event: Bool[np.ndarray, " K"]
) -> tuple[float, Float[np.ndarray, " K"]]:
    """Area under the ROC curve, ties counted half, and the influence of each row on it.

    Args:
      score: [K].
      event: [K]; both classes are present.
    """
    _, rank, many = np.unique(score, return_inverse=True, return_counts=True)
    positive = np.bincount(rank, event, minlength=len(many))
    below = [(np.cumsum(n) - n / 2)[rank] / n.sum() for n in (positive, many - positive)]
    area = float(below[1][event].mean())
    influence = np.where(
        event,
        (below[1] - area) / event.sum(),
        (1 - below[0] - area) / (~event).sum(),
    )
    return area, influence


def rank_among(
    value: Float[np.ndarray, " P"],
    drawn: Float[np.ndarray, "P S"],
    weight: Float[np.ndarray, "P S"],
    random: np.random.Generator,
) -> Float[np.ndarray, " P"]:
    """Place of values among weighted draws, 0 to 1: uniform if they are drawn alike.

    Args:
      value: [P].
      drawn: [P, S].
      weight: [P, S], 0 or more.
      random: breaks ties.
    """
    gap = drawn - value[:, None]
    tied = np.abs(gap) <= 1e-3 * np.maximum(np.abs(value[:, None]), 1.0)  # rounding in z-scores
    below = (weight * ((gap < 0) & ~tied)).sum(1)
    own = weight.mean(1)  # the value is one draw more
    share = below + random.random(len(value)) * ((weight * tied).sum(1) + own)
    result: np.ndarray = share / np.maximum(weight.sum(1) + own, 1e-12)
    return result


def permuted_rows(
    length: Int[np.ndarray, " N"], random: np.random.Generator
) -> Int[np.ndarray, "N T"]:
    """[N, T] another order of each stay's rows; length [N]."""
    steps = int(length.max())
    number = random.random((len(length), steps))
    recorded = np.arange(steps) < length[:, None]
    result: np.ndarray = np.argsort(np.where(recorded, number, 2.0), axis=1)
    return result


def compare_means(
    observed: Float[np.ndarray, " P"],
    predicted: Float[np.ndarray, " P"],
    variance: Float[np.ndarray, " P"],
    groups: Mapping[str, np.ndarray],
    *,
    intervals: int,
) -> pd.DataFrame:
    """Observed means of groups beside intervals of what was predicted.

    All intervals of a true model hold the observed means in 95% of data sets (Bonferroni).

    Args:
      observed, predicted, variance: [P] of each patient; the variance is that of the outcome.
      groups: masks [P] by name.
      intervals: that are looked at together, here and elsewhere.

    Returns:
      Columns group, stays, observed, predicted, low, high, inside.
    """
    sure = norm.ppf(1 - _RISK / 2 / max(intervals, 1))
    lines = []
    for name, mask in groups.items():
        count, found, middle = int(mask.sum()), observed[mask].mean(), predicted[mask].mean()
        reach = sure * np.sqrt(variance[mask].sum()) / count
        inside = bool(abs(found - middle) <= reach)
        lines.append((name, count, found, middle, middle - reach, middle + reach, inside))
    names = ["group", "stays", "observed", "predicted", "low", "high", "inside"]
    return pd.DataFrame(lines, columns=names)


def partial_correlations(
    values: Float[np.ndarray, "K C"],
    other: Num[np.ndarray, " K"],
    known: Float[np.ndarray, "K D"],
    patient: Int[np.ndarray, " K"],
) -> list[Estimate]:
    """Size of the correlation of each column with `other`, given what is known and other columns.

    Args:
      values: [K, C].
      other: [K].
      known: [K, D].
      patient: [K] number of the patient.
    """
    known, both = _standard(known), _standard(np.column_stack([values, other]))
    square = known.T @ known + _RIDGE * len(known) * np.eye(known.shape[1])
    rest = _standard(both - known @ np.linalg.solve(square, known.T @ both))
    precision = np.linalg.inv(rest.T @ rest / len(rest) + _RIDGE * np.eye(rest.shape[1]))
    found, last = [], values.shape[1]
    for j in range(last):
        pair = precision[np.ix_([j, last], [j, last])]
        residual = rest @ precision[:, [j, last]] @ np.linalg.inv(pair)
        size = np.sqrt(np.square(residual).mean(0))  # the means are 0
        u, v = (residual / np.where(size > _CONSTANT, size, np.inf)).T
        value = float((u * v).mean())
        influence = (u * v - value * (u * u + v * v) / 2) / len(u)
        found.append(Estimate(abs(value), spread(influence, patient)))
    return found


def _standard(columns: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1; constant columns are 0."""
    centred = columns - columns.mean(0)
    scale = centred.std(0)
    result: np.ndarray = centred / np.where(scale > _CONSTANT, scale, np.inf)
    return result


def predicted_auroc(
    inputs: Float[np.ndarray, "K D"],
    event: Bool[np.ndarray, " K"],
    patient: Int[np.ndarray, " K"],
    random: np.random.Generator,
) -> Estimate | None:
    """AUROC of cross-validated predictions, patients kept together; None for too few events.

    Args:
      inputs: [K, D].
      event: [K].
      patient: [K] number of the patient, from 0.
      random: for the folds.
    """
    if min(event.sum(), (~event).sum()) < LEAST_EVENTS:
        return None
    fold = random.permutation(np.arange(patient.max() + 1) % _FOLDS)[patient]
    score = np.zeros(len(event))
    for number in range(_FOLDS):
        rest = fold == number
        if event[~rest].sum() in (0, (~rest).sum()):
            return None
        score[rest] = _additive(inputs[~rest], event[~rest], inputs[rest])
    area, influence = auroc(score, event)
    return Estimate(area, spread(influence, patient))


def _additive(inputs: np.ndarray, event: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Ridge regression of an event on each column and on its quintiles, for other rows.

    Quintiles let it find what is no line, such as a column that holds one number for all deaths.
    """
    quintiles = np.quantile(inputs, _QUANTILES, axis=0).T
    centre, scale = inputs.mean(0), inputs.std(0)
    scale = np.where(scale > _CONSTANT, scale, np.inf)

    def encoded(rows: np.ndarray) -> np.ndarray:
        above_edge = rows[:, :, None] > quintiles
        line = (rows - centre) / scale
        return np.column_stack([line, above_edge.reshape(len(rows), -1), np.ones(len(rows))])

    left = encoded(inputs)
    square = left.T @ left + _RIDGE_ROWS * np.eye(left.shape[1])
    result: np.ndarray = encoded(others) @ np.linalg.solve(square, left.T @ event)
    return result
