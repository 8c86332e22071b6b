"""`sepsis-jax policy`: train, describe, compare, export and serve policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sepsis_jax.commands import policy_llm, policy_serve
from sepsis_jax.console import (
    DISCLAIMER,
    Config,
    Episodes,
    Json,
    Model,
    Out,
    Seed,
    Setting,
    console,
    phases,
    print_json,
    print_table,
    resumable,
)
from sepsis_jax.runs import claimed

app = typer.Typer(help="Train, describe, compare and export policies.", no_args_is_help=True)
app.command("serve", epilog=policy_serve.EPILOG)(policy_serve.serve)
for _command, _epilog in policy_llm.COMMANDS.items():
    app.command(epilog=_epilog)(_command)


@app.command(
    "train",
    epilog="Example: sepsis-jax policy train --method iql --episodes runs/demo/cohort "
    "--out runs/iql",
)
def train(
    episodes: Episodes,
    out: Out,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="iql, cql, wd3qne, dqn or bcq (offline), clinician (a clone), planner, or ppo "
            "(in the world model).",
        ),
    ],
    model: Annotated[
        Path | None, typer.Option("--model", help="World model; for planner and ppo.")
    ] = None,
    critic: Annotated[
        Path | None,
        typer.Option(
            "--critic",
            help="Policy of iql: the start of ppo, or the critic of a planner that needs one.",
        ),
    ] = None,
    clinician: Annotated[
        Path | None, typer.Option("--clinician", help="Cloned clinician of the planner.")
    ] = None,
    config: Config = None,
    setting: Setting = None,
    json: Json = False,
) -> None:
    """Train one policy on the training split."""
    from policy.registry import TRAINED
    from sepsis_jax.pipelines.policy_training import OPTIONS, train_policy
    from worldmodel.configuration import resolve_config
    from worldmodel.errors import InputError

    if method not in OPTIONS:
        raise InputError(f"--method: got {method!r}, expected one of {', '.join(TRAINED)}")
    # each method has a configuration of its own
    settings: Any = resolve_config(OPTIONS[method], config, setting, source="--set")
    with claimed(out), phases("policy") as progress:
        record = train_policy(
            episodes, out, method, settings, model=model, critic=critic, clinician=clinician,
            progress=progress,
        )  # fmt: skip
    facts = record.get("report") or record.get("last") or {}
    if facts:
        title = "On the test split" if "report" in record else "End of training"
        print_table(title, ("what", "value"), list(facts.items()))
    console.print(f"written to {out}.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "method": method, "fingerprint": record["fingerprint"],
                    **facts})  # fmt: skip


@app.command(
    "describe",
    epilog="Example: sepsis-jax policy describe --policy titration --policy guideline "
    "--episodes runs/demo/cohort --out runs/description",
)
def describe(
    episodes: Episodes,
    out: Out,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="Folder of a policy, NAME=FOLDER, or random, none, max, guideline, titration, "
            "clinician. Repeat for more.",
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, validation, test or all.")] = "test",
    clinician: Annotated[
        Path | None,
        typer.Option("--clinician", help="Cloned clinician to compare with; fitted if not given."),
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show what policies give in recorded states, beside the clinician."""
    from sepsis_jax.pipelines.policy_description import describe_policies, description
    from sepsis_jax.report.policies import plain

    with claimed(out), phases("description") as progress:
        table = describe_policies(
            episodes, out, policy or [], split=split, clinician=clinician, seed=seed,
            progress=progress,
        )  # fmt: skip
    shown = description(table)
    print_table(f"In recorded states, {split} split (percent; kl, entropy: nats)",
                shown.columns, shown.rows)  # fmt: skip
    console.print(f"{out / 'report.html'}, description.csv, actions.png.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "split": split, "rows": plain(table)})


@app.command(
    "compare",
    epilog="Example: sepsis-jax policy compare --config configs/policies_synthetic.yaml "
    "--episodes runs/demo/cohort --model runs/demo/model --out runs/policies",
)
def compare(
    episodes: Episodes,
    model: Model,
    out: Out,
    config: Config = None,
    setting: Setting = None,
    truth: Annotated[
        bool | None,
        typer.Option(
            "--truth/--no-truth",
            help="Value in the synthetic world itself, or in the world model; the default is the "
            "truth where the episodes come from that world.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Train policies and compare them with the clinician. The same command again goes on."""
    from sepsis_jax.pipelines.policy_comparison import ComparisonOptions, compare_policies
    from sepsis_jax.report.policies import COLUMNS, SHORT, cells, plain
    from worldmodel.configuration import resolve_config

    options = resolve_config(ComparisonOptions, config, setting, source="--set")
    goes_on = f"the same command goes on in {out}"
    with resumable(goes_on), claimed(out), phases("comparison") as progress:
        table = compare_policies(episodes, model, out, options, truth=truth, progress=progress)
    rows = [row[:SHORT] for row in cells(table)]
    title = "Policies on the same patients (from gap on: percent; ± half a 95% interval)"
    print_table(title, COLUMNS[:SHORT], rows)
    console.print(f"{out / 'report.html'}, comparison.csv, .json, .md, policies/.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), **table.attrs, "rows": plain(table)})


@app.command(
    "export",
    epilog="Example: sepsis-jax policy export --episodes runs/demo/cohort --format d3rlpy "
    "--out runs/transitions.npz",
)
def export(
    episodes: Episodes,
    out: Annotated[Path, typer.Option("--out", help="File or folder to write.")],
    form: Annotated[str, typer.Option("--format", help="d3rlpy or minari.")] = "d3rlpy",
    split: Annotated[
        str, typer.Option("--split", help="train, validation, test or all.")
    ] = "train",
    past: Annotated[
        int, typer.Option("--past", min=0, max=1000, help="Earlier rows in the features.")
    ] = 4,
    json: Json = False,
) -> None:
    """Write recorded stays as a data set of another library for offline learning."""
    from sepsis_jax.pipelines.episodes import export_transitions

    with claimed(out), phases("export") as progress:
        rows = export_transitions(
            episodes, out, form=form, split=split, past=past, progress=progress
        )
    console.print(f"{rows} transitions written to {out}")
    if json:
        print_json({"out": str(out), "format": form, "transitions": rows})
