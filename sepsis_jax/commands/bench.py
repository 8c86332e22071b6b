"""`sepsis-jax bench`, `profile` and `doctor`: speed, where time goes, and what a machine can do."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import (
    Json,
    Kernel,
    Out,
    Samples,
    Seed,
    console,
    phases,
    print_json,
    print_table,
)
from sepsis_jax.runs import JsonDict, claimed, write_result
from worldmodel.configuration import LARGEST

OptionalModel = Annotated[
    Path | None,
    typer.Option(
        "--model", help="World model to simulate; default: an untrained one of the published shape."
    ),
]
Plans = Annotated[int, typer.Option("--plans", min=1, max=LARGEST, help="Plans per patient.")]
Horizon = Annotated[int, typer.Option("--horizon", min=1, max=LARGEST, help="Steps to simulate.")]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="Of matrix products: highest (float32), or default (TF32 on recent GPUs) in JAX "
        "and torch alike; default: the model's own.",
    ),
]


QUICK = "quick.json"  # what `bench --quick` writes


class Measured(StrEnum):
    """What `bench` measures."""

    ROLLOUTS = "rollouts"
    LLM = "llm"


_OF_LLM = {"out", "measured", "repeats", "only", "seed", "json"}  # parameters


def bench(
    context: typer.Context,
    out: Out,
    measured: Annotated[
        Measured,
        typer.Argument(
            help="llm: the sampler and the learner of language models on CPUs, beside "
            "transformers, vLLM and torch where they are installed; it takes --repeats, --only "
            "and --seed."
        ),
    ] = Measured.ROLLOUTS,
    model: OptionalModel = None,
    branches: Annotated[
        list[int] | None,
        typer.Option(
            "--branches", min=1, max=LARGEST, help="Branches at a time; repeat for a sweep."
        ),
    ] = None,
    plans: Plans = 4,
    samples: Samples = 16,
    horizon: Horizon = 24,
    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats",
            min=1,
            max=LARGEST,
            help="Timed runs of each contender; default: 10, or 3 with --quick and of llm.",
        ),
    ] = None,
    question_samples: Annotated[
        int,
        typer.Option(
            "--question-samples",
            min=1,
            max=LARGEST,
            help="Futures per treatment an agent asks for.",
        ),
    ] = 1000,
    precision: Precision = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Contender to measure; repeat for more.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="One figure per part of the system, the environment and a language model "
            "included, in minutes and in one file.",
        ),
    ] = False,
    kernel: Kernel = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Time rollouts in turns with torch: throughput, share of the bound, latency, plots."""
    if measured is Measured.LLM:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = {name for name, source in sources.items() if source and source.name != "DEFAULT"}
        if given - _OF_LLM:
            raise typer.BadParameter("llm takes --repeats, --only and --seed alone")
        _bench_llm(out, repeats, only, seed, json)
        return
    from sepsis_jax.benchmark.setup import begin_devices, model_to_measure

    begin_devices()
    from sepsis_jax.benchmark.bench import (
        RESULT,
        BenchOptions,
        names_of,
        run_bench,
        torch_wanted,
        write_bench,
    )
    from sepsis_jax.benchmark.hardware import hardware, torch_version
    from sepsis_jax.runs import provenance
    from worldmodel.files import check_replaceable

    options = BenchOptions(
        branches=tuple(branches or ()),
        plans=plans,
        samples=samples,
        horizon=horizon,
        repeats=repeats or (3 if quick else 10),
        question_samples=question_samples,
        seed=seed,
        only=tuple(only or ()),
        kernel=kernel or "auto",
    )
    check_replaceable(out, QUICK if quick else RESULT)
    world_model, what = model_to_measure(model, precision)
    console.print(f"model: {what}")
    busy = _load()
    if quick:
        from sepsis_jax.benchmark.quick import run_quick

        with claimed(out), phases("bench") as progress:
            result = run_quick(world_model, options, progress)
            result |= {"model": what, "load_before": busy}
            write_result(out, QUICK, result)
        _show_figures(result)
        console.print(str(out / QUICK))
        if json:
            print_json({"out": str(out), **result})
        return
    with claimed(out), phases("bench") as progress:
        result = run_bench(world_model, options, progress)
        result |= {
            "model": what,
            "options": vars(options) | {"branches": list(branches or ())},
            "hardware": hardware(),
            "load_before": busy,
            **provenance(torch=torch_version()),
        }
        write_bench(result, out)
    if world_model.is_recurrent:
        console.print(f"torch's models read windows: measured {', '.join(names_of(world_model))}")
    elif not torch_wanted(world_model):
        console.print("torch is not installed (extra `parity`): measured without it")
    _show(result)
    console.print(f"{out / 'bench.json'}, bench.csv, scaling.png")
    if json:
        print_json({"out": str(out), **result})


