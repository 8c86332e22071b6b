"""`sepsis-jax demo`: cohort, world model, futures and report, small."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import DISCLAIMER, Json, Seed, console, epochs, print_json, print_table


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("runs/demo"),
    data: Annotated[
        Path | None,
        typer.Option("--data", help="MIMIC-IV (hosp/ and icu/); default: synthetic patients."),
    ] = None,
    patients: Annotated[int, typer.Option("--patients", help="Synthetic patients.")] = 4000,
    samples: Annotated[int, typer.Option("--samples", help="Futures per plan.")] = 2000,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Cohort, world model, counterfactual futures and a one-page report, in minutes."""
    from sepsis_jax.commands.world_model import show_futures
    from sepsis_jax.pipelines.demo import run_demo
    from sepsis_jax.report.html import OUTCOME_COLUMNS, STATE_COLUMNS, outcome_rows, state_rows

    console.print(f"sepsis-jax demo.  {DISCLAIMER}")
    with epochs("world model") as progress:
        summary = run_demo(
            out,
            data=data,
            patients=patients,
            samples=samples,
            seed=seed,
            say=console.print,
            training_progress=progress,
        )
    print_table("Next state, test split (z-scores)", STATE_COLUMNS, state_rows(summary))
    print_table("Death within 90 days", OUTCOME_COLUMNS, outcome_rows(summary))
    if "futures" in summary:
        show_futures(summary["futures"], summary["plans"])
    console.print(f"{summary['branch_steps_per_second']:,.0f} branch-steps per second")
    console.print(f"report: {out / 'report.html'}")
    if json:
        print_json(summary)
