"""`sepsis-jax simulate`: one patient's futures."""

from __future__ import annotations

from typing import Annotated

import typer

from sepsis_jax.commands.options import Episodes, Json, Model, Out, Seed
from sepsis_jax.console import DISCLAIMER, console, print_json, print_table

DEFAULT_PLANS = ["nothing=0,0", "fluids=0,3", "vasopressor=3,0", "both=3,3;2,1"]


def simulate(
    model: Model,
    episodes: Episodes,
    out: Out,
    stay: Annotated[
        int | None, typer.Option("--stay", help="stay_id; default: the first long enough.")
    ] = None,
    step: Annotated[
        int, typer.Option("--step", min=0, help="Row to start from; 0 is ICU admission.")
    ] = 2,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan",
            help="NAME=V,F;V,F;... with vasopressor and fluid levels 0-4 per step (the last pair "
            "goes on), or 'clinician' for what was given. Repeat for more plans.",
        ),
    ] = None,
    horizon: Annotated[int, typer.Option("--horizon", min=1, help="Steps to simulate.")] = 6,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Futures per plan.")] = 1000,
    mode: Annotated[
        str, typer.Option("--mode", help="corrected, or reference for SepsisAgent's rules.")
    ] = "corrected",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Draw one patient's simulated futures under several plans: a fan chart and tables."""
    from sepsis_jax.pipelines.simulation import simulate_patient
    from worldmodel.episode_files import load_episodes
    from worldmodel.models.checkpoint import load_world_model

    world_model = load_world_model(model)
    outcomes = simulate_patient(
        world_model,
        load_episodes(episodes, step_hours=world_model.step_hours),
        out,
        stay_id=stay,
        step=step,
        plans=plan or DEFAULT_PLANS,
        horizon=horizon,
        samples=samples,
        seed=seed,
        mode=mode,
    )
    print_table(
        f"{samples} futures per plan, {horizon} steps",
        ("plan", "mortality", "5%", "95%", "total reward", "MAP < 65", "ventilated", "projected"),
        outcomes.itertuples(index=False),
    )
    console.print(f"{out / 'fan_chart.png'}, trajectories.csv, outcomes.csv.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "plans": outcomes.to_dict("records")})
