"""Drift between two cohorts: how patients, measuring, treatment and outcome differ.

What is compared are means per stay, one number for each quantity, since the steps of a stay are
not independent. Standardised mean differences have intervals by a bootstrap over patients;
distributions are compared by the Kolmogorov-Smirnov statistic of means per patient, whose p values
are corrected for their number (false discovery rate, Benjamini and Hochberg 1995). A classifier
two-sample test (Lopez-Paz and Oquab, ICLR 2017) asks whether all of them together tell the cohorts
apart: an area under the ROC curve of 0.5 is that of cohorts alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats
from threadpoolctl import threadpool_limits

from sepsis_jax.pipelines.verdicts import auroc, spread
from sepsis_jax.report.drift import drift_figure, drift_words
from sepsis_jax.report.policies import plain
from sepsis_jax.runs import JsonDict, Progress, provenance, silent
from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.episode_files import EPISODES_FILE, load_dose_edges, load_episodes, load_manifest
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, check_replaceable, digest_file, write_json

MARKER = "drift.csv"
LEAST_STAYS = 20  # of each cohort
_NORMAL = 1.96  # standard errors of an interval of 95%
_CONSTANT = 1e-9  # pooled standard deviation below which a quantity is constant


@dataclass(frozen=True)
class DriftConfig:
    """How two cohorts are compared.

    Attributes:
      resamples: of the bootstrap over patients.
      folds: of the classifier's cross-validation, by patient.
      stays: most stays of each cohort that the classifier reads; a random choice of more.
      level: false discovery rate below which a quantity counts as moved.
      seed: of resamples, folds and choices.
    """

    resamples: int = 1000
    folds: int = 5
    stays: int = 3000
    level: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "at least 100", lambda count: count >= 100, "resamples")
        require(self, "2 to 20", lambda count: 2 <= count <= 20, "folds")
        require(self, f"at least {LEAST_STAYS}", lambda n: n >= LEAST_STAYS, "stays")
        require(self, "above 0, below 1", lambda level: 0 < level < 1, "level")


class _Stays(NamedTuple):
    """N stays of a cohort, one number for each of K quantities, and its P patients."""

    names: tuple[tuple[str, str], ...]  # [K] kind and name
    values: np.ndarray  # [N, K] float64, NaN where a stay has none
    actions: np.ndarray  # [N, 25] shares of the stay's steps
    patient: np.ndarray  # [N] 0 to P - 1


class Separation(NamedTuple):
    """How well a classifier tells the cohorts apart; an interval of 95% over patients."""

    auroc: float
    low: float
    high: float


@dataclass(frozen=True)
class Drift:
    """What differs between cohorts A and B.

    Attributes:
      quantities: rows (kind, name, mean and sd of either, smd with interval, ks, p, q, moved), the
        largest difference first.
      actions: 25 rows (vasopressor, fluid, share of either, difference with interval, p, q, moved).
      separation: of all quantities together.
      words: what moved most, in sentences.
    """

    quantities: pd.DataFrame
    actions: pd.DataFrame
    separation: Separation
    words: list[str]


def run_drift(
    first: Path,
    second: Path,
    out: Path,
    config: DriftConfig | None = None,
    progress: Progress = silent,
) -> Drift:
    """Compares two folders of episodes.

    Args:
      first, second: folders of episodes, A and B.
      out: folder to write: drift.csv, actions.csv, drift.json and drift.png.
      config: how they are compared.
      progress: called with (phase, share done).

    Raises:
      InputError: bad folders, steps of different length, or too few stays.
    """
    config = config or DriftConfig()
    check_replaceable(out, MARKER)
    progress("reading", 0.0)
    cohorts = [load_episodes(path) for path in (first, second)]
    hours = [load_manifest(path).get("step_hours", schema.STEP_HOURS) for path in (first, second)]
    if hours[0] != hours[1]:
        raise InputError(
            f"{second}: steps of {hours[1]:g} h, but {first} has steps of {hours[0]:g} h; build "
            "both cohorts with one step_hours"
        )
    edges, other = load_dose_edges(first), load_dose_edges(second)
    notes = []
    if not _same_edges(edges, other):
        notes.append("The edges of dose levels differ: levels of B are those of A's edges.")
    progress("comparing", 0.1)
    for path, episodes in zip((first, second), cohorts, strict=True):
        if episodes.num_stays < LEAST_STAYS:
            raise InputError(f"{path}: {episodes.num_stays} stays, expected {LEAST_STAYS} or more")
    a, b = cohorts
    found = compare_cohorts(a, b, config, edges=edges, step_hours=hours[0], progress=progress)
    found = replace(found, words=found.words + notes)
    progress("writing", 0.95)
    with atomic_folder(out, marker=MARKER) as folder:
        found.quantities.to_csv(folder / MARKER, index=False)
        found.actions.to_csv(folder / "actions.csv", index=False)
        drift_figure(found.quantities, found.actions, found.separation, folder / "drift.png")
        told = provenance(
            cohorts={name: {"path": str(path), "sha256": digest_file(path / EPISODES_FILE),
                            "stays": episodes.num_stays}
                     for name, path, episodes in zip("AB", (first, second), cohorts, strict=True)},
            config=asdict(config), **as_json(found),
        )  # fmt: skip
        write_json(folder / "drift.json", told)
    return found


def as_json(found: Drift) -> JsonDict:
    """The comparison as JSON holds it; numbers that do not exist are null."""
    return {
        "words": found.words,
        "classifier": found.separation._asdict(),
        "quantities": plain(found.quantities),
        "actions": plain(found.actions),
    }


def compare_cohorts(
    first: Episodes,
    second: Episodes,
    config: DriftConfig | None = None,
    *,
    edges: schema.DoseEdges = schema.DEFAULT_DOSE_EDGES,
    step_hours: float = schema.STEP_HOURS,
    progress: Progress = silent,
) -> Drift:
    """Compares two cohorts of steps of one length.

    Args:
      first, second: A and B.
      config: how they are compared.
      edges: of the dose levels of both.
      step_hours: length of a step.
      progress: called with (phase, share done).
    """
    config = config or DriftConfig()
    a, b = (_summarise(episodes, edges, step_hours) for episodes in (first, second))
    random = np.random.default_rng(config.seed)
    quantities = _compare_quantities(a, b, config, random)
    actions = _compare_actions(a, b, config, random)
    progress("classifier", 0.5)
    separation = _separate(a, b, config, random)
    return Drift(quantities, actions, separation, drift_words(quantities, actions, separation))


def _same_edges(one: schema.DoseEdges, other: schema.DoseEdges) -> bool:
    return all(
        np.allclose(getattr(one, drug), getattr(other, drug), rtol=1e-6, atol=0)
        for drug in ("vasopressor", "fluid")
    )


def _summarise(episodes: Episodes, edges: schema.DoseEdges, step_hours: float) -> _Stays:
    """One number per stay for each quantity."""
    valid = np.asarray(episodes.valid)
    length = np.asarray(episodes.length)
    measured = np.asarray(episodes.measured) & valid[..., None]
    # Every step has urine.
    recorded = np.concatenate([measured, valid[..., None]], -1)
    values = np.asarray(episodes.dynamic, np.float64)
    count = recorded.sum(1)
    total = np.where(recorded, values, 0).sum(1)
    features = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def mean(rows: np.ndarray) -> np.ndarray:
        """Mean over the steps of each stay."""
        average: np.ndarray = np.where(valid, rows, 0).sum(1, dtype=np.float64) / length
        return average

    static = np.asarray(episodes.static, np.float64)
    others: dict[tuple[str, str], np.ndarray] = {
        ("patient", "age"): static[:, 0],
        ("patient", "male"): static[:, 1],
        ("patient", "charlson"): static[:, 2],
        ("value", "sofa"): mean(np.asarray(episodes.sofa)),
        ("treatment", "vasopressor_dose"): mean(np.asarray(episodes.vasopressor_dose)),
        ("treatment", "fluid_ml"): mean(np.asarray(episodes.fluid_dose)),
        ("treatment", "ventilated"): mean(np.asarray(episodes.ventilated)),
        ("outcome", "hours"): length * step_hours,
        ("outcome", "died_90d"): np.asarray(episodes.died_90d, np.float64),
        ("outcome", "died_in_hospital"): np.asarray(episodes.died_in_hospital, np.float64),
    }
    names = [("value", name) for name in schema.FEATURE_NAMES]
    names += [("measured", name) for name in schema.MASKED_NAMES]
    shares = measured.sum(1) / length[:, None]
    action = schema.action_index(
        schema.dose_level(np.asarray(episodes.vasopressor_dose), edges.vasopressor),
        schema.dose_level(np.asarray(episodes.fluid_dose), edges.fluid),
    )
    taken = np.eye(schema.NUM_ACTIONS)[np.asarray(action)] * valid[..., None]
    return _Stays(
        names=(*names, *others),
        values=np.concatenate([features, shares, np.stack([*others.values()], -1)], -1),
        actions=taken.sum(1) / length[:, None],
        patient=np.unique(np.asarray(episodes.subject_id), return_inverse=True)[1],
    )


class _Sums(NamedTuple):
    """Sums over the stays of each of P patients, K columns."""

    known: np.ndarray  # [P, K] stays with a value
    total: np.ndarray  # [P, K]
    square: np.ndarray  # [P, K]


def _sums(values: Float[np.ndarray, "N K"], patient: Int[np.ndarray, " N"]) -> _Sums:
    known = np.isfinite(values)
    filled = np.where(known, values, 0)
    sums = []
    for part in (known, filled, filled**2):
        grouped = np.zeros((patient.max() + 1, values.shape[1]))
        np.add.at(grouped, patient, part)
        sums.append(grouped)
    return _Sums(*sums)


def _moments(
    sums: _Sums, weight: Float[np.ndarray, "B P"]
) -> tuple[Float[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Mean and variance of each column under weights of the patients; NaN without any value."""
    count, total, square = (weight @ part for part in sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        variance = (square - count * mean**2) / np.maximum(count - 1, 1)
    return np.where(count > 0, mean, np.nan), np.maximum(variance, 0)


def _resampled(
    sums: _Sums, config: DriftConfig, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Moments of resamples of the patients, in blocks."""
    patients = len(sums.known)
    block = 100
    for start in range(0, config.resamples, block):
        size = min(block, config.resamples - start)
        drawn = random.multinomial(patients, np.full(patients, 1 / patients), size=size)
        yield _moments(sums, drawn.astype(np.float64))


def _standardised(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Difference of means over the pooled standard deviation, B less A."""
    gap = second[0] - first[0]
    pooled = np.sqrt((first[1] + second[1]) / 2)
    scale = np.maximum(pooled, _CONSTANT)
    result: np.ndarray = np.where(
        pooled > _CONSTANT, gap / scale, np.where(gap == 0, 0.0, np.copysign(np.inf, gap))
    )
    return result


def _compare_quantities(
    first: _Stays, second: _Stays, config: DriftConfig, random: np.random.Generator
) -> pd.DataFrame:
    sums = [_sums(stays.values, stays.patient) for stays in (first, second)]
    whole = [_moments(one, np.ones((1, len(one.known)))) for one in sums]
    resampled = [
        _standardised(one, other)
        for one, other in zip(*(_resampled(part, config, random) for part in sums), strict=True)
    ]
    difference = np.concatenate(resampled)
    difference[~np.isfinite(difference)] = np.nan
    low, high = _percentiles(difference)
    ks = [_kolmogorov_smirnov(*columns) for columns in zip(*map(_by_patient, sums), strict=True)]
    table = pd.DataFrame(first.names, columns=["kind", "name"])
    for label, (mean, variance), stays in zip("ab", whole, (first, second), strict=True):
        table[f"mean_{label}"] = mean[0]
        table[f"sd_{label}"] = np.sqrt(variance[0])
        table[f"share_known_{label}"] = np.isfinite(stays.values).mean(0)
    table["smd"] = _standardised(*whole)[0]
    table["smd_low"], table["smd_high"] = low, high
    table["ks"], table["p"] = np.array(ks).T
    table["q"] = _false_discovery_rate(table["p"].to_numpy())
    table["moved"] = table["q"] < config.level
    size = np.nan_to_num(np.abs(table["smd"]), nan=-1.0)
    table["smd"] = table["smd"].replace([np.inf, -np.inf], np.nan)
    return table.iloc[np.lexsort([-size, ~table["moved"]])].reset_index(drop=True)


def _by_patient(sums: _Sums) -> list[np.ndarray]:
    """The patients' means of each column, of those who have one."""
    known = sums.known > 0
    mean = sums.total / np.maximum(sums.known, 1)
    return [mean[known[:, k], k] for k in range(mean.shape[1])]


def _kolmogorov_smirnov(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    if not len(first) or not len(second):
        return np.nan, np.nan
    found = stats.ks_2samp(first, second, method="asymp")
    return float(found.statistic), float(found.pvalue)


def _percentiles(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval of 95%, NaN where no resample has a value."""
    some = np.isfinite(resampled).any(0)
    ends = np.full((2, resampled.shape[1]), np.nan)
    ends[:, some] = np.nanquantile(resampled[:, some], (0.025, 0.975), axis=0)
    return ends[0], ends[1]


def _false_discovery_rate(p: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    q = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known])
    return q


def _compare_actions(
    first: _Stays, second: _Stays, config: DriftConfig, random: np.random.Generator
) -> pd.DataFrame:
    sums = [_sums(stays.actions, stays.patient) for stays in (first, second)]
    share = [_moments(one, np.ones((1, len(one.known))))[0][0] for one in sums]
    drawn = np.concatenate([
        other[0] - one[0]
        for one, other in zip(*(_resampled(part, config, random) for part in sums), strict=True)
    ])  # fmt: skip
    low, high = _percentiles(drawn)
    difference = share[1] - share[0]
    error = drawn.std(0)
    z = np.divide(difference, error, out=np.zeros_like(difference), where=error > 0)
    p = 2 * stats.norm.sf(np.abs(z))
    q = _false_discovery_rate(p)
    level = np.arange(schema.NUM_ACTIONS)
    return pd.DataFrame({
        "vasopressor": level // schema.NUM_LEVELS, "fluid": level % schema.NUM_LEVELS,
        "share_a": share[0], "share_b": share[1], "difference": difference,
        "low": low, "high": high, "p": p, "q": q, "moved": q < config.level,
    })  # fmt: skip


def _separate(
    first: _Stays, second: _Stays, config: DriftConfig, random: np.random.Generator
) -> Separation:
    """Cross-validated area under the ROC curve of boosted trees that tell B from A."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedGroupKFold

    chosen = [_choose(stays, config.stays, random) for stays in (first, second)]
    values = np.concatenate([np.concatenate([c.values, c.actions], -1) for c in chosen])
    label = np.repeat([False, True], [len(c.values) for c in chosen])
    patient = np.concatenate([chosen[0].patient, chosen[1].patient + chosen[0].patient.max() + 1])
    folds = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed)
    area, influence = 0.0, np.zeros(len(label))
    with threadpool_limits(1):
        for train, test in folds.split(values, label, patient):
            trees = HistGradientBoostingClassifier(
                max_iter=60, max_leaf_nodes=8, learning_rate=0.1, early_stopping=False,
                random_state=config.seed,
            )  # fmt: skip
            score = trees.fit(values[train], label[train]).decision_function(values[test])
            found, moved = auroc(score, label[test])
            share = len(test) / len(label)
            area += share * found
            influence[test] = share * moved
    reach = _NORMAL * spread(influence, patient)
    return Separation(float(area), float(max(area - reach, 0)), float(min(area + reach, 1)))


def _choose(stays: _Stays, most: int, random: np.random.Generator) -> _Stays:
    if len(stays.values) <= most:
        return stays
    index = np.sort(random.choice(len(stays.values), most, replace=False))
    return _Stays(stays.names, stays.values[index], stays.actions[index], stays.patient[index])
