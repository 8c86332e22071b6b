"""Runs that folders hold: what made them, and how two of them differ in settings and figures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pandas as pd

from sepsis_jax.runs import MANIFEST, JsonDict
from worldmodel.errors import InputError
from worldmodel.files import read_json

_FIGURES = ("metrics", "summary")  # what manifests hold of results; metrics are in a file as well
_DEEPEST = 6  # folders within folders that are searched


def find_runs(folder: Path) -> pd.DataFrame:
    """Runs in a folder and below it, by path.

    Args:
      folder: where runs were written, such as `runs`.

    Returns:
      A row per run: `run` (its folder), `command`, `revision` (8 digits, "+" where files
      differed), `jax`, `mb` (size with all that lies in it) and `changed` (local time).

    Raises:
      InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that holds runs")
    rows = []
    for place in sorted(_folders(folder)):
        record = _record(place)
        if record is not None and "command" in record:
            revision = str(record.get("revision") or "-")
            file = place / MANIFEST
            rows.append(
                {
                    "run": str(place),
                    "command": str(record["command"]),
                    "revision": revision[:8] + ("+" if revision.endswith("+") else ""),
                    "jax": str((record.get("versions") or {}).get("jax", "-")),
                    "mb": round(_size(place) / 1e6, 1),
                    "changed": f"{datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d %H:%M}",
                }
            )
    return pd.DataFrame(rows, columns=["run", "command", "revision", "jax", "mb", "changed"])


def compare_runs(first: Path, second: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Settings and figures in which two runs differ.

    Settings are what the manifests hold, the command included. Figures are the numbers of all
    tables (.csv) and all other .json files that both folders hold at their top, by the table's
    columns of text; and a manifest's summary.

    Args:
      first, second: folders of runs, as any command writes them.

    Returns:
      Two tables with the columns `name`, `first`, `second`, the one of figures with `difference`
      as well. What only one run has is None in the other.

    Raises:
      InputError: a folder holds no run.
    """
    records = []
    for folder in (first, second):
        record = _record(folder)
        if record is None:
            raise InputError(f"{folder}: holds no run (no {MANIFEST}); name a folder of one")
        records.append(dict(_flat({k: v for k, v in record.items() if k not in _FIGURES})))
    names = list(dict.fromkeys([*records[0], *records[1]]))
    settings = pd.DataFrame(
        [
            {"name": name, "first": records[0].get(name), "second": records[1].get(name)}
            for name in names
            if records[0].get(name) != records[1].get(name)
        ],
        columns=["name", "first", "second"],
    )
    figures = pd.concat(
        [numbers(folder) for folder in (first, second)], axis=1, keys=["first", "second"]
    )
    different = figures[~figures["first"].eq(figures["second"]) & figures.notna().any(axis=1)]
    told = different.rename_axis("name").reset_index()
    return settings, told.assign(difference=told["second"] - told["first"])


def numbers(folder: Path) -> pd.Series:
    """Every number of the tables and .json files at the top of a run, by a name for each.

    A table's row is named by its columns of text, by its place if there are none.
    """
    found: dict[str, float] = {}
    held: dict[str, object] = {"summary": (_record(folder) or {}).get("summary", {})}
    for file in sorted(folder.glob("*.json")):
        if file.name != MANIFEST:
            held[file.stem] = _read(file)
    for name, value in _flat(held):
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    for file in sorted(folder.glob("*.csv")):
        for name, number in table_numbers(pd.read_csv(file)).items():
            found[f"{file.stem}: {name}"] = number
    return pd.Series(found, dtype=float)


def table_numbers(table: pd.DataFrame) -> dict[str, float]:
    """The numbers of a table by its row's words and the column's name."""
    words = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    found = {}
    for place, row in enumerate(table.to_dict("records")):
        label = ", ".join(str(row[name]) for name in words) if words else f"row {place}"
        for column in table:
            if column not in words and pd.notna(row[column]):
                found[f"{label}, {column}"] = float(row[column])
    return found


def _folders(folder: Path) -> Iterator[Path]:
    for place, inner, _ in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        inner[:] = [] if depth >= _DEEPEST else [n for n in inner if not n.startswith(".")]
        yield Path(place)


def _record(folder: Path) -> JsonDict | None:
    """What is kept of how a run was made; None where there is nothing of the kind."""
    found = _read(folder / MANIFEST)
    return found if isinstance(found, dict) else None


def _read(file: Path) -> object:
    try:
        found: object = read_json(file)
    except InputError:  # absent, or another program's
        return None
    return found


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{place}")
    else:
        yield name, value
