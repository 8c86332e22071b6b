"""`sepsis-jax cohort` and `sepsis-jax audit`: episodes are made, and checked for leakage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import (
    DISCLAIMER,
    Config,
    Episodes,
    Json,
    OtherSeed,
    Out,
    Seed,
    Setting,
    console,
    finite,
    phases,
    print_json,
    print_table,
    with_seed,
)
from sepsis_jax.runs import claimed
from worldmodel.configuration import LARGEST

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
            "--set",
            "--option",
            "-o",
            help="A setting as NAME=VALUE, such as -o step_hours=2 "
            "-o vasopressor_factors=ai-clinician; docs/cohort.md lists them.",
        ),
    ] = None,
    config: Config = None,
    seed: OtherSeed = None,
    json: Json = False,
) -> None:
    """Sepsis-3 stays of MIMIC-IV (2.2 to 3.1) as episodes of 4-hour steps."""
    from sepsis_jax.cohort import CohortOptions, build_cohort
    from worldmodel.configuration import resolve_config

    overrides = [*(option or []), *([f"seed={seed}"] if seed is not None else [])]
    options = resolve_config(CohortOptions, config, overrides, source="--option")
    with claimed(out), phases("cohort") as progress:
        report = build_cohort(data, out, options, progress)
    print_table(
        "Who is in the cohort",
        ("step", "excluded", "remaining"),
        [(line["reason"], line["excluded"], line["remaining"]) for line in report.consort],
    )
    console.print(f"{report.stays} stays, {report.rows} steps of {options.step_hours} h in {out}")
    for note in report.notes:
        console.print(note)
    if json:
        print_json({"out": str(out), "stays": report.stays, "rows": report.rows,
                    "consort": report.consort, "notes": report.notes})  # fmt: skip


@app.command(
    "synthetic",
    epilog="Example: sepsis-jax cohort synthetic --patients 20000 --out runs/synthetic",
)
def synthetic(
    out: Out,
    patients: Annotated[
        int, typer.Option("--patients", min=1, max=LARGEST, help="Number of stays.")
    ] = 2000,
    confounding: Annotated[
        float,
        typer.Option(
            "--confounding",
            callback=finite,
            help="How much the clinician acts on a severity that is not recorded; 0 is none.",
        ),
    ] = 0.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Patients of the synthetic world, treated by its clinician, with known probabilities."""
    from sepsis_jax.pipelines.episodes import make_synthetic_cohort

    with claimed(out), phases("synthetic patients") as progress:
        summary = make_synthetic_cohort(
            out, patients=patients, confounding=confounding, seed=seed, progress=progress
        )
    print_table("Synthetic cohort", ("what", "value"), list(summary.items()))
    console.print(f"written to {out}")
    if json:
        print_json({"out": str(out), **summary})


@app.command("check", epilog="Example: sepsis-jax cohort check --table own.parquet")
def check(
    table: Annotated[
        Path,
        typer.Option("--table", help="A .parquet or .csv file with one row per stay and step."),
    ],
    json: Json = False,
) -> None:
    """Name every problem of a table of episodes; docs/cohort.md describes its columns."""
    import pandas as pd

    from worldmodel.episode_files import table_problems
    from worldmodel.errors import InputError

    read = {".parquet": pd.read_parquet, ".csv": pd.read_csv}.get(table.suffix)
    if read is None:
        raise InputError(f"{table}: neither .parquet nor .csv; give a file of either kind")
    try:
        rows = read(table)
    except (OSError, ValueError) as error:
        raise InputError(f"{table}: unreadable ({error}); write it again") from None
    problems = table_problems(rows, source=str(table))
    for problem in problems:
        console.print(problem)
    console.print(f"{len(rows)} rows, {len(problems)} problems")
    if json:
        print_json({"rows": len(rows), "problems": problems})
    if problems:
        raise typer.Exit(2)


def audit(
    episodes: Episodes,
    out: Out,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="World model to check by simulation as well."),
    ] = None,
    config: Config = None,
    setting: Setting = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with status 1 if a check fails.")
    ] = False,
    seed: OtherSeed = None,
    json: Json = False,
) -> None:
    """Check episodes for leakage of treatments and outcomes, and a world model by simulation."""
    from sepsis_jax.pipelines.audit import AuditConfig, run_audit
    from sepsis_jax.pipelines.verdicts import (
        AUDIT_COLUMNS,
        FAIL,
        check_rows,
        summary_line,
        table_rows,
    )
    from worldmodel.configuration import resolve_config

    options = with_seed(resolve_config(AuditConfig, config, setting, source="--set"), seed)
    with claimed(out), phases("audit") as progress:
        checks = run_audit(episodes, out, model=model, config=options, progress=progress)
    print_table("Audit", AUDIT_COLUMNS, table_rows(checks))
    console.print(f"{summary_line(checks)}.")
    console.print(f"{out / 'report.html'}, audit.csv, .json.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "checks": check_rows(checks)})
    if strict and any(check.verdict == FAIL for check in checks):
        raise typer.Exit(1)
