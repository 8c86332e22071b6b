"""`sepsis-jax world-model`: train, judge and export world models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import (
    Config,
    DryRun,
    Episodes,
    Json,
    Model,
    Out,
    Seed,
    Setting,
    console,
    epochs,
    finite,
    phases,
    print_json,
    print_table,
    resumable,
    show_plan,
)
from sepsis_jax.runs import JsonDict, claimed
from worldmodel.configuration import LARGEST

Patients = Annotated[
    int, typer.Option("--patients", min=1, max=LARGEST, help="Fresh synthetic patients.")
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples", min=1, max=LARGEST, help="Futures per patient, plan or policy, and member."
    ),
]
Confounding = Annotated[
    float,
    typer.Option("--confounding", callback=finite, help="Of the world; see `cohort synthetic`."),
]

app = typer.Typer(help="Train, judge and export world models.", no_args_is_help=True)


@app.command(
    "train",
    epilog="Example: sepsis-jax world-model train --episodes runs/demo/cohort --out runs/model",
)
def train(
    episodes: Episodes,
    out: Out,
    config: Config = None,
    setting: Setting = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train State and Outcome Model. The same command again goes on where it was stopped."""
    from sepsis_jax.pipelines import world_model
    from worldmodel.configuration import resolve_config
    from worldmodel.models.training import TrainConfig

    settings = resolve_config(TrainConfig, config, setting, source="--set")
    if dry_run:
        from sepsis_jax.pipelines.dry_run import training_lines

        show_plan(training_lines(episodes, settings), json)
        return
    goes_on = "the same command goes on where it was stopped"
    with resumable(goes_on), claimed(out), epochs("world model") as progress:
        trained = world_model.train(episodes, out, settings, progress=progress)
    _show(trained.metrics)
    console.print(f"written to {out}")
    if json:
        print_json({"out": str(out), **world_model.summary(trained.metrics)})


@app.command(
    "evaluate",
    epilog="Example: sepsis-jax world-model evaluate --model runs/demo/model "
    "--episodes runs/demo/cohort",
)
def evaluate(
    model: Model,
    episodes: Episodes,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    json: Json = False,
) -> None:
    """Judge a world model on episodes, beside two baselines fitted on their training split."""
    from sepsis_jax.pipelines.world_model import summary
    from worldmodel import schema
    from worldmodel.episode_files import load_episodes_for
    from worldmodel.errors import InputError
    from worldmodel.models.checkpoint import load_world_model
    from worldmodel.models.evaluation import evaluate_world_model

    if split not in schema.SPLITS:
        raise InputError(f"--split: got {split!r}, expected one of {', '.join(schema.SPLITS)}")
    world_model = load_world_model(model)
    recorded = load_episodes_for(world_model, episodes)
    metrics = evaluate_world_model(world_model, recorded, split=split)
    _show(metrics)
    if json:
        print_json(summary(metrics))


@app.command(
    "effects",
    epilog="Example: sepsis-jax world-model effects --model runs/demo/model --out runs/effects",
)
def effects(
    model: Model,
    out: Out,
    patients: Patients = 1000,
    step: Annotated[
        int, typer.Option("--step", min=0, max=LARGEST, help="Row from which a treatment is held.")
    ] = 2,
    held: Annotated[
        int, typer.Option("--held", min=1, max=LARGEST, help="Steps for which it is held.")
    ] = 6,
    samples: Samples = 2,
    seed: Seed = 1000,
    confounding: Confounding = 0.0,
    records: Annotated[
        Path | None,
        typer.Option("--records", help="Episodes that linear baselines are fitted to."),
    ] = None,
    json: Json = False,
) -> None:
    """Compare what a model says 25 held treatments do with what they truly do (synthetic world)."""
    from sepsis_jax.pipelines.futures import FuturesConfig, compare_futures, mortality_rows

    config = FuturesConfig(patients, step, held, samples, seed, confounding)
    with claimed(out), phases("true and learned futures") as progress:
        metrics = compare_futures(model, out, config, records=records, progress=progress)
    show_futures(metrics, mortality_rows(out))
    console.print(f"written to {out}")
    if json:
        print_json(metrics)


