"""Who is in a cohort: the flow of patients, and table one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from sepsis_jax.report.html import FlowStep, Section, Table
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.episodes import Episodes

_FIRST_DAY = 24.0  # hours
_AGE, _MALE, _CHARLSON = range(schema.NUM_STATIC)


def patient_sections(episodes: Episodes, manifest: JsonDict, *, split: str | None) -> list[Section]:
    """How the cohort came about, and what its patients are like.

    Args:
      episodes: all N stays of the cohort.
      manifest: of their folder.
      split: that is evaluated; None where nothing is said of one.
    """
    flow = cohort_flow(episodes, manifest, split)
    hours = float(manifest.get("step_hours", schema.STEP_HOURS))
    source = _SOURCES.get(str(manifest.get("source")), "Stays of a hospital.")
    notes = [text for text in manifest.get("notes", ()) if isinstance(text, str)]
    table = Table(
        "Flow of patients", ("step", "stays left out", "stays remaining"),
        [(step.reason, step.excluded, step.remaining) for step in flow], "cohort_flow",
        pd.DataFrame(flow), folded=True,
    )  # fmt: skip
    by_outcome = table_one(episodes, _outcomes(episodes), hours)
    by_split = table_one(episodes, _splits(episodes), hours)
    return [
        Section("Who is in the cohort", (source, *notes), flow=flow, tables=(table,)),
        Section(
            "Patients at a glance",
            (f"Medians with quartiles, or shares with counts. Rows are {hours:g} h apart. A value "
             "is known where it was really measured in the first 24 h, not filled in; the "
             "share that is missing is of all stays.",),
            tables=(
                shown(by_outcome, "Survivors and non-survivors", "table_one"),
                shown(by_split, "Training, validation and test", "table_one_by_split"),
            ),
        ),
    ]  # fmt: skip


_SOURCES = {
    "synthetic": "Synthetic patients of a mechanistic world, treated by a stochastic clinician "
    "whose probabilities are known. No record of a person is involved.",
    "own table": "Stays from a table of one's own records.",
}


def cohort_flow(episodes: Episodes, manifest: JsonDict, split: str | None) -> list[FlowStep]:
    """Steps to the cohort that its manifest tells of, and to the split that is evaluated."""
    lines = manifest.get("consort", ())
    flow = [
        FlowStep(line["reason"], int(line["excluded"]), int(line["remaining"])) for line in lines
    ]
    if not flow:
        flow = [FlowStep("stays in the cohort", 0, episodes.num_stays)]
    if split not in (None, "all"):
        count = int((np.asarray(episodes.split) == schema.SPLITS.index(str(split))).sum())
        words = f"not in the {split} split, which is evaluated here"
        flow.append(FlowStep(words, flow[-1].remaining - count, count))
    return flow


def _outcomes(episodes: Episodes) -> dict[str, np.ndarray]:
    died = np.asarray(episodes.died_90d)
    return {"all": np.ones(len(died), bool), "survivors": ~died, "non-survivors": died}


def _splits(episodes: Episodes) -> dict[str, np.ndarray]:
    split = np.asarray(episodes.split)
    return {name: split == number for number, name in enumerate(schema.SPLITS)}


class _Line(NamedTuple):
    """A row of table one: NaN is what is not known."""

    words: str
    values: np.ndarray  # [N]
    share: bool = False  # of stays, else a number with quartiles
    digits: int = 0


def _lines(episodes: Episodes, hours: float) -> list[_Line]:
    valid = np.asarray(episodes.valid)
    steps = np.arange(episodes.num_steps)
    day = valid & (steps < max(1, round(_FIRST_DAY / hours)))
    static = np.asarray(episodes.static, np.float64)
    sofa = np.where(valid, np.asarray(episodes.sofa, np.float64), np.nan)

    def worst(name: str, pick: Callable[..., np.ndarray]) -> np.ndarray:
        at = schema.INDEX[name]
        known = day & np.asarray(episodes.measured)[..., at]
        values = np.asarray(episodes.dynamic, np.float64)[..., at]
        empty = np.inf if pick is np.min else -np.inf
        found = pick(np.where(known, values, empty), axis=1)
        worst_known: np.ndarray = np.where(known.any(1), found, np.nan)
        return worst_known

    def ever(flags: np.ndarray) -> np.ndarray:
        found: np.ndarray = (flags & valid).any(1).astype(np.float64)
        return found

    fluid = np.where(day, np.asarray(episodes.fluid_dose, np.float64), 0.0).sum(1)
    return [
        _Line("age, years", static[:, _AGE]),
        _Line("male, %", static[:, _MALE], share=True),
        _Line("Charlson comorbidity index", static[:, _CHARLSON]),
        _Line("SOFA in the first row, points", sofa[:, 0]),
        _Line("highest SOFA of the first 24 h, points", np.where(day, sofa, -1.0).max(1)),
        _Line("highest lactate of the first 24 h, mmol/L", worst("lactate", np.max), digits=1),
        _Line("lowest mean arterial pressure of the first 24 h, mmHg", worst("meanbp", np.min)),
        _Line("ventilated at any time, %", ever(np.asarray(episodes.ventilated)), share=True),
        _Line("vasopressor at any time, %", ever(np.asarray(episodes.vasopressor) > 0), share=True),
        _Line("fluid in the first 24 h, mL", fluid),
        _Line("recorded, hours", np.asarray(episodes.length) * hours),
        _Line("died in hospital, %", np.asarray(episodes.died_in_hospital, np.float64), share=True),
        _Line("died within 90 days, %", np.asarray(episodes.died_90d, np.float64), share=True),
    ]


def table_one(episodes: Episodes, groups: Mapping[str, np.ndarray], hours: float) -> pd.DataFrame:
    """Table one in numbers.

    Args:
      episodes: N stays.
      groups: [N] masks by name.
      hours: per row.

    Returns:
      Rows (characteristic, group) with stays, known (how many of them), missing (percent), value
      (median, or percent of those known), low and high (quartiles; NaN of shares), count (of
      shares) and digits to show.
    """
    rows = []
    for line in _lines(episodes, hours):
        for name, mask in groups.items():
            values = line.values[mask]
            known = values[np.isfinite(values)]
            stays = int(mask.sum())
            row: JsonDict = {"characteristic": line.words, "group": name, "stays": stays}
            row |= {"known": len(known), "digits": line.digits}
            row["missing"] = 100.0 * (1 - len(known) / stays) if stays else np.nan
            low, value, high = np.full(3, np.nan)
            if len(known):
                low, value, high = np.quantile(known, (0.25, 0.5, 0.75))
            if line.share:
                low, high = np.nan, np.nan
                value = 100.0 * known.mean() if len(known) else np.nan
                row["count"] = int(known.sum())
            rows.append(row | {"value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def shown(table: pd.DataFrame, title: str, name: str) -> Table:
    """Table one for people: a column per group, with how many are known and missing."""
    first = table.drop_duplicates("group")
    groups = [f"{row.group}, n = {row.stays:,}" for row in first.itertuples()]
    rows: list[tuple[object, ...]] = []
    for words, lines in table.groupby("characteristic", sort=False):
        whole = lines[lines["group"] == "all"] if (lines["group"] == "all").any() else lines
        known, stays = int(whole["known"].sum()), int(whole["stays"].sum())
        rows.append((words, *(_cell(row) for _, row in lines.iterrows()),
                     f"{known:,}", f"{100 * (1 - known / stays):.1f}%"))  # fmt: skip
    data = table.drop(columns="digits")
    return Table(title, ("", *groups, "known, n", "missing"), rows, name, data)


def _cell(row: pd.Series) -> str | None:
    if not np.isfinite(row["value"]):
        return None
    if np.isfinite(row["low"]):
        value, low, high = (f"{row[end]:.{row['digits']}f}" for end in ("value", "low", "high"))
        return f"{value} ({low} to {high})"
    return f"{row['value']:.1f}% ({int(row['count']):,})"
