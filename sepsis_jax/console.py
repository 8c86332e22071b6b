"""What commands share: options, tables, progress, the closing line of JSON, one-line errors."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sepsis_jax.runs import JsonDict
from sepsis_jax.runs import Progress as PhaseProgress
from worldmodel.configuration import LARGEST, LARGEST_SEED

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OptionsT = TypeVar("OptionsT", bound="DataclassInstance")  # with a field `seed`

DISCLAIMER = "Research software. Not for clinical use."

_FILE_WIDTH = 110  # where the output is no terminal
LOG_EVERY = 30.0
"""Seconds between lines of progress where the output is no terminal."""

# Without markup: paths and plans may hold brackets.
console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
errors = Console(stderr=True, highlight=False, markup=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; numbers are aligned right and shown with up to four significant digits."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="")
    kept = [[format_value(value) for value in row] for row in rows]
    for i, column in enumerate(columns):
        numeric = all(_is_number(row[i]) for row in kept if row[i] != "-")
        justify: Literal["left", "right"] = "right" if numeric and kept else "left"
        table.add_column(column, justify=justify, no_wrap=i == 0)
    for row in kept:
        table.add_row(*row)
    console.print(table)


def format_value(value: object) -> str:
    """Text of a table cell; None is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def print_json(value: Mapping[str, object]) -> None:
    """What `--json` prints: one line of JSON, never wrapped or styled; NaN and infinity as null."""
    print(json.dumps(_finite(value), allow_nan=False), flush=True)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_plan(lines: Sequence[tuple[str, str]], json: bool) -> None:
    """What a dry run found, as a table and, if wanted, as JSON."""
    print_table("What it would take; nothing was written", ("what", "amount"), lines)
    if json:
        print_json(dict(lines))


def with_seed(options: OptionsT, seed: int | None) -> OptionsT:
    """Settings with the seed of the command line, where one is given."""
    return options if seed is None else replace(options, seed=seed)


@contextmanager
def resumable(how: str) -> Iterator[None]:
    """Says after Ctrl-C how the work of the block goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how) from None


class _Log:
    """Lines about a job whose output is no terminal, `LOG_EVERY` seconds apart."""

    def __init__(self) -> None:
        self.begun = self.said = time.monotonic()

    def line(self, what: str, share: float) -> None:
        """Prints a line if it is time for one; `share` of the work is done."""
        now = time.monotonic()
        if now - self.said >= LOG_EVERY:
            self.said = now
            spent = now - self.begun
            left = f", {spent * (1 - share) / share / 60:.0f} min left" if share > 0 else ""
            errors.print(f"{what}: {share:.0%}, {spent / 60:.0f} min{left}", soft_wrap=True)


@contextmanager
def phases(title: str) -> Iterator[PhaseProgress]:
    """A progress bar for jobs that name their phases: `update(phase, share done)`.

    Where the output is no terminal there is a line every `LOG_EVERY` seconds instead.
    """
    log = _Log()
    with _bar() as progress:
        task = progress.add_task(title, total=1.0)

        def update(phase: str, share: float) -> None:
            progress.update(task, description=f"{title}: {phase}", completed=share)
            if progress.disable:
                log.line(f"{title}: {phase}", share)

        yield update
        progress.update(task, description=title, completed=1.0)


@contextmanager
def epochs(title: str) -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
    """A progress bar per model for training: `update(model, epoch, epochs, metrics)`.

    Where the output is no terminal there is a line every `LOG_EVERY` seconds instead.
    """
    logs: dict[str, _Log] = {}
    with _bar() as progress:
        tasks: JsonDict = {}

        def update(name: str, epoch: int, total: int, metrics: dict[str, float]) -> None:
            if name not in tasks:
                tasks[name], logs[name] = progress.add_task(title, total=total), _Log()
            told = f"{title}: {name}, validation loss {metrics['validation_loss']:.4f}"
            progress.update(tasks[name], completed=epoch, description=told)
            if progress.disable:
                logs[name].line(told, epoch / total)

        yield update
        for task in tasks.values():
            progress.update(task, completed=progress.tasks[task].total)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,  # a log would get half a bar beside the error
    )


def _quiet(json: bool) -> bool:
    """Tables and remarks would stand beside the JSON."""
    console.quiet = json
    return json


def finite(value: float) -> float:
    """The value of an option, refused where it is no number or infinite."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"got {value}, expected a finite number")
    return value


Episodes = Annotated[
    Path, typer.Option("--episodes", help="Folder of episodes, as `sepsis-jax cohort` writes it.")
]
Model = Annotated[
    Path,
    typer.Option(
        "--model",
        help="World model: a folder that `sepsis-jax world-model train` wrote, or SepsisAgent's "
        "folder of .pt files.",
    ),
]
Config = Annotated[Path | None, typer.Option("--config", help="YAML of settings; see configs/.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of every random choice."),
]
OtherSeed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        max=LARGEST_SEED,
        help="Seed of every random choice, if not the settings'.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", min=1, max=LARGEST, help="Futures per plan.")]
Kernel = Annotated[
    str | None,
    typer.Option(
        "--kernel",
        help="Of the recurrent variant under plans: xla; pallas, one kernel of all steps; or auto "
        "(the default), pallas on a TPU where it fits.",
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-o", help="A setting as NAME=VALUE, such as -o seed=1; repeat for more."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only say what it would take: work, time, memory, disk."),
]
Json = Annotated[
    bool,
    typer.Option("--json", callback=_quiet, help="Print one line of JSON and nothing else."),
]