@app.command(
    "values",
    epilog="Example: sepsis-jax world-model values --model runs/demo/model --out runs/values "
    "--policy none --policy clinician --policy titration --policy guideline",
)
def values(
    model: Model,
    out: Out,
    policy: Annotated[
        list[str], typer.Option("--policy", help="A built-in name, or NAME=FOLDER; repeat.")
    ],
    patients: Patients = 1000,
    samples: Samples = 2,
    seed: Seed = 1000,
    confounding: Confounding = 0.0,
    records: Annotated[
        Path | None,
        typer.Option("--records", help="Episodes from which OPE estimates the same values."),
    ] = None,
    json: Json = False,
) -> None:
    """Compare values of policies in a learned world with their true ones (synthetic world)."""
    from sepsis_jax.pipelines.policy_values import ESTIMATORS, TrueWorld, compare_with_truth
    from sepsis_jax.report.ope import records as plain_rows

    world = TrueWorld(patients, seed, confounding)
    with claimed(out), phases("values of policies") as progress:
        table, metrics = compare_with_truth(
            model, out, policy, world, samples=samples, records=records, progress=progress
        )
    columns = ["policy", "true", "simulated", "error", "spread", "supported"]
    columns += [f"{name}_estimate" for name in ESTIMATORS if f"{name}_estimate" in table]
    rows = [tuple(row.values()) for row in plain_rows(table[columns])]
    print_table("Total reward per stay", columns, rows)
    console.print(
        f"largest error {metrics['largest_error']:.2f}; order "
        f"{'right' if metrics['right_order'] else 'wrong'} (ties aside); written to {out}"
    )
    if (table["supported"] < _MOSTLY).any():
        console.print(
            f"supported below {_MOSTLY:g}: clinicians hardly ever give there what the policy "
            "gives, so the model extrapolates; read such a simulated value as a guess"
        )
    if json:
        print_json(metrics)


_MOSTLY = 0.9  # share of decisions


def show_futures(metrics: JsonDict, plans: list[JsonDict]) -> None:
    """Prints mortality by plan, agreement with the truth, and what the model's choice is worth."""
    from sepsis_jax.report.words import effect

    grid = {(row["vasopressor"], row["fluid"]): row for row in plans}
    levels = sorted({row["fluid"] for row in plans})
    print_table(
        "Death within 90 days of fresh patients, true / learned: treatment held for "
        f"{metrics['held_hours']:g} h, then the clinician",
        ("vasopressor", *(f"fluid {level:g}" for level in levels)),
        [
            (f"{row:g}", *(_true_and_learned(grid[row, column]) for column in levels))
            for row in levels
        ],
    )
    print_table(
        "Agreement over the 25 treatments",
        ("of", "Spearman", "mean error"),
        [
            (effect(name), *("none" if value is None else value for value in row.values()))
            for name, row in metrics.items()
            if _is_score(row)
        ],
    )
    print_table(
        "Giving, per patient, what the model rates best: true outcome",
        ("who chooses", "total reward", "mortality"),
        [(effect(name), *row.values()) for name, row in metrics.items() if _is_value(row)],
    )
    if not all(row["supported"] for row in plans):
        console.print("* hardly ever chosen by the clinician: the model extrapolates")


def _true_and_learned(row: JsonDict) -> str:
    mark = "" if row["supported"] else " *"
    return f"{row['mortality_true']:.2f} / {row['mortality_learned']:.2f}{mark}"


def _is_score(row: object) -> bool:
    return isinstance(row, dict) and "spearman" in row


def _is_value(row: object) -> bool:
    return isinstance(row, dict) and "reward" in row


@app.command(
    "export",
    epilog="Example: sepsis-jax world-model export --model runs/reference --out runs/published",
)
def export(
    model: Model,
    out: Out,
    pretrained: Annotated[
        bool,
        typer.Option(
            "--pretrained",
            help="A Hugging Face folder instead, of any variant: config.json, model.safetensors, "
            "README.md.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Write a model of the reference variant as SepsisAgent's folder of .pt files."""
    from sepsis_jax.pipelines.world_model import export_pretrained
    from worldmodel.models.checkpoint import load_world_model
    from worldmodel.models.reference import save_reference

    with claimed(out):
        if pretrained:
            export_pretrained(model, out)
        else:
            save_reference(load_world_model(model), out)
    console.print(f"written to {out}")
    if json:
        print_json({"out": str(out)})


def _show(metrics: JsonDict) -> None:
    from sepsis_jax.report.html import OUTCOME_COLUMNS, STATE_COLUMNS, outcome_rows, state_rows

    print_table(
        f"Next state, {metrics['split']} split: {metrics['stays']} stays, "
        f"{metrics['transitions']} steps (z-scores)",
        STATE_COLUMNS,
        state_rows(metrics),
    )
    print_table("Death within 90 days", OUTCOME_COLUMNS, outcome_rows(metrics))
