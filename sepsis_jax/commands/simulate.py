"""`sepsis-jax simulate` and `sepsis-jax sweep`: one patient's futures, and those of cohorts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sepsis_jax.console import (
    DISCLAIMER,
    Config,
    DryRun,
    Episodes,
    Json,
    Kernel,
    Model,
    OtherSeed,
    Out,
    Samples,
    Seed,
    Setting,
    console,
    phases,
    print_json,
    print_table,
    resumable,
    show_plan,
)
from sepsis_jax.runs import JsonDict, claimed
from worldmodel.configuration import LARGEST

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_PLANS = ["nothing=0,0", "fluids=0,3", "vasopressor=3,0", "both=3,3;2,1"]


def simulate(
    model: Model,
    episodes: Episodes,
    out: Out,
    stay: Annotated[
        int | None, typer.Option("--stay", help="stay_id; default: the first long enough.")
    ] = None,
    step: Annotated[
        int,
        typer.Option("--step", min=0, max=LARGEST, help="Row to start from; 0 is ICU admission."),
    ] = 2,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan",
            help="NAME=V,F;V,F;... with vasopressor and fluid levels 0-4 per step (the last pair "
            "goes on), or 'clinician' for what was given. Repeat for more plans.",
        ),
    ] = None,
    horizon: Annotated[
        int, typer.Option("--horizon", min=1, max=LARGEST, help="Steps to simulate.")
    ] = 6,
    samples: Samples = 1000,
    mode: Annotated[
        str, typer.Option("--mode", help="corrected, or reference for SepsisAgent's rules.")
    ] = "corrected",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Draw one patient's simulated futures under several plans: a fan chart and tables."""
    from sepsis_jax.pipelines.world_model import OUTCOME_TITLES, simulate_patient
    from worldmodel.episode_files import load_episodes_for
    from worldmodel.models.checkpoint import load_world_model

    world_model = load_world_model(model)
    samples = world_model.whole_samples(samples)
    outcomes = simulate_patient(
        world_model,
        load_episodes_for(world_model, episodes),
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
        OUTCOME_TITLES[: outcomes.shape[1]],
        outcomes.itertuples(index=False),
    )
    console.print(f"{out / 'fan_chart.png'}, trajectories.csv, outcomes.csv.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "plans": outcomes.to_dict("records")})


_SHOWN = 30  # plans in the table on the screen


def sweep(
    model: Model,
    episodes: Episodes,
    out: Out,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan",
            help="constant (the 25 actions held; the default), deviations (each action once, then "
            "what was really given), clinician (what was really given), or NAME=V,F;V,F;... with "
            "vasopressor and fluid levels 0-4 (the last pair goes on). Repeat for more.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="Folder of a policy, NAME=FOLDER, or random, none, max, guideline, titration. "
            "Repeat for more.",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", help="Rows to start from, as 0,2,4, or all; the default is 2."),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option("--every", min=1, max=LARGEST, help="Start from every so many-th row."),
    ] = None,
    horizon: Annotated[
        int | None,
        typer.Option("--horizon", min=1, max=LARGEST, help="Steps to simulate; the default is 6."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=1, max=LARGEST, help="Futures per start and plan; the default is 120."
        ),
    ] = None,
    then: Annotated[
        str | None,
        typer.Option("--then", help="V,F that follows in deviations instead of the record."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="train, validation, test or all (the default).")
    ] = None,
    behavior: Annotated[
        Path | None,
        typer.Option(
            "--behavior",
            help="Folder of a cloned clinician, for the support flag: how likely a clinician "
            "begins so. Without it the flag is empty.",
        ),
    ] = None,
    config: Config = None,
    setting: Setting = None,
    seed: OtherSeed = None,
    kernel: Kernel = None,
    shard: Annotated[
        str,
        typer.Option("--shard", help="i/n: this host does its share of the blocks, i from 0."),
    ] = "0/1",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an earlier run left in --out.")
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Simulate patients x start times x plans x samples, and write statistics to Parquet."""
    from dataclasses import replace

    from worldmodel.simulate.sharded import use_every_core

    use_every_core()
    from sepsis_jax.pipelines.sweep import run_sweep
    from sepsis_jax.pipelines.sweep_folder import Shard
    from sepsis_jax.pipelines.sweep_request import SweepOptions
    from worldmodel.configuration import resolve_config

    flags: JsonDict = {
        "plans": tuple(plan) if plan else None, "policies": tuple(policy) if policy else None,
        "then": then, "every": every, "horizon": horizon, "samples": samples, "split": split,
        "seed": seed, "kernel": kernel, **_start_rows(steps, every),
    }  # fmt: skip
    options = resolve_config(SweepOptions, config, setting, source="--set")
    options = replace(options, **{name: x for name, x in flags.items() if x is not None})
    if dry_run:
        from sepsis_jax.pipelines.dry_run import sweep_lines

        show_plan(sweep_lines(episodes, model, options, behavior=behavior), json)
        return
    share = Shard.parse(shard)
    part = f"{share.index}-of-{share.count}" if share.count > 1 else None
    goes_on = f"the same command with --resume goes on in {out}"
    with resumable(goes_on), claimed(out, part=part), phases("sweep") as progress:
        result = run_sweep(
            episodes, model, out, options, behavior=behavior, shard=share, resume=resume,
            progress=progress,
        )  # fmt: skip
    speed = result.branch_steps / max(result.seconds, 1e-9)
    if result.summary is not None:
        _show(result.summary, result.groups)
    console.print(
        f"{result.blocks} blocks, {result.branch_steps:,} branch-steps in {result.seconds:.1f} s "
        f"({speed:,.0f} per second); {result.groups['skipped_starts']:,} starts after the end of a "
        "stay skipped"
    )
    if result.missing:
        console.print(f"{out / 'parts'}: {result.missing} blocks of other shards are still missing")
    else:
        console.print(f"{out / 'parts'}, summary.csv, sweep.png.  {DISCLAIMER}")
    if json:
        rows = [] if result.summary is None else _plain(result.summary)
        print_json({"out": str(out), "blocks": result.blocks, "missing": result.missing,
                    "branch_steps": result.branch_steps, "seconds": result.seconds,
                    "groups": {**result.groups, "plans": len(result.groups["plans"])},
                    "plans": rows})  # fmt: skip


def _start_rows(steps: str | None, every: int | None) -> JsonDict:
    from worldmodel.errors import InputError

    if steps is None:
        return {}
    if every is not None:
        raise InputError("--steps, --every: give one of them")
    if steps.strip().lower() == "all":
        return {"every": 1}
    try:
        return {"steps": tuple(int(part) for part in steps.split(",")), "every": 0}
    except ValueError:
        raise InputError(f"--steps: got {steps!r}, expected such as 0,2,4, or all") from None


def _show(summary: pd.DataFrame, groups: JsonDict) -> None:
    columns = {
        "mortality": "mortality_mean", "reward": "reward_mean", "MAP": "meanbp_mean",
        "lactate": "lactate_mean", "SOFA change": "sofa_change", "MAP < 65": "map_below_65",
        "ventilated": "ventilation", "supported": "supported",
    }  # fmt: skip
    columns = {title: name for title, name in columns.items() if name in summary}
    best = summary.sort_values("reward_mean", ascending=False, kind="stable")
    shown = summary if len(summary) <= _SHOWN else best.head(_SHOWN)
    first = "" if len(summary) <= _SHOWN else f", the {_SHOWN} best of {len(summary)} by reward"
    print_table(
        f"Mean over {groups['starts']:,} starts of {groups['stays']:,} stays{first}",
        ("plan", *columns),
        [(row["plan"], *(row[name] for name in columns.values())) for row in _plain(shown)],
    )


def _plain(summary: pd.DataFrame) -> list[JsonDict]:
    """Rows with None for NaN."""
    return [
        {name: None if value != value else value for name, value in row.items()}
        for row in summary.to_dict("records")
    ]
