"""Leakage checks of episodes: does a row know its own treatment, or how the stay ends?

Row t may hold only what is known before treatment t is chosen; what treatment t does belongs in
row t + 1. Treatments follow from rows, so that a row does tell the treatment: the checks look for
what a reason cannot look like, such as a pressure that has risen when a vasopressor is started.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from sepsis_jax.pipelines.verdicts import (
    LEAST_EVENTS,
    Check,
    Estimate,
    above,
    auroc,
    none_found,
    not_run,
    partial_correlations,
    permuted_rows,
    predicted_auroc,
    slope,
    spread,
)
from worldmodel import schema
from worldmodel.clinical import sofa
from worldmodel.episodes import Episodes

COLUMNS = (*schema.FEATURE_NAMES, "ventilated", "sofa", "urine_24h")
DRUGS = ("vasopressor", "fluid")
MAX_STAYS = 1500  # read by the costly checks; a random choice of more
LEAST_ROWS = 300  # for correlations given 100 other columns


class EpisodesAudit(NamedTuple):
    """Checks of episodes, and what each column tells of each treatment (columns in docs)."""

    checks: list[Check]
    columns: pd.DataFrame


class _Record(NamedTuple):
    """Episodes on the host."""

    values: np.ndarray  # [N, T, C] in the order of `COLUMNS`
    levels: dict[str, np.ndarray]  # [N, T] by drug
    static: np.ndarray  # [N, 3]
    length: np.ndarray  # [N]
    patient: np.ndarray  # [N] 0, 1, ...
    died: np.ndarray  # [N] bool

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """(stay, step) of all rows but the first of each stay."""
        step = np.arange(self.values.shape[1])
        stay, row = np.nonzero((step >= 1) & (step < self.length[:, None]))
        return stay, row


def audit_episodes(
    episodes: Episodes,
    *,
    dose_edges: schema.DoseEdges = schema.DEFAULT_DOSE_EDGES,
    step_hours: float = schema.STEP_HOURS,
    seed: int = 0,
) -> EpisodesAudit:
    """All checks of N stays.

    Args:
      episodes: the stays, of all splits.
      dose_edges: of the dose levels.
      step_hours: length of a step in hours.
      seed: of the choice of stays, and of the order of permuted rows.
    """
    # The matrices are small: a second thread gains nothing, and where cores are shared its waiting
    # costs more than the work.
    with threadpool_limits(1, "blas"):
        return _audit(jax.tree.map(np.asarray, episodes), dose_edges, step_hours, seed)


def _audit(
    host: Episodes, dose_edges: schema.DoseEdges, step_hours: float, seed: int
) -> EpisodesAudit:
    random = np.random.default_rng(seed)
    checks = [_splits(host), _twice(host), _after_the_end(host), _levels(host, dose_edges)]
    checks.append(_unmeasured_end(host))
    count = host.num_stays
    if count > MAX_STAYS:
        host = host.select(np.sort(random.choice(count, MAX_STAYS, replace=False)))
    record = _record(host)
    checks += [_sofa(host, record), _urine(host, record, step_hours)]
    told = {drug: _told(record, drug, random) for drug in DRUGS}
    checks.append(_pressure(told["vasopressor"]))
    checks += [_appears(told), _function(told), _treatment_predicted(record, random)]
    checks += [_outcome_in_column(host, record), _outcome_predicted(record, random)]
    return EpisodesAudit(checks, pd.concat(told.values(), ignore_index=True))


def _record(host: Episodes) -> _Record:
    own = [np.asarray(getattr(host, name))[..., None] for name in COLUMNS[schema.NUM_FEATURES :]]
    _, patient = np.unique(np.asarray(host.subject_id), return_inverse=True)
    return _Record(
        values=np.concatenate([host.dynamic, *own], axis=-1).astype(np.float64),
        levels={drug: np.asarray(getattr(host, drug)) for drug in DRUGS},
        static=np.asarray(host.static, np.float64),
        length=np.asarray(host.length),
        patient=patient.astype(np.int64),
        died=np.asarray(host.died_90d),
    )


# Records


def _splits(host: Episodes) -> Check:
    pairs = np.unique(np.stack([host.subject_id, host.split], axis=1), axis=0)
    shared = len(pairs) - len(np.unique(pairs[:, 0]))
    return none_found(
        "patients in two splits", shared, f"{shared} patients have stays in more than one split."
    )


def _twice(host: Episodes) -> Check:
    ids = host.num_stays - len(np.unique(np.asarray(host.stay_id)))
    action = np.asarray(host.action)
    contents = {
        (int(n), np.asarray(host.dynamic)[i, :n].tobytes(), action[i, :n].tobytes())
        for i, n in enumerate(np.asarray(host.length))
    }
    found = max(ids, host.num_stays - len(contents))
    return none_found(
        "stays recorded twice", found,
        f"{found} stays have the stay_id, or all rows and treatments, of another.",
    )  # fmt: skip


def _after_the_end(host: Episodes) -> Check:
    padding = ~np.asarray(host.valid)
    found = np.zeros(padding.shape, bool)
    for name in ("dynamic", "measured", "vasopressor", "fluid", "vasopressor_dose", "fluid_dose",
                 "ventilated", "sofa", "urine_24h"):  # fmt: skip
        leaf = np.asarray(getattr(host, name)).reshape(*padding.shape, -1)
        found |= (leaf != 0).any(-1)
    count = int((found & padding).sum())
    return none_found(
        "rows after the end of a stay", count, f"{count} rows after the end of a stay are not zero."
    )


def _levels(host: Episodes, edges: schema.DoseEdges) -> Check:
    valid = np.asarray(host.valid)
    doses = ((host.vasopressor, host.vasopressor_dose, edges.vasopressor),
             (host.fluid, host.fluid_dose, edges.fluid))  # fmt: skip
    differs = [
        (schema.dose_level(np.asarray(dose), rising) != np.asarray(level))[valid]
        for level, dose, rising in doses
    ]
    share = float(np.mean(differs))
    return above(
        "levels differ from doses", share, None,
        f"{100 * share:.2g}% of the treatment levels are not those of the recorded dose.",
        suspect=1e-4, fail=1e-2,
    )  # fmt: skip


def _unmeasured_end(host: Episodes) -> Check:
    """Rows after death, or after the patient has left, hold values that were carried on."""
    seen = np.asarray(host.measured).any(-1) & np.asarray(host.valid)
    last = np.where(seen.any(1), seen.shape[1] - np.argmax(seen[:, ::-1], axis=1), 0)
    silent = np.asarray(host.length) - last
    late = silent >= 2
    died = np.asarray(host.died_in_hospital)
    of_dead = f"{100 * late[died].mean():.2g}%" if died.any() else "none"
    share = float(late.mean())
    return above(
        "rows after the outcome", share, None,
        f"{100 * share:.2g}% of the stays ({of_dead} of those who died in hospital) end with two "
        "or more rows without a measurement; the longest such end has "
        f"{int(silent.max())} rows.",
        suspect=0.01, fail=0.05,
    )  # fmt: skip


# Values that are computed from others


@jax.jit
def _score(
    dynamic: jax.Array, ventilated: jax.Array, urine_24h: jax.Array, dose: jax.Array
) -> jax.Array:
    """[N, T] SOFA."""
    score = sofa.standard(
        dynamic, ventilated=ventilated, vasopressor_dose=dose, urine_24h=urine_24h
    )
    return score.total


def _sofa(host: Episodes, record: _Record) -> Check:
    """Recomputes SOFA with the dose of the row and with that of the row before."""
    name = "vasopressor of its own row in SOFA"
    dose = np.asarray(host.vasopressor_dose)
    before = np.concatenate([np.zeros_like(dose[:, :1]), dose[:, :-1]], axis=1)
    rows = (host.dynamic, host.ventilated, host.urine_24h)
    own, earlier = (np.asarray(_score(*rows, given), np.float64) for given in (dose, before))
    stay, row = record.rows()
    gap = (own - earlier)[stay, row]
    rest = (np.asarray(host.sofa) - earlier)[stay, row]
    found = []
    for changed, word in ((gap > 0, "more"), (gap < 0, "less")):
        if changed.sum() >= LEAST_EVENTS:
            estimate = slope(rest[changed], gap[changed], record.patient[stay[changed]])
            found.append((estimate, word, int(changed.sum())))
    if not found:
        return not_run(name, "Too few changes of the vasopressor's points.")
    estimate, word, count = max(found, key=lambda one: one[0].low(2.0))
    return above(
        name, estimate.value, estimate.low(2.0),
        f"In {count} rows whose own vasopressor gives {word} points than the one before, "
        f"{100 * estimate.value:.0f}% of the difference is in the recorded score.",
        suspect=0.1, fail=0.25,
    )  # fmt: skip


def _urine(host: Episodes, record: _Record, step_hours: float) -> Check:
    """Sums the urine of 24 h up to the row and up to the row after it."""
    name = "next step in the urine of 24 h"
    window = max(round(sofa.WINDOW_HOURS / step_hours), 1)
    urine = np.asarray(host.dynamic)[..., schema.URINE].astype(np.float64)
    total = np.concatenate([np.zeros((len(urine), 1)), np.cumsum(urine, axis=1)], axis=1)
    stay, row = record.rows()
    usable = (row >= window) & (row < record.length[stay] - 1)
    stay, row = stay[usable], row[usable]
    own, following = (total[stay, end] - total[stay, end - window] for end in (row + 1, row + 2))
    gap = following - own
    if np.count_nonzero(gap) < LEAST_EVENTS:
        return not_run(name, "Too few stays of more than 24 hours.")
    rest = np.asarray(host.urine_24h)[stay, row] - own
    estimate = slope(rest, gap, record.patient[stay])
    return above(
        name, estimate.value, estimate.low(2.0),
        f"{100 * estimate.value:.0f}% of what the next step adds to the urine of 24 h is in it.",
        suspect=0.1, fail=0.25,
    )  # fmt: skip


# Values and treatments


def _told(record: _Record, drug: str, random: np.random.Generator) -> pd.DataFrame:
    """What each column tells of a drug that is started (vasopressor) or raised (fluid)."""
    level = record.levels[drug]
    stay, row = record.rows()
    given = level[stay, row - 1]
    at_risk = given == 0 if drug == "vasopressor" else given < schema.NUM_LEVELS - 1
    many = len(stay) >= LEAST_ROWS
    correlation = _unique_correlation(record, level, stay, row) if many else []
    stay, row = stay[at_risk], row[at_risk]
    event = level[stay, row] > level[stay, row - 1]
    few = min(event.sum(), (~event).sum()) < LEAST_EVENTS
    now, before = record.values[stay, row], record.values[stay, row - 1]
    other = record.values[stay, permuted_rows(record.length, random)[stay, row]]
    patient = record.patient[stay]
    lines = []
    for j, name in enumerate(COLUMNS):
        line: dict[str, object] = {"drug": drug, "column": name, "events": int(event.sum())}
        if many:
            low = correlation[j].low()
            line |= {"correlation": correlation[j].value, "correlation_low": low}
        if not few:
            same, own = auroc(now[:, j], event)
            earlier, influence = auroc(before[:, j], event)
            change, of_change = auroc(now[:, j] - before[:, j], event)
            sign = 1 if same >= 0.5 else -1
            gain = Estimate(sign * (same - earlier), spread(own - influence, patient))
            line |= {
                "auroc": same, "auroc_before": earlier,
                "auroc_permuted": auroc(other[:, j], event)[0],
                "gain": gain.value, "gain_low": gain.low(),
                "auroc_change": change, "auroc_change_error": spread(of_change, patient),
            }  # fmt: skip
        lines.append(line)
    return pd.DataFrame(lines)


def _unique_correlation(
    record: _Record, level: np.ndarray, stay: np.ndarray, row: np.ndarray
) -> list[Estimate]:
    """Of each column with the level of its row, given the row before, its treatment and statics."""
    before = [record.values[stay, row - 1], record.static[stay]]
    for given in record.levels.values():
        before.append(np.eye(schema.NUM_LEVELS)[given[stay, row - 1]][:, 1:])
    known = np.column_stack([*before, row, 1.0 / row])
    patient = record.patient[stay]
    return partial_correlations(record.values[stay, row], level[stay, row], known, patient)


def _pressure(told: pd.DataFrame) -> Check:
    name = "change of MAP at a vasopressor's start"
    row = told[told["column"] == "meanbp"].iloc[0]
    if "auroc_change" not in row:
        return not_run(name, f"Only {row['events']} starts of a vasopressor.")
    estimate = Estimate(row["auroc_change"], row["auroc_change_error"])
    return above(
        name, estimate.value, estimate.low(2.0),
        "AUROC of a start from the change of MAP since the row before: below 0.5 where MAP has "
        "fallen, which is a reason; above where the row shows the drug's effect.",
        suspect=0.475, fail=0.5,
    )  # fmt: skip


def _worst(told: dict[str, pd.DataFrame], column: str) -> pd.Series | None:
    """The row with the largest value of a column; None where it was not computed."""
    table = pd.concat(told.values(), ignore_index=True)
    if column not in table or table[column].isna().all():
        return None
    return table.loc[table[column].idxmax()]


def _appears(told: dict[str, pd.DataFrame]) -> Check:
    name = "values that appear with the treatment"
    row = _worst(told, "gain_low")
    if row is None:
        return not_run(name, f"Fewer than {LEAST_EVENTS} starts of a drug.")
    return above(
        name, row["gain"], row["gain_low"],
        f"{row['column']} tells that more {row['drug']} is given with AUROC {row['auroc']:.2f}; "
        f"in the row before with {row['auroc_before']:.2f}, in another row of the stay with "
        f"{row['auroc_permuted']:.2f}.",
        suspect=0.1, fail=0.2,
    )  # fmt: skip


def _function(told: dict[str, pd.DataFrame]) -> Check:
    name = "values that are functions of the treatment"
    row = _worst(told, "correlation_low")
    if row is None:
        return not_run(name, f"Fewer than {LEAST_ROWS} rows.")
    return above(
        name, row["correlation"], row["correlation_low"],
        f"{row['column']} correlates with the {row['drug']} level of its row, given everything "
        "else that was known, more than any other value.",
        suspect=0.1, fail=0.2,
    )  # fmt: skip


def _treatment_predicted(record: _Record, random: np.random.Generator) -> Check:
    name = "vasopressor starts predicted from the row"
    stay, row = record.rows()
    level = record.levels["vasopressor"]
    at_risk = np.flatnonzero(level[stay, row - 1] == 0)
    stay, row = stay[at_risk], row[at_risk]
    event, patient = level[stay, row] > 0, record.patient[stay]
    rows = (row, row - 1, permuted_rows(record.length, random)[stay, row])
    found = [predicted_auroc(record.values[stay, which], event, patient, random) for which in rows]
    return _predictable(
        name, found, f"Only {int(event.sum())} starts of a vasopressor.",
        "AUROC of an additive model that reads the row; from the row before {:.2f}, from another "
        "row of the stay (time permuted) {:.2f}.",
    )  # fmt: skip


def _predictable(name: str, found: list[Estimate | None], few: str, text: str) -> Check:
    """The verdict of a prediction; `text` names those from two other rows."""
    own, first, second = found
    if own is None or first is None or second is None:
        return not_run(name, few)
    sentence = text.format(first.value, second.value)
    return above(name, own.value, own.low(), sentence, suspect=0.9, fail=0.95)


# How the stay ends


def _outcome_in_column(host: Episodes, record: _Record) -> Check:
    name = "outcome in a value of the first row"
    if min(record.died.sum(), (~record.died).sum()) < LEAST_EVENTS:
        return not_run(name, f"Only {int(record.died.sum())} deaths in {len(record.died)} stays.")
    flags = np.asarray(host.measured)[:, 0]
    names = (*COLUMNS, *(f"{name}_measured" for name in schema.MASKED_NAMES), *schema.STATIC_NAMES)
    values = np.column_stack([record.values[:, 0], flags, record.static])
    found = []
    for j, column in enumerate(names):
        area, influence = auroc(values[:, j], record.died)
        found.append((Estimate(max(area, 1 - area), spread(influence, record.patient)), column))
    estimate, column = max(found, key=lambda one: one[0].low())
    return above(
        name, estimate.value, estimate.low(),
        f"AUROC of death within 90 days from {column}, the most telling value.",
        suspect=0.9, fail=0.95,
    )  # fmt: skip


def _outcome_predicted(record: _Record, random: np.random.Generator) -> Check:
    name = "death predicted from the first row"
    stays = np.arange(len(record.length))
    rows = (0 * stays, record.length - 1, permuted_rows(record.length, random)[:, 0])
    found = [
        predicted_auroc(np.column_stack([record.values[stays, row], record.static]),
                  record.died, record.patient, random)
        for row in rows
    ]  # fmt: skip
    return _predictable(
        name, found, f"Only {int(record.died.sum())} deaths in {len(stays)} stays.",
        "AUROC of an additive model that reads the first row; from the last row {:.2f}, from any "
        "row of the stay (time permuted) {:.2f}.",
    )  # fmt: skip
