"""`sepsis-jax`: the command line, and its first command, `sepsis-jax demo`."""

from __future__ import annotations

import _thread
import os
import re
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from sepsis_jax.commands import (
    agent,
    bench,
    cohort,
    ope,
    policy,
    runs,
    simulate,
    start,
    study,
    world_model,
)
from sepsis_jax.commands.evaluate import evaluate
from sepsis_jax.commands.explore import explore
from sepsis_jax.commands.mcp import EPILOG as MCP_EPILOG
from sepsis_jax.commands.mcp import mcp
from sepsis_jax.console import (
    DISCLAIMER,
    Json,
    Samples,
    Seed,
    console,
    epochs,
    errors,
    print_json,
    print_table,
)
from sepsis_jax.runs import claimed
from worldmodel.configuration import LARGEST
from worldmodel.errors import InputError

app = typer.Typer(
    name="sepsis-jax",
    help=f"Learn and audit sepsis treatment in simulation. {DISCLAIMER}",
    no_args_is_help=True,
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
    patients: Annotated[
        int, typer.Option("--patients", min=1, max=LARGEST, help="Synthetic patients.")
    ] = 4000,
    samples: Samples = 2000,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Cohort, world model, counterfactual futures and a one-page report, in minutes."""
    from sepsis_jax.pipelines.demo import run_demo
    from sepsis_jax.report.html import OUTCOME_COLUMNS, STATE_COLUMNS, outcome_rows, state_rows

    console.print(f"sepsis-jax demo.  {DISCLAIMER}")
    with claimed(out), epochs("world model") as progress:
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
    epilog="Example: sepsis-jax audit --episodes runs/demo/cohort --model runs/demo/model "
    "--out runs/audit",
)(cohort.audit)
app.add_typer(world_model.app, name="world-model")
app.add_typer(policy.app, name="policy")
app.add_typer(agent.app, name="agent")
app.add_typer(ope.app, name="ope")
app.command(
    "evaluate",
    epilog="Example: sepsis-jax evaluate --episodes runs/demo/cohort --model runs/demo/model "
    "--policy guideline --policy titration --out runs/evaluation --compare published",
)(evaluate)
app.add_typer(study.app, name="study")
app.add_typer(runs.app, name="runs")
app.command("init", epilog="Example: sepsis-jax init my-project")(start.init)
app.command("tiny-llm", epilog="Example: sepsis-jax tiny-llm --teach --out runs/tiny-llm")(
    start.tiny_llm
)
app.command(
    "simulate",
    epilog="Example: sepsis-jax simulate --model runs/demo/model --episodes runs/demo/cohort "
    "--plan 'early=3,2;1,1' --plan 'rest=0,0' --out runs/futures",
)(simulate.simulate)
app.command(
    "sweep",
    epilog="Example: sepsis-jax sweep --model runs/demo/model --episodes runs/demo/cohort "
    "--plan constant --policy guideline --steps 0,2,4 --out runs/sweep",
)(simulate.sweep)
app.command(
    "explore",
    epilog="Example: sepsis-jax explore --model runs/demo/model --episodes runs/demo/cohort",
)(explore)
app.command("mcp", epilog=MCP_EPILOG)(mcp)
app.command("bench", epilog="Example: sepsis-jax bench --model runs/demo/model --out runs/bench")(
    bench.bench
)
app.command(
    "profile", epilog="Example: sepsis-jax profile --model runs/demo/model --out runs/profile"
)(bench.profile)
app.command("doctor", epilog="Example: sepsis-jax doctor")(bench.doctor)


# The class above all errors of usage; typer has it from click, or a copy of its own.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]

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
    return re.sub(r"choose (\w+)='(\w+)'", r"choose --set \1=\2", message)


# What failures of memory and of disks look like; libraries raise errors of many types for them.
_NO_MEMORY = ("out of memory", "unable to allocate", "cannot allocate memory", "bad_alloc")
_NO_SPACE = ("no space left", "disk quota exceeded", "file too large")


def main() -> None:
    """Entry point: bad input ends with one line and status 2, Ctrl-C with one and 130.

    What `timeout` and schedulers send (SIGTERM) ends with 143 and leaves as little behind.
    """
    sys.unraisablehook = _interrupt_again
    signal.signal(signal.SIGTERM, _terminate)
    if _COMPLETION in os.environ:  # a shell asks what may follow
        app(prog_name=app.info.name)
    sys.exit(_status(sys.argv[1:]))


_COMPLETION = "_SEPSIS_JAX_COMPLETE"  # Click's variable for a program of this name
_terminated = threading.Event()


def _terminate(*_: object) -> None:
    """Ends the command as Ctrl-C does, without a word."""
    _terminated.set()
    raise KeyboardInterrupt


def _interrupt_again(dropped: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in callbacks of its garbage collector, Ctrl-C included."""
    if dropped.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(dropped)
        return
    later = threading.Timer(0.1, _thread.interrupt_main)
    later.daemon = True
    later.start()


def _status(arguments: list[str]) -> int:
    """Runs a command and says in one line why it failed; the exit status."""
    try:
        command = typer.main.get_command(app)
        with command.make_context(app.info.name, list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except _USAGE_ERROR as error:
        return _usage_error(error)
    except InputError as error:
        return _refuse(_with_flags(str(error)))
    except KeyboardInterrupt as interrupt:
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):  # JAX's, if interrupted as it starts: 60 s
                thread.cancel()
        if _terminated.is_set():
            return 128 + signal.SIGTERM
        hint = f"; {interrupt}" if str(interrupt) else ""
        errors.print(f"sepsis-jax: interrupted{hint}", soft_wrap=True)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        line = _failure(error)
        if line is None:
            raise
        return _refuse(line)
    return 0


def _refuse(message: str) -> int:
    line = " ".join(message.split())  # what libraries say may take several lines
    errors.print(f"sepsis-jax: {line}", soft_wrap=True)
    return 2


def _usage_error(error: Any) -> int:  # of typer, or of click in older versions of it
    context = error.ctx
    if not error.format_message() or type(error).__name__ == "NoArgsIsHelpError":
        errors.print(context.get_help(), soft_wrap=True)
        return 2
    path = "sepsis-jax" if context is None else context.command_path
    return _refuse(f"{error.format_message().rstrip('.')}; see {path} --help")


def _failure(error: BaseException) -> str | None:
    """One line for what is no fault of this software; None for everything else."""
    text = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        return "not enough memory; ask for fewer patients, samples, plans or steps at a time"
    name = getattr(error, "filename", None)
    place = "" if name is None else f"{name}: "
    if any(words in text for words in _NO_SPACE):
        return f"{place}the disk is full ({_first_line(error)}); free space, or write elsewhere"
    if isinstance(error, OSError) and name is not None:
        return f"{place}{error.strerror}"
    return None


def _first_line(error: BaseException) -> str:
    words = getattr(error, "strerror", None) or str(error)
    return words.splitlines()[0]


if __name__ == "__main__":
    main()