def _load() -> float:
    """The machine's load, which is told where other programs run."""
    busy = os.getloadavg()[0]
    if busy > 0.5:
        console.print(
            f"other programs are running (load {busy:.1f}): torch's threads wait for each other "
            "and suffer most, so its figures and the ratios to it will mislead"
        )
    return busy


def _bench_llm(
    out: Path, repeats: int | None, only: list[str] | None, seed: int, json: bool
) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is used
    from sepsis_jax.benchmark.hardware import hardware
    from sepsis_jax.benchmark.llm import RESULT, LlmBenchOptions, installed, run_llm_bench
    from sepsis_jax.benchmark.llm_worker import LEARNERS, SAMPLERS
    from sepsis_jax.runs import provenance
    from worldmodel.files import check_replaceable

    options = LlmBenchOptions(repeats=repeats or 3, seed=seed, only=tuple(only or ()))
    check_replaceable(out, RESULT)
    missing = [name for name in (*SAMPLERS, *LEARNERS) if not installed(name)]
    if missing:
        console.print(f"not installed, so not measured: {', '.join(missing)}")
    busy = _load()
    with claimed(out), phases("bench llm") as progress:
        result = run_llm_bench(options, progress)
        result |= {"options": vars(options), "hardware": hardware(), "load_before": busy}
        result |= provenance(command="sepsis-jax bench llm")
        write_result(out, RESULT, result)
    print_table(
        f"Qwen3 of {result['parameters'] / 1e6:.0f} million parameters, float32",
        ("task", "contender", "seconds", "min", "max", "processor s", "memory, GiB"),
        [
            (
                row["task"],
                row["contender"],
                *(f"{row['seconds'][key]:.2f}" for key in ("median", "min", "max")),
                f"{row['processor_seconds']['median']:.2f}",
                f"{row['memory_bytes'] / 2**30:.2f}",
            )
            for row in result["table"]
        ],
    )
    for row in result["ratios"]:
        console.print(
            f"{row['task']}: {row['ours']} takes {row['median']:.2f} x the time of {row['other']} "
            f"({row['min']:.2f} to {row['max']:.2f}) and {row['memory']:.2f} x its memory"
        )
    console.print(str(out / RESULT))
    if json:
        print_json({"out": str(out), **result})


def doctor(json: Json = False) -> None:
    """Look at this machine: devices, speed, numbers beside a CPU's; a verdict per line.

    Exits with 1 where something is bad.
    """
    from sepsis_jax.benchmark.setup import begin_devices

    begin_devices()
    from sepsis_jax.benchmark.doctor import BAD, GOOD, examine
    from sepsis_jax.benchmark.hardware import hardware

    with phases("doctor") as progress:
        found = examine(progress)
    print_table(
        "This machine", ("", "verdict", "found"),
        [(one.what, one.verdict, one.found) for one in found],
    )  # fmt: skip
    for one in found:
        if one.verdict != GOOD:
            console.print(f"{one.what}: {one.mend}")
    if json:
        print_json({"hardware": hardware(), "findings": [vars(one) for one in found]})
    if any(one.verdict == BAD for one in found):
        raise typer.Exit(1)


