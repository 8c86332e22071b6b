"""`sepsis-jax`: the command line, and its first command, `sepsis-jax demo`."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.commands import agent, bench, cohort, ope, policy, simulate, world_model
from sepsis_jax.console import (
    DISCLAIMER,
    Json,
    Seed,
    console,
    epochs,
    errors,
    print_json,
    print_table,
)
from worldmodel.errors import InputError

app = typer.Typer(
    name="sepsis-jax",
    help=f"Learn and audit sepsis treatment in simulation. {DISCLAIMER}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sepsis-jax {version('sepsis-jax')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version"),
    ] = False,
) -> None:
    """Options of `sepsis-jax` itself."""
    del show_version


@app.command("demo", epilog="Example: sepsis-jax demo --out runs/demo")
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
        world_model.show_futures(summary["futures"], summary["plans"])
    console.print(f"audit: {summary['audit']}")
    console.print(f"{summary['branch_steps_per_second']:,.0f} branch-steps per second")
    console.print(f"report: {out / 'report.html'}")
    if json:
        print_json(summary)


app.add_typer(cohort.app, name="cohort")
app.command(
    "audit",
    epilog="Example: sepsis-jax audit --episodes runs/synthetic --model runs/model "
    "--out runs/audit",
)(cohort.audit)
app.add_typer(world_model.app, name="world-model")
app.add_typer(policy.app, name="policy")
app.add_typer(agent.app, name="agent")
app.add_typer(ope.app, name="ope")
app.command(
    "simulate",
    epilog="Example: sepsis-jax simulate --model runs/model --episodes runs/synthetic "
    "--plan 'early=3,2;1,1' --plan 'rest=0,0' --out runs/futures",
)(simulate.simulate)
app.command(
    "sweep",
    epilog="Example: sepsis-jax sweep --model runs/model --episodes runs/synthetic "
    "--plan constant --policy guideline --steps 0,2,4 --out runs/sweep",
)(simulate.sweep)
app.command("bench", epilog="Example: sepsis-jax bench --model runs/model --out runs/bench")(
    bench.bench
)
app.command("profile", epilog="Example: sepsis-jax profile --model runs/model --out runs/profile")(
    bench.profile
)


# What to add to a message of the library, which names settings, for readers of the command line.
_FLAGS = {
    "resume it,": "resume it (--resume),",
    "only synthetic patients have a truth": "only synthetic patients have a truth (--no-truth)",
    "give `behavior` as a table": "give --behavior as a table",
}


def _with_flags(message: str) -> str:
    """The message with the command line's own options."""
    for words, flagged in _FLAGS.items():
        message = message.replace(words, flagged)
    return message


def main() -> None:
    """Entry point: bad input ends with one line and status 2."""
    try:
        app()
    except InputError as error:
        line = " ".join(str(error).split())  # what libraries say may take several lines
        errors.print(f"sepsis-jax: {_with_flags(line)}", soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        errors.print(f"sepsis-jax: {error.filename}: {error.strerror}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("sepsis-jax: interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
