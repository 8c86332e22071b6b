"""`sepsis-jax runs list` and `runs diff`: what folders hold, and how two runs differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import Json, console, print_json, print_table

app = typer.Typer(help="List runs, and compare the settings and figures of two.")


@app.command("list", epilog="Example: sepsis-jax runs list runs")
def list_runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where to look, and below it.")
    ] = Path("runs"),
    json: Json = False,
) -> None:
    """Runs in a folder and below it: what made them, when, and how large they are."""
    from sepsis_jax.pipelines.run_comparison import find_runs

    found = find_runs(folder)
    shown = found.assign(
        run=[str(Path(run).relative_to(folder)) for run in found["run"]],
        made_by=found["command"].map(_short),
    )
    columns = ("run", "made_by", "revision", "mb", "changed")
    rows = shown[list(columns)].itertuples(index=False, name=None)
    print_table(f"{len(found)} runs in {folder}", ("run", "made by", *columns[2:]), rows)
    if json:
        print_json({"runs": found.to_dict("records")})


def _short(command: str) -> str:
    """The command's words without the program's name and its options."""
    words = command.split()[1:]
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return " ".join(words[:first])


@app.command("diff", epilog="Example: sepsis-jax runs diff runs/demo/model runs/model")
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.")],
    json: Json = False,
) -> None:
    """Settings and figures in which two runs differ; what is equal is left out."""
    from sepsis_jax.pipelines.run_comparison import compare_runs
    from sepsis_jax.report.ope import records

    settings, figures = compare_runs(first, second)
    for title, table in (("Settings", settings), ("Figures", figures)):
        if table.empty:
            console.print(f"{title}: no difference")
            continue
        rows = [tuple(row.values()) for row in records(table)]
        print_table(f"{title}: {len(table)} differ", tuple(table.columns), rows)
    if json:
        print_json({"settings": records(settings), "figures": records(figures)})
