"""The tables of the paper as files and as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from sepsis_jax.report import published as paper
from sepsis_jax.report.figures import COLORS, save
from sepsis_jax.report.html import Section, Table, write_page
from sepsis_jax.report.ope import escaped, records
from sepsis_jax.runs import JsonDict
from worldmodel.files import write_json

TITLES = {
    "world_model": "World model",
    "policies": "Policies",
    "stages": "Stages of training",
}
_TEXT = {
    "world_model": (
        "Errors of the next row in z-scores over values that were really measured; errors some "
        "steps ahead in units of the value, of the mean simulated future under the clinician. 95% "
        "intervals over stays.",
    ),
    "policies": (
        "Off-policy estimates from recorded stays with 95% intervals; `trust` says whether the "
        "records can carry them (`ope/report.html` has every estimator and reason). Rates are "
        "percent of prescriptions in recorded states. `true`, where the patients are synthetic, is "
        "the value in the world that made the records.",
        "A policy that is not here was not given; no row is filled in for it.",
    ),
    "stages": (
        "The language model after each stage. Estimates, adherence and unsafe prescriptions come "
        "from recorded states, where the stage was asked there; predictions of mortality and of "
        "vasopressor need are answered without the simulator; `true` is the value of treating "
        "fresh synthetic patients, `valid` the percent of its calls that could be carried out.",
    ),
}
_COLUMNS = {
    "policies": ("dr", "wis", "wpdis", "wpdis_alive", "less_clinician", "ess", "trust", "adherence",
                 "underdosing", "overdosing", "true"),
    "stages": ("dr", "wis", "wpdis", "adherence", "unsafe", "mortality_auroc", "mortality_auprc",
               "vasopressor_auroc", "vasopressor_auprc", "true", "valid"),
}  # fmt: skip


def write_tables(
    folder: Path, tables: Mapping[str, pd.DataFrame | None], facts: JsonDict, *, published: bool
) -> None:
    """Writes each table as .csv and .tex, all as tables.json, a page and a manifest.

    Args:
      folder: to write into.
      tables: by name of `TITLES`; None where there is none.
      facts: the manifest.
      published: show the figures of the paper beside ours.
    """
    kept = {name: table for name, table in tables.items() if table is not None}
    for name, table in kept.items():
        table.to_csv(folder / f"{name}.csv", index=False)
        (folder / f"{name}.tex").write_text(latex(*cells(name, table)))
    write_json(
        folder / "tables.json",
        {
            **{name: records(table) for name, table in kept.items()},
            "rank_correlation": kept["policies"].attrs.get("rank_correlation"),
        },
    )
    write_json(folder / "manifest.json", facts)
    picture = folder / "policies.png"
    forest_plot(kept["policies"], picture)
    write_page(folder / "report.html", "Evaluation", page(kept, picture, published=published))


def page(tables: Mapping[str, pd.DataFrame], picture: Path, *, published: bool) -> list[Section]:
    """Sections of all tables, with the paper's beside ours if they are wanted."""
    theirs = {"policies": paper.POLICIES, "stages": paper.STAGES} if published else {}
    found = []
    for name, table in tables.items():
        shown = [Table("", *cells(name, table))]
        if name in theirs:
            columns = list(theirs[name].columns)
            rows = [tuple(row.values()) for row in theirs[name].to_dict("records")]
            shown.append(Table("Published (SepsisAgent), not comparable blindly", columns, rows))
        pictures = [(picture, "Value by policy: estimates with 95% intervals, and the truth")]
        text = (*_TEXT[name], *(paper.CAVEATS if name in theirs else ()))
        found.append(
            Section(TITLES[name], text, pictures if name == "policies" else (), tuple(shown))
        )
    return found


SHORT = {
    "policies": ("wis", "less_clinician", "ess", "trust", "adherence", "true"),
    "stages": ("wis", "adherence", "mortality_auroc", "vasopressor_auroc", "true", "valid"),
}
"""Columns that fit a terminal."""


def cells(
    name: str, table: pd.DataFrame, columns_shown: Sequence[str] | None = None
) -> tuple[list[str], list[tuple[object, ...]]]:
    """Headings and rows, each value with its interval in one cell; what is undefined is None.

    Args:
      name: of the table.
      table: with a column per value, and its `_low` and `_high`.
      columns_shown: all of the report if not given.
    """
    if name == "world_model":
        columns = ["metric", *dict.fromkeys(table["who"])]
        by = table.set_index(["metric", "who"])
        return columns, [
            (metric, *(_cell(by.loc[(metric, who)], "value") if (metric, who) in by.index else None
                       for who in columns[1:]))
            for metric in dict.fromkeys(table["metric"])
        ]  # fmt: skip
    first = table.columns[0]
    shown = [column for column in columns_shown or _COLUMNS[name] if column in table]
    rows = [(row[first], *(_cell(row, column) for column in shown)) for _, row in table.iterrows()]
    return [str(first), *(column.replace("_", " ") for column in shown)], rows


def _cell(row: pd.Series, name: str) -> object:
    value = row[name]
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, float | int | np.number):
        return None if value is None or pd.isna(value) else value
    value = float(value)
    if not np.isfinite(value):
        return None
    low, high = (row.get(end, np.nan) for end in (_end(name, "low"), _end(name, "high")))
    digits = 2 if abs(value) >= 1 else 3
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _end(name: str, end: str) -> str:
    return end if name == "value" else f"{name}_{end}"


def latex(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A booktabs table."""
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
        r"\toprule",
        " & ".join(map(escaped, columns)) + r" \\",
        r"\midrule",
        *(
            " & ".join("--" if value is None else escaped(str(value)) for value in row) + r" \\"
            for row in rows
        ),
        r"\bottomrule",
        r"\end{tabular}",
        "",
    ]
    return "\n".join(lines)


def forest_plot(policies: pd.DataFrame, path: Path) -> None:
    """Estimates of each policy with 95% intervals, hollow where not trusted, and true values."""
    shown = [("wis", "WIS", COLORS[0]), ("dr", "DR", COLORS[2]), ("true", "true", "black")]
    shown = [one for one in shown if one[0] in policies and policies[one[0]].notna().any()]
    figure, axis = plt.subplots(figsize=(7.2, 0.55 * len(policies) + 1.4), layout="constrained")
    places = np.arange(len(policies))[::-1]
    trusted = policies.get("trust", pd.Series(False, index=policies.index)).fillna(False)
    for offset, (column, label, color) in zip((0.22, 0.0, -0.22), shown, strict=False):
        value = policies[column].to_numpy(float)
        ends = policies[[f"{column}_low", f"{column}_high"]].to_numpy(float)
        axis.hlines(places + offset, ends[:, 0], ends[:, 1], color=color, lw=1.6)
        filled = np.full(len(value), True) if column == "true" else trusted.to_numpy(bool)
        for full in (True, False):
            use = filled == full
            axis.scatter(
                value[use], places[use] + offset, s=34, color=color if full else "white",
                edgecolors=color, zorder=3, label=label if full == filled.any() else None,
            )  # fmt: skip
    finite = policies[[one[0] for one in shown]].to_numpy(float)
    low, high = np.nanmin(finite), np.nanmax(finite)
    margin = 0.6 * (high - low) + 1.0
    axis.set(
        yticks=places, xlim=(low - margin, high + margin),
        xlabel="total reward (hollow: the records cannot carry the estimate)",
    )  # fmt: skip
    axis.set_yticklabels(policies["policy"])
    axis.grid(axis="x", color="0.9")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, path)
