"""`sepsis-jax profile`: where a rollout's time goes."""

from __future__ import annotations

from typing import Annotated

import typer

from sepsis_jax.commands.bench import OptionalModel, Precision
from sepsis_jax.commands.options import Json, Out, Seed
from sepsis_jax.console import console, phases, print_json, print_table


def profile(
    out: Out,
    model: OptionalModel = None,
    branches: Annotated[
        int | None,
        typer.Option("--branches", help="Branches per device; default: as many as suit it."),
    ] = None,
    plans: Annotated[int, typer.Option("--plans", help="Plans per patient.")] = 4,
    samples: Annotated[int, typer.Option("--samples", help="Futures per plan.")] = 16,
    horizon: Annotated[int, typer.Option("--horizon", min=1, help="Steps to simulate.")] = 24,
    precision: Precision = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Trace rollouts: a JAX trace for viewers such as XProf, and a table of the parts."""
    from sepsis_jax.benchmark.setting import begin_devices, model_to_measure

    begin_devices()
    from sepsis_jax.benchmark.hardware import hardware
    from sepsis_jax.benchmark.profiling import default_branches, write_profile
    from sepsis_jax.benchmark.workload import patient_pool, shape_of, workload
    from sepsis_jax.provenance import provenance

    shape = shape_of(branches or default_branches(), plans=plans, samples=samples)
    world_model, what = model_to_measure(model, precision)
    console.print(f"model: {what}")
    with phases("profile") as progress:
        pool = patient_pool(world_model, seed)
        job = workload(world_model, pool, shape, horizon, seed=seed)
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
