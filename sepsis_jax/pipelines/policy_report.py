"""Tables, pictures and the page of a comparison of policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sepsis_jax.report.html import Section, Table, write_page
from sepsis_jax.report.policy_figures import (
    action_heat_map,
    comparison_figure,
    difference_heat_map,
)
from worldmodel.files import write_json

COLUMNS = ("policy", "value", "less clinician", "less offline", "gap", "mortality", "adherence",
           "unsafe", "under", "over")  # fmt: skip
SHORT = 8  # columns that fit a terminal
_RATES = ("g1", "g2", "dose_jump", "abrupt_stop", "early_fluid_missed", "fluid_overload",
          "vasopressor_at_high_map")  # fmt: skip


def write_comparison(
    folder: Path, table: pd.DataFrame, shares: dict[str, np.ndarray], manifest: dict[str, Any]
) -> None:
    """Writes everything but the policies into a folder."""
    table.to_csv(folder / "comparison.csv", index=False)
    write_json(folder / "comparison.json", {"rows": plain(table), **table.attrs})
    write_json(folder / "manifest.json", manifest)
    where = (
        f"{manifest['patients']} fresh synthetic patients, true value"
        if manifest["truth"]
        else f"{manifest['patients']} test stays in the world model, {manifest['horizon']} steps"
    )
    text = _text(manifest)
    (folder / "comparison.md").write_text(f"{where}\n\n{markdown(table)}\n\n{' '.join(text)}\n")
    pictures = [
        (folder / "comparison.png", "Values with 95% intervals; value against rules"),
        (folder / "actions.png", "Share of decisions by pair of doses"),
        (folder / "difference.png", "Share of decisions, policy less clinician"),
    ]
    comparison_figure(table, where, pictures[0][0])
    action_heat_map(shares, "What is given", pictures[1][0])
    others = {name: share for name, share in shares.items() if name != "clinician"}
    difference_heat_map(others, shares["clinician"], "Policy less clinician", pictures[2][0])
    rates = Table("Broken rules, % of prescriptions", ("policy", *_RATES), [
        (row["policy"], *(row[name] for name in _RATES)) for row in plain(table)
    ])  # fmt: skip
    write_page(
        folder / "report.html", "Policies compared",
        [Section(where, text, pictures[:1], (Table("", COLUMNS, cells(table)), rates)),
         Section("What is given", (), pictures[1:])],
    )  # fmt: skip


def _text(manifest: dict[str, Any]) -> tuple[str, ...]:
    if manifest["truth"]:
        start = (
            "Every policy treats the same patients with the same luck, so differences are paired. "
            "Rules are judged on what the policy gave in the stays it made."
        )
    else:
        start = (
            "Values are those of the world model and share its errors; the clinician's row is what "
            "the records show, and `less clinician` is the difference from the cloned clinician in "
            "the model. Rules are judged on prescriptions in recorded states."
        )
    rest = (
        "± is half a 95% interval over patients: it holds neither the choice of seeds nor that "
        "of the best offline method on the same patients. Adherence alone proves nothing: the "
        "highest dose of everything adheres. `less offline` is the difference from "
        f"{manifest['best_offline']}, the best offline method; `under` and `over` add up to "
        "`unsafe`; all after `less offline` are percent."
    )
    if manifest["best"]:
        rest += (
            f" `gap` is the share of the way from the {manifest['baseline']} to "
            f"{manifest['best']}, the best policy found with access to the truth."
        )
    return (start, rest)


def plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with None for what is undefined."""
    return [
        {name: None if value != value else value for name, value in row.items()}
        for row in table.astype(object).to_dict("records")
    ]


def cells(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """Rows of `COLUMNS` as text."""
    return [
        (
            row["policy"],
            _ranged(row, "value", "high"),
            _ranged(row, "less_clinician", "less_clinician_high"),
            _ranged(row, "less_best_offline", "less_best_offline_high"),
            _number(row["gap_closed"], 0),
            _number(row["mortality"]),
            _number(row["adherence"]),
            *(_number(row[name]) for name in ("unsafe", "underdosing", "overdosing")),
        )
        for row in plain(table)
    ]


def markdown(table: pd.DataFrame) -> str:
    """The table for documents."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells(table))])


def _ranged(row: dict[str, Any], name: str, high: str) -> str:
    return "-" if row[name] is None else f"{row[name]:.2f} ± {row[high] - row[name]:.2f}"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
