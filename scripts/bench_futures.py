"""Truth benchmark of futures over sizes of the records, confounding and horizons.

    python scripts/bench_futures.py --out runs/futures --sizes 1000 4000 20000 \
        --confounding 0 0.5 1 --seeds 11 12 13 --held 1 6 12

Per size, confounding and seed: records of the synthetic world, a world model trained on them,
effects of held treatments on fresh patients beside the truth and linear baselines, and values of
policies. What is finished is kept, so the same command goes on where it was stopped. Writes
OUT/summary.csv.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pandas as pd

from worldmodel.schema import STEP_HOURS

_POLICIES = ("none", "random", "max", "clinician", "guideline", "titration")
_FRESH = 5000  # added to the seed of the records for that of the fresh patients


def command(folder: Path, marker: str, *arguments: str | Path | float) -> float | None:
    """Runs `sepsis-jax` unless its folder is finished; the seconds it took, or None."""
    if (folder / marker).exists():
        return None
    begin = time.monotonic()
    line = [sys.executable, "-m", "sepsis_jax", *map(str, arguments), "--out", str(folder)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def benchmark(
    out: Path, size: int, confounding: float, seed: int, options: argparse.Namespace
) -> list[dict[str, object]]:
    """One row per held time of one world."""
    folder = out / f"{size}-{confounding:g}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    records, model = folder / "records", folder / "model"
    world = ("--confounding", confounding)
    command(
        records, "manifest.json", "cohort", "synthetic", "--patients", size, "--seed", seed, *world
    )
    train = ("world-model", "train", "--episodes", records)
    given = [part for text in (f"seed={seed}", *options.setting) for part in ("--set", text)]
    seconds = command(model, "manifest.json", *train, *given)
    if seconds is not None:
        (folder / "seconds.json").write_text(json.dumps({"training": seconds}))
    fresh = ("--patients", options.patients, "--seed", _FRESH + seed, *world)
    rows: list[dict[str, object]] = []
    for held in options.held:
        effects = folder / f"effects{held}"
        asked = ("world-model", "effects", "--model", model, "--records", records, "--held", held)
        command(effects, "metrics.json", *asked, *fresh)
        metrics = json.loads((effects / "metrics.json").read_text())
        metrics["fresh_patients"] = metrics.pop("patients")
        row = {"patients": size, "confounding": confounding, "seed": seed}
        row |= {"hours": held * STEP_HOURS} | _flat(metrics)
        timing = folder / "seconds.json"  # not there where the script was stopped after training
        rows.append(row | (json.loads(timing.read_text()) if timing.exists() else {}))
    named = [part for name in (*_POLICIES, *options.policy) for part in ("--policy", name)]
    values = folder / "values"
    valued = ("world-model", "values", "--model", model, "--records", records)
    command(values, "metrics.json", *valued, *fresh, *named)
    found = json.loads((values / "metrics.json").read_text())
    return [row | {f"values_{name}": value for name, value in found.items()} for row in rows]


def _flat(metrics: dict[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}_{part}": one for part, one in value.items()}
        else:
            flat[name] = value
    return flat


def main() -> None:
    """Runs the grid and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 20000])
    parser.add_argument("--confounding", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--held", type=int, nargs="+", default=[1, 6, 12], help="steps of 4 h")
    parser.add_argument("--patients", type=int, default=1600, help="fresh patients")
    parser.add_argument("--policy", nargs="*", default=[], help="further policies, NAME=FOLDER")
    parser.add_argument("--set", dest="setting", nargs="*", default=[], help="of the training")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for size, confounding, seed in product(options.sizes, options.confounding, options.seeds):
        rows += benchmark(options.out, size, confounding, seed, options)
        table = pd.DataFrame(rows)
        table.to_csv(options.out / "summary.csv", index=False)
        shown = ["patients", "confounding", "seed", "hours", "mortality_spearman"]
        shown += ["mortality_error", "linear_mortality_spearman", "values_largest_error"]
        print(table[shown].tail(len(options.held)).round(3).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
