"""The page of a study over its seeds: means and spreads of every table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from sepsis_jax.report import words
from sepsis_jax.report.evaluation import COLUMNS, TITLES, digits
from sepsis_jax.report.examples import provenance_section
from sepsis_jax.report.html import Section, Table, write_page
from sepsis_jax.report.tables import write_tables
from sepsis_jax.runs import JsonDict

REPORT = "report.html"
_COVERAGE = {"intervals": 0, "covered": 0, "covered_low": 0, "covered_high": 0, "width": 1,
             "rank": 2, "least_rank": 2}  # fmt: skip
"""Columns of the table of coverage, with their digits after the point."""


def write_study(
    out: Path,
    tables: Mapping[str, pd.DataFrame],
    stages: Mapping[int, Mapping[str, str]],
    facts: JsonDict,
    coverage: pd.DataFrame | None = None,
) -> None:
    """Writes report.html, and every table as .csv, .tex and in tables.json.

    Args:
      out: folder of the study.
      tables: of `pipelines.study.over_seeds`, by name of `TITLES`.
      stages: by seed, the hash of each stage that is done.
      facts: where it comes from.
      coverage: of `pipelines.study_coverage.coverage_of`, where the truth is known.
    """
    several = len(stages) > 1
    text = (
        "Means over the seeds, with the standard deviation between them after ±."
        if several
        else "One seed: there is no spread between seeds, so a difference may be chance."
    )
    sections = [
        Section(TITLES[name], (text,), tables=(_table(name, table, several),))
        for name, table in tables.items()
    ]
    if coverage is not None:
        sections.append(_coverage(coverage))
    names = list(dict.fromkeys(name for of in stages.values() for name in of))
    rows = [
        (f"{seed}", f"seed-{seed}/evaluation/{REPORT}", *(of.get(n, "")[:12] for n in names))
        for seed, of in stages.items()
    ]
    columns = ("seed", "its report", *(name.replace("_", " ") for name in names))
    seeds = Section(
        "Seeds",
        ("Each seed has a whole report of its own: patients, intervals, truth, figures. Beside it "
         "is the beginning of the hash of each stage, of its settings and all that it reads.",),
        tables=(Table("", columns, rows, "seeds"),),
    )  # fmt: skip
    sections = [*sections, seeds, provenance_section(facts)]
    write_tables(out, sections)
    write_page(out / REPORT, f"Study over {len(stages)} seed{'s' * several}", sections)


def _coverage(table: pd.DataFrame) -> Section:
    shown = ["estimator", "verdict", *(name for name in _COVERAGE if name in table)]
    rows = [
        tuple(
            words.column(row[name]) if name == "estimator"
            else row[name] if isinstance(row[name], str)
            else None if not np.isfinite(row[name])
            else f"{row[name]:.{_COVERAGE[name]}f}"
            for name in shown
        )
        for _, row in table.iterrows()
    ]  # fmt: skip
    return Section(
        "Do the intervals hold the truth?",
        ("How many of the policies' 95% intervals hold the true value, over all seeds and policies "
         "but the clinician, and how well each estimate orders the policies of a seed (Spearman's "
         "correlation with their true values; its mean and least over seeds). The world model's "
         "intervals tell of patients and noise, not of what the model has learned wrongly.",),
        tables=(Table("", [words.column(name) for name in shown], rows, "coverage", table),),
    )  # fmt: skip


def _table(name: str, table: pd.DataFrame, several: bool) -> Table:
    if name == "world_model":
        keys, shown = ["metric", "who"], ["value"]
    else:
        keys, shown = [str(table.columns[0])], [one for one in COLUMNS[name] if one in table]
    called: dict[str, Callable[[str], str]] = {
        "metric": words.metric, "policy": words.policy, "stage": words.stage
    }  # fmt: skip
    rows = [
        (*(called.get(key, str)(row[key]) for key in keys),
         *(_cell(row, one, several) for one in shown))
        for _, row in table.iterrows()
    ]  # fmt: skip
    return Table("", [words.column(one) for one in (*keys, *shown)], rows, name, table)


def _cell(row: pd.Series, name: str, several: bool) -> str | None:
    value, spread = float(row[name]), float(row.get(f"{name}_sd", np.nan))
    if not np.isfinite(value):
        return None
    places = digits(name, value)
    if not (several and np.isfinite(spread)):
        return f"{value:.{places}f}"
    return f"{value:.{places}f} ± {spread:.{places}f}"
