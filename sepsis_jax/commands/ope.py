"""`sepsis-jax ope`: off-policy evaluation with intervals and diagnostics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import (
    DISCLAIMER,
    Config,
    Json,
    OtherSeed,
    Out,
    Setting,
    console,
    phases,
    print_json,
    print_table,
    with_seed,
)
from sepsis_jax.runs import claimed

app = typer.Typer(help="Off-policy evaluation with intervals, diagnostics and verdicts.")


@app.callback(
    invoke_without_command=True,
    epilog="Example: sepsis-jax ope --episodes runs/demo/cohort --behavior gru --policy clinician "
    "--policy guideline --out runs/ope",
)
def evaluate(
    context: typer.Context,
    episodes: Annotated[
        Path | None,
        typer.Option("--episodes", help="Folder of episodes, as `sepsis-jax cohort` writes it."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="NAME=FILE, a CSV or Parquet table with stay_id, step, action_0 ... action_24; "
            "NAME=FOLDER, a policy that `sepsis-jax policy train` wrote or an `agent run` with "
            "keep_to_record; or clinician, random, "
            "none, max, guideline, titration. Repeat for more.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write.")] = None,
    behavior: Annotated[
        str,
        typer.Option(
            "--behavior",
            help="Clinician's probabilities: recorded (in the episodes), a table, or a model to "
            "fit: logistic, mlp, gru, clusters, marginal.",
        ),
    ] = "recorded",
    model: Annotated[
        Path | None,
        typer.Option("--model", help="World model in which policies are simulated as well."),
    ] = None,
    config: Config = None,
    setting: Setting = None,
    seed: OtherSeed = None,
    json: Json = False,
) -> None:
    """Value policies on recorded stays: every estimator, intervals, diagnostics, a verdict."""
    if context.invoked_subcommand is not None:
        return
    from sepsis_jax.pipelines.ope import evaluate_policies
    from sepsis_jax.pipelines.ope_estimates import OPEOptions
    from sepsis_jax.report.ope import HEADLINES, records, trust_words
    from worldmodel.configuration import resolve_config
    from worldmodel.errors import InputError

    if episodes is None or out is None:
        raise InputError("ope: give --episodes, --policy and --out; see sepsis-jax ope --help")
    options = with_seed(resolve_config(OPEOptions, config, setting, source="--set"), seed)
    with claimed(out), phases("off-policy evaluation") as progress:
        table = evaluate_policies(
            episodes,
            out,
            policy or [],
            behavior=behavior,
            model=model,
            options=options,
            progress=progress,
        ).table
    rows = records(table)
    columns = ("policy", "estimator", "estimate", "low", "high", "difference", "ess")
    print_table(
        f"Value of {table['policy'].nunique()} policies, {table.attrs['stays']} stays, "
        f"{100 * table.attrs['level']:g}% intervals (all estimators: estimates.csv)",
        ("policy", "estimator", "value", "low", "high", "less clinician", "ESS", "trust"),
        [
            (*(row[name] for name in columns), trust_words(row))
            for row in rows
            if row["estimator"] in HEADLINES or options.estimators
        ],
    )
    for row in rows:
        if row["estimator"] == "wis" and not row["trust"]:
            console.print(f"{row['policy']}: do not trust: {row['reason']}")
    console.print(f"audit of the episodes: {table.attrs['audit']}")
    console.print(f"{out / 'report.html'}, estimates.csv, .json, .tex.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "stays": table.attrs["stays"], "rows": rows,
                    "audit": table.attrs["audit"]})  # fmt: skip


@app.command(
    "benchmark",
    epilog="Example: sepsis-jax ope benchmark --config configs/ope_benchmark.yaml "
    "--out runs/ope_benchmark",
)
def benchmark(
    out: Out,
    config: Config = None,
    setting: Setting = None,
    json: Json = False,
) -> None:
    """Compare every estimator with the truth: bias, RMSE, coverage, ranking, regret."""
    from sepsis_jax.ope.benchmark import BenchmarkOptions
    from sepsis_jax.pipelines.ope_benchmark import run_benchmark
    from worldmodel.configuration import resolve_config

    options = resolve_config(BenchmarkOptions, config, setting, source="--set")
    with claimed(out), phases("truth benchmark") as progress:
        scores = run_benchmark(out, options, progress=progress)
    names = ("bias", "rmse", "coverage", "rank_correlation", "regret_at_1")
    for world, rows in scores.groupby("world", sort=False):
        print_table(
            f"{world}: means over settings without confounding, coverage of 95% intervals, "
            "+- Monte Carlo error",
            ("estimator", *(name.replace("_", " ") for name in names)),
            [
                (row["estimator"], *(f"{row[n]:.3f} +- {row[f'{n}_se']:.3f}" for n in names))
                for row in rows.to_dict("records")
            ],
        )
    console.print(f"{out / 'report.html'}, scores.csv, runs.csv.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "scores": scores.to_dict("records")})
