"""Policies learned from the stays that judge them: what estimators promise, and what is true.

    python scripts/bench_gumbel_max.py --json benchmarks/gumbel_max.json

The gumbel-max simulator hides diabetes and glucose, as in Oberst & Sontag (2019); other settings
hide less, know the clinician, or keep nearer to the clinician. Prints two Markdown tables and a
last line of JSON. Columns and settings: docs/ope.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sepsis_jax.benchmark.hardware import hardware
from sepsis_jax.ope.learned_policies import MODEL, SETTINGS, Setting, judge
from sepsis_jax.runs import JsonDict
from worldmodel.files import write_json

SHOWN = {"wis": "WIS", "dr": "DR", "wdr": "WDR", "dm": "DM", MODEL: "model"}


class Cell(NamedTuple):
    """A setting, a data set, and a row per estimator."""

    setting: Setting
    seed: int
    table: pd.DataFrame


def main() -> None:
    """Judges every setting with every seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--seeds", type=int, default=5, help="data sets per setting")
    arguments = parser.parse_args()
    begin, cells = time.perf_counter(), []
    for setting in SETTINGS:
        for seed in range(arguments.seeds):
            cells.append(Cell(setting, seed, judge(setting, seed)))
            print(f"{len(cells)}/{len(SETTINGS) * arguments.seeds} {_name(setting)}", flush=True)
    print(_by_seed(cells[: arguments.seeds]))
    print(_by_setting(cells, arguments.seeds))
    result = {
        "command": "python scripts/bench_gumbel_max.py", "seeds": arguments.seeds,
        "hardware": hardware(), "seconds": time.perf_counter() - begin,
        "cells": [_kept(cell) for cell in cells],
    }  # fmt: skip
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps({name: result[name] for name in ("command", "seeds", "seconds")}))


def _kept(cell: Cell) -> JsonDict:
    table = cell.table.set_index("estimator")
    wis = table.loc["wis"]
    return {
        **asdict(cell.setting), "seed": cell.seed, "true_value": round(float(wis["truth"]), 4),
        **{name: round(float(wis[name]), 3) for name in ("ess", "expected_ess", "habit")},
        "estimates": {
            name: " ".join(f"{table.loc[name, x]:.4g}" for x in ("estimate", "low", "high"))
            for name in SHOWN
        },
        "trusted": _trusted(table), "against_wis": wis["reason"],
    }  # fmt: skip


def _name(setting: Setting) -> str:
    hidden = " and ".join(setting.hidden) or "nothing"
    judged = "other stays" if setting.held_out else "the same stays"
    return f"{setting.stays} | {hidden} | {setting.clinician} | {setting.policy} | {judged}"


def _by_seed(cells: list[Cell]) -> str:
    lines = [f"| seed | true value | {' | '.join(SHOWN.values())} | trusted |"]
    lines.append("| --- " * (len(SHOWN) + 3) + "|")
    for cell in cells:
        table = cell.table.set_index("estimator")
        values = [_estimate(table.loc[name]) for name in SHOWN]
        row = [cell.seed, f"{table['truth'].iloc[0]:.2f}", *values, _trusted(table)]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def _estimate(row: pd.Series) -> str:
    interval = "" if pd.isna(row["low"]) else f" ({row['low']:.2f}, {row['high']:.2f})"
    return f"{row['estimate']:.2f}{interval}"


def _trusted(table: pd.DataFrame) -> str:
    return f"{int(table['trust'].sum())} of {len(table)}"


def _by_setting(cells: list[Cell], seeds: int) -> str:
    lines = ["| stays | hidden | clinician | policy | judged by | true value | "
             f"{' | '.join(SHOWN.values())} | WIS covers | ESS | habit | trusted |"]  # fmt: skip
    lines.append("| --- " * (len(SHOWN) + 10) + "|")
    for first in range(0, len(cells), seeds):
        group = cells[first : first + seeds]
        table = pd.concat([cell.table for cell in group])
        means = table.groupby("estimator")[["estimate", "truth", "ess", "habit"]].mean()
        wis = table[table["estimator"] == "wis"]
        covers = int(((wis["low"] <= wis["truth"]) & (wis["truth"] <= wis["high"])).sum())
        values = [f"{means.loc[name, 'estimate']:.2f}" for name in SHOWN]
        line = [
            _name(group[0].setting), f"{means.loc['wis', 'truth']:.2f}", *values,
            f"{covers} of {seeds}", f"{means.loc['wis', 'ess']:.0f}",
            f"{means.loc['wis', 'habit']:.1f}", _trusted(table),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