def _show_figures(result: JsonDict) -> None:
    def rounded(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    print_table(
        "Median of the repeats, and their range", ("", "median", "min", "max", "unit"),
        [
            (one["name"], *(rounded(one[key]) for key in ("median", "min", "max")), one["unit"])
            for one in result["figures"]
        ],
    )  # fmt: skip


def _show(result: JsonDict) -> None:
    print_table(
        "Branch-steps per second",
        ("", "branches", "median", "min", "max", "of peak", "compile s", "MB"),
        [
            (
                row["name"],
                row["branches"],
                *(f"{row[key]:,.0f}" for key in ("median", "min", "max")),
                f"{100 * row['share_of_peak']:.0f}%",
                row["compile_seconds"],
                row["memory_bytes"] and row["memory_bytes"] / 1e6,
            )
            for row in result["table"]
        ],
    )
    peak = result["bound"]["flops_per_second"]
    console.print(
        f"matrix products: {peak['median'] / 1e9:,.0f} GFLOP/s "
        f"({peak['min'] / 1e9:,.0f} to {peak['max'] / 1e9:,.0f}; {result['bound']['product']})"
    )
    for name, row in result["bound"]["shares"].items():
        console.print(
            f"share of the bound: {100 * row['median']:.0f}% ({100 * row['min']:.0f} to "
            f"{100 * row['max']:.0f}; {name})"
        )
    for name, row in result["ratios"].items():
        console.print(
            f"to {name}: {row['median']:.2f} x ({row['min']:.2f} to {row['max']:.2f}; "
            f"{row['ours']} to {row['other']})"
        )
    for row in result["question"]:
        console.print(
            f"{row['name']}, {row['branches']} branches: {row['median_ms']:.1f} ms "
            f"({row['min_ms']:.1f} to {row['max_ms']:.1f})"
        )
    for name, row in result["drift"].items():
        console.print(
            f"{name} differs from float32 by {row['mean']:.2g} (mean) and {row['max']:.2g} (max) "
            f"z-scores in the last row"
        )


def profile(
    out: Out,
    model: OptionalModel = None,
    branches: Annotated[
        int | None,
        typer.Option(
            "--branches",
            min=1,
            max=LARGEST,
            help="Branches per device; default: as many as suit it.",
        ),
    ] = None,
    plans: Plans = 4,
    samples: Samples = 16,
    horizon: Horizon = 24,
    precision: Precision = None,
    kernel: Kernel = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Trace rollouts: a JAX trace for viewers such as XProf, and a table of the parts."""
    from sepsis_jax.benchmark.setup import begin_devices, model_to_measure

    begin_devices()
    from sepsis_jax.benchmark.hardware import hardware
    from sepsis_jax.benchmark.profiling import RESULT, default_branches, write_profile
    from sepsis_jax.benchmark.setup import patient_pool, require_branches, shape_of, workload
    from sepsis_jax.runs import provenance
    from worldmodel.files import check_replaceable

    check_replaceable(out, RESULT)
    shape = shape_of(branches or default_branches(), plans=plans, samples=samples)
    require_branches(shape, horizon)
    world_model, what = model_to_measure(model, precision)
    console.print(f"model: {what}")
    with claimed(out), phases("profile") as progress:
        pool = patient_pool(world_model, seed)
        job = workload(world_model, pool, shape, horizon, seed=seed, kernel=kernel or "auto")
        result = write_profile(
            job,
            out,
            {"model": what, "hardware": hardware(), **provenance()},
            progress=progress,
        )
    wall = result["wall_seconds"]
    print_table(
        f"{result['branches']} branches, {horizon} steps, {1e3 * wall['traced']:.0f} ms "
        f"({1e3 * wall['untraced']:.0f} ms untraced) on {result['devices']} devices",
        ("part", "ms x devices", "share"),
        [
            (row["part"], 1e3 * row["device_seconds"], f"{100 * row['share']:.1f}%")
            for row in result["parts"]
        ],
    )
    console.print(f"{out / 'profile.csv'}, profile.json, trace/")
    if json:
        print_json({"out": str(out), **result})
