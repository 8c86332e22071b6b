"""`sepsis-jax evaluate`: the tables of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import (
    DISCLAIMER,
    Config,
    Json,
    Out,
    Setting,
    console,
    phases,
    print_json,
    print_table,
)
from sepsis_jax.runs import claimed


def evaluate(
    episodes: Annotated[
        Path, typer.Option("--episodes", help="Recorded stays, as `sepsis-jax cohort` writes them.")
    ],
    out: Out,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="As for `sepsis-jax ope`: a built-in name, NAME=FOLDER of a trained policy or of "
            "an agent's run in recorded states, NAME=FILE of probabilities; repeat. The clinician "
            "is always there.",
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="World model, for the first table.")
    ] = None,
    behavior: Annotated[
        str,
        typer.Option("--behavior", help="Clinician's probabilities, as for `sepsis-jax ope`."),
    ] = "recorded",
    treated: Annotated[
        list[str] | None,
        typer.Option(
            "--treated",
            help="NAME=FOLDER of an `agent run` over synthetic patients: the true value of an "
            "agent; repeat.",
        ),
    ] = None,
    stages: Annotated[
        Path | None,
        typer.Option("--stages", help="Folder of `sepsis-jax policy stages`, for the last table."),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(
            "--audit",
            help="Folder of `sepsis-jax audit`, whose verdicts are shown; those of the episodes "
            "alone if not given.",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", help="published: the figures of the paper beside ours."),
    ] = None,
    config: Config = None,
    setting: Setting = None,
    json: Json = False,
) -> None:
    """World model, policies and stages of training: every table of the paper, and a report."""
    from sepsis_jax.pipelines.evaluation import EvaluationOptions, evaluate_all
    from sepsis_jax.report.evaluation import SHORT, TITLES, cells
    from sepsis_jax.report.ope import records
    from worldmodel.configuration import resolve_config
    from worldmodel.errors import InputError

    if compare not in (None, "published"):
        raise InputError(f"--compare: got {compare!r}, expected published")
    options = resolve_config(EvaluationOptions, config, setting, source="--set")
    with claimed(out), phases("evaluation") as progress:
        tables = evaluate_all(
            episodes,
            out,
            policy or [],
            model=model,
            behavior=behavior,
            treated=treated or [],
            stages=stages,
            audit=audit,
            published=compare is not None,
            options=options,
            progress=progress,
        )
    found = {name: table for name, table in tables._asdict().items() if table is not None}
    for name, table in found.items():
        shown = table
        if name == "world_model":  # errors some steps ahead are in the report
            shown = table[~table["metric"].str.endswith("ahead")]
        print_table(TITLES[name], *cells(name, shown, SHORT.get(name)))
    ranks = tables.policies.attrs.get("rank_correlation")
    if ranks:
        listed = ", ".join(f"{name} {x:.2f}" for name, x in ranks.items() if x is not None)
        console.print(f"rank correlation with the true values: {listed or 'too few policies'}")
    console.print(f"{out / 'report.html'}, and each table as .csv, .tex, .json.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), **{name: records(table) for name, table in found.items()}})
