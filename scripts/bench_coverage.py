"""Coverage of trusted intervals of off-policy evaluation, over data sets whose truth is known.

    python scripts/bench_coverage.py --out runs/coverage --json benchmarks/ope_coverage.json
    python scripts/bench_coverage.py --out runs/quick --world icu_sepsis --clinician true \
        --stays 300 --data-sets 50

Every cell is a world, a clinician (true probabilities, or fitted to the same stays by
cross-fitting) and a number of stays; six policies lie at three distances from the clinician. Where
the verdict is "yes", intervals of the value and of the difference should cover 92 to 97% of the
time. Finished parts in --out are kept: the same command goes on where it was stopped. Columns and
conventions: docs/ope.md. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from sepsis_jax.benchmark.hardware import hardware
from sepsis_jax.ope.coverage import run, score
from sepsis_jax.ope.coverage_worlds import CLINICIANS, WORLDS, Cell, Truth, truth
from sepsis_jax.ope.diagnostics import Limits
from sepsis_jax.runs import run_folder
from worldmodel.files import atomic_file, read_json, write_json

KIND = "ope coverage"
AT_ONCE = 25  # data sets of a part: what is lost when the run is stopped


def main() -> None:
    """Runs what is missing, and scores all that is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of finished parts")
    parser.add_argument("--json", type=Path, help="file for the scores")
    parser.add_argument("--world", nargs="+", choices=WORLDS, default=["icu_sepsis", "synthetic"])
    parser.add_argument("--clinician", nargs="+", choices=CLINICIANS, default=list(CLINICIANS))
    parser.add_argument("--stays", nargs="+", type=int, default=[300, 725, 2000])
    parser.add_argument("--distances", nargs="+", type=float, default=[0.05, 0.1, 0.3])
    parser.add_argument(
        "--dial", nargs="+", type=float, default=[0.0],
        help="of confounding in the synthetic world; above 0 the gumbel-max simulator hides "
        "diabetes and glucose; ICU-Sepsis has none",
    )  # fmt: skip
    parser.add_argument("--data-sets", type=int, default=500, help="per cell")
    parser.add_argument("--truth-patients", type=int, default=100_000, help="synthetic world")
    parser.add_argument(
        "--effective", type=float, default=Limits.effective,
        help="least effective sample size that is trusted",
    )  # fmt: skip
    parser.add_argument(
        "--confounding-limit", type=float, default=Limits.confounding,
        help="least Gamma that a trusted conclusion withstands",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    distances = tuple(arguments.distances)
    request = {
        "distances": list(distances), "truth_patients": arguments.truth_patients,
        "seed": arguments.seed,
    }  # fmt: skip
    cells = [
        Cell(world, clinician, stays, dial)
        for world in arguments.world
        for dial in ([0.0] if world == "icu_sepsis" else arguments.dial)
        for clinician in arguments.clinician
        for stays in arguments.stays
    ]
    parts = [
        (cell, first, min(AT_ONCE, arguments.data_sets - first))
        for cell in cells
        for first in range(0, arguments.data_sets, AT_ONCE)
    ]
    files = {f"{_name(*part)}.parquet": part for part in parts}
    runs, begin = [], time.perf_counter()
    with run_folder(arguments.out, KIND, request, resume=True, keeps=tuple(files)):
        for number, (name, (cell, first, count)) in enumerate(files.items()):
            file = arguments.out / name
            if not file.exists():
                values = known(arguments.out, cell, distances, arguments)
                found = run(cell, first, count, values, distances=distances, seed=arguments.seed)
                with atomic_file(file) as temporary:
                    found.assign(**asdict(cell)).to_parquet(temporary, index=False)
            runs.append(pd.read_parquet(file))
            seconds = time.perf_counter() - begin
            print(f"{number + 1}/{len(parts)} {file.stem}, {seconds:.0f} s", flush=True)
    limits = Limits(effective=arguments.effective, confounding=arguments.confounding_limit)
    scores = score(pd.concat(runs, ignore_index=True), limits)
    pd.set_option("display.width", 200)
    print(scores.drop(columns=["dial", "against"]).round(3).to_string(index=False))
    result = {
        "command": "python scripts/bench_coverage.py", "data_sets": arguments.data_sets, **request,
        "limits": asdict(limits),
        "hardware": hardware(), "seconds": time.perf_counter() - begin,
        "cells": json.loads(scores.to_json(orient="records")),
    }  # fmt: skip
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))


def _name(cell: Cell, first: int, count: int) -> str:
    return f"{cell.world}_{cell.clinician}_{cell.dial:g}_{cell.stays}_{first}_{count}"


def known(
    out: Path, cell: Cell, distances: tuple[float, ...], arguments: argparse.Namespace
) -> Truth:
    """True values, simulated once per world and dial."""
    file = out / f"truth_{cell.world}_{cell.dial:g}.json"
    if not file.exists():
        values = truth(cell, distances, patients=arguments.truth_patients, seed=arguments.seed)
        write_json(file, values._asdict())
    return Truth(**read_json(file))


if __name__ == "__main__":
    main()
