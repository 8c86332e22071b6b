"""`sepsis-jax cohort`: episodes from records, or from the synthetic world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import Config, Json, Out, Seed, console, phases, print_json, print_table

app = typer.Typer(
    help="Make episodes from MIMIC-IV or from the synthetic world.", no_args_is_help=True
)


@app.command(
    "mimic-iv",
    epilog="Example: sepsis-jax cohort mimic-iv --data mimic-iv-3.1 --out runs/cohort",
)
def mimic_iv(
    data: Annotated[
        Path,
        typer.Option("--data", help="MIMIC-IV: a folder with hosp/ and icu/, or a DuckDB file."),
    ],
    out: Out,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            help="A cohort option as NAME=VALUE, such as -o step_hours=2 "
            "-o vasopressor_factors=ai-clinician; docs/cohort.md lists them.",
        ),
    ] = None,
    config: Config = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the split.")] = None,
    json: Json = False,
) -> None:
    """Sepsis-3 stays of MIMIC-IV (2.2 to 3.1) as episodes of 4-hour steps."""
    from sepsis_jax.cohort import CohortOptions, build_cohort
    from worldmodel.configuration import resolve_config

    overrides = [*(option or []), *([f"seed={seed}"] if seed is not None else [])]
    options = resolve_config(CohortOptions, config, overrides, source="--option")
    with phases("cohort") as progress:
        report = build_cohort(data, out, options, progress)
    print_table(
        "Who is in the cohort",
        ("step", "excluded", "remaining"),
        [(line["reason"], line["excluded"], line["remaining"]) for line in report.consort],
    )
    console.print(f"{report.stays} stays, {report.rows} steps of {options.step_hours} h in {out}")
    if json:
        print_json({"out": str(out), "stays": report.stays, "rows": report.rows,
                    "consort": report.consort})  # fmt: skip


@app.command(
    "synthetic",
    epilog="Example: sepsis-jax cohort synthetic --patients 20000 --out runs/synthetic",
)
def synthetic(
    out: Out,
    patients: Annotated[int, typer.Option("--patients", help="Number of stays.")] = 2000,
    confounding: Annotated[
        float,
        typer.Option(
            "--confounding",
            help="How much the clinician acts on a severity that is not recorded; 0 is none.",
        ),
    ] = 0.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Patients of the synthetic world, treated by its clinician, with known probabilities."""
    from sepsis_jax.pipelines.episodes import make_synthetic_cohort

    with phases("synthetic patients") as progress:
        summary = make_synthetic_cohort(
            out, patients=patients, confounding=confounding, seed=seed, progress=progress
        )
    print_table("Synthetic cohort", ("what", "value"), list(summary.items()))
    console.print(f"written to {out}")
    if json:
        print_json({"out": str(out), **summary})
