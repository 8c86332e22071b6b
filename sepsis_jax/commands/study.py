"""`sepsis-jax study CONFIG`, `study diff`: everything in one folder, and two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sepsis_jax.console import (
    DISCLAIMER,
    Json,
    Setting,
    console,
    phases,
    print_json,
    print_table,
    resumable,
)
from sepsis_jax.runs import claimed


class _RunByDefault(TyperGroup):
    """`study CONFIG` is `study run CONFIG`."""

    default_command = "run"

    def resolve_command(
        self,
        ctx: Any,  # of the click that Typer brings along
        args: list[str],
    ) -> Any:
        if args and args[0] not in self.commands:
            args = [self.default_command, *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="Cohort, audit, world model, policies, language model and all tables in one folder: "
    "`sepsis-jax study CONFIG`.",
)


@app.command(
    "run",
    epilog="Example: sepsis-jax study configs/demo.yaml --out runs/study",
)
def run(
    config: Annotated[Path, typer.Argument(help="YAML of settings, such as configs/demo.yaml.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write; runs/ and the name of CONFIG if not given."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what is done, goes on, and is to run.")
    ] = False,
    setting: Setting = None,
    json: Json = False,
) -> None:
    """Run what is not done of a study; the same command goes on where it was stopped."""
    from sepsis_jax.pipelines.study import StudyOptions, run_study, study_plan
    from sepsis_jax.report.evaluation import SHORT
    from sepsis_jax.report.ope import records
    from sepsis_jax.report.words import column
    from worldmodel.configuration import resolve_config

    options = resolve_config(StudyOptions, config, setting, source="--set")
    out = out or Path("runs") / config.stem
    planned = study_plan(out, options)
    rows = [
        (seed, name, state) for seed, stages in planned.items() for name, state in stages.items()
    ]
    if dry_run:
        print_table("Stages of the study", ("seed", "stage", "state"), rows)
        if json:
            print_json({"out": str(out), "stages": planned})
        return
    goes_on = "the same command goes on where it was stopped"
    with resumable(goes_on), claimed(out), phases("study") as progress:
        table = run_study(out, options, progress)
    shown = [name for name in SHORT["policies"] if name in table]
    print_table(
        f"Policies, mean over {len(options.seeds)} seed(s)",
        ("policy", *map(column, shown)),
        [tuple(row[name] for name in ("policy", *shown)) for row in records(table)],
    )
    first = out / f"seed-{options.seeds[0]}" / "evaluation" / "report.html"
    console.print(f"{first}; over seeds: {out / 'report.html'}.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "policies": records(table)})


@app.command("diff", epilog="Example: sepsis-jax study diff runs/study runs/other")
def diff(
    first: Annotated[Path, typer.Argument(help="Folder of a study.")],
    second: Annotated[Path, typer.Argument(help="Folder of another.")],
    json: Json = False,
) -> None:
    """Show the numbers of two studies side by side."""
    from sepsis_jax.pipelines.study import compare_studies
    from sepsis_jax.report.evaluation import TITLES
    from sepsis_jax.report.ope import records

    found = compare_studies(first, second)
    for name, table in found.items():
        changed = table[table["difference"].abs() > 0]
        print_table(
            f"{TITLES[name]}: {len(changed)} of {len(table)} numbers differ",
            tuple(changed.columns),
            [tuple(row.values()) for row in records(changed)],
        )
    if json:
        print_json({name: records(table) for name, table in found.items()})
