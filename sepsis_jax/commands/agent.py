"""`sepsis-jax agent`: a language model treats simulated patients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import (
    DISCLAIMER,
    Config,
    DryRun,
    Json,
    OtherSeed,
    Out,
    Setting,
    console,
    errors,
    phases,
    print_json,
    print_table,
    resumable,
    show_plan,
)
from sepsis_jax.runs import JsonDict, claimed
from worldmodel.configuration import LARGEST

app = typer.Typer(
    help="Let a language model treat simulated patients, and read what it did.",
    no_args_is_help=True,
)

_SHOWN = {
    "stays": "stays", "completed": "completed", "failed": "failed", "reward": "mean total reward",
    "reward_se": "  standard error", "deaths": "deaths, %", "adherence": "guideline adherence, %",
    "unsafe": "unsafe treatments, %", "decisions": "decisions", "simulations":
    "simulations per decision", "invalid_calls": "invalid calls per decision", "tool_calls":
    "tool calls answered", "replies": "replies", "prompt_tokens": "prompt tokens",
    "completion_tokens": "completion tokens",
}  # fmt: skip


@app.command(
    "run",
    epilog="Example: sepsis-jax agent run --config configs/agent_tiny.yaml --llm runs/tiny-llm "
    "--model runs/demo/model --out runs/agent",
)
def run(
    out: Out,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="embedded (a Qwen3 folder in this process), vllm (a server of such a folder; see "
            "`sepsis-jax policy serve`), openai (any OpenAI-compatible endpoint), or scripted.",
        ),
    ] = "embedded",
    llm: Annotated[
        str | None,
        typer.Option("--llm", help="Folder of the language model, or the endpoint's name of it."),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Of the server, as http://127.0.0.1:8000/v1.")
    ] = None,
    key_variable: Annotated[
        str | None,
        typer.Option("--key-variable", help="Environment variable that holds the server's key."),
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="File that holds the server's key.")
    ] = None,
    served_name: Annotated[
        str | None,
        typer.Option(
            "--served-name", help="The server's name of the model; the folder's by default."
        ),
    ] = None,
    reasoning: Annotated[
        bool,
        typer.Option("--reasoning", help="The endpoint takes no temperature, top_p or seed (o3)."),
    ] = False,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            "--extra",
            help="A further parameter of the endpoint's requests as NAME=VALUE, such as "
            "reasoning_effort=low; repeat.",
        ),
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Switch enable_thinking of the model's chat template; as it is by default.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="World model that answers simulations; without it, none."),
    ] = None,
    episodes: Annotated[
        Path | None,
        typer.Option(
            "--episodes",
            help="Recorded stays to start from, continued by --model; by default patients of the "
            "synthetic world.",
        ),
    ] = None,
    behavior: Annotated[
        Path | None,
        typer.Option("--behavior", help="Cloned clinician, to warn of treatments without support."),
    ] = None,
    patients: Annotated[
        int | None,
        typer.Option(
            "--patients", min=1, max=LARGEST, help="How many; 32 synthetic ones by default."
        ),
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option("--templates", help="full (the default), compact, or a folder of templates."),
    ] = None,
    config: Config = None,
    setting: Setting = None,
    seed: OtherSeed = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an earlier run left in --out.")
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Treat patients with a language model that proposes, simulates, refines and prescribes."""
    from dataclasses import replace

    from sepsis_jax.pipelines.agent import AgentOptions, BackendOptions, run_agent
    from worldmodel.configuration import resolve_config

    options = resolve_config(AgentOptions, config, setting, source="--set")
    flags: JsonDict = {"patients": patients, "templates": templates, "seed": seed}
    options = replace(options, **{name: x for name, x in flags.items() if x is not None})
    chosen = BackendOptions(
        kind=backend, llm=llm, url=url, key_variable=key_variable, key_file=key_file,
        served_name=served_name, reasoning=reasoning, extra=tuple(extra or ()),
        enable_thinking=thinking,
    )  # fmt: skip
    if dry_run:
        from sepsis_jax.pipelines.dry_run import agent_lines

        show_plan(agent_lines(options, chosen, episodes), json)
        return
    goes_on = f"the same command with --resume goes on in {out}"
    with resumable(goes_on), claimed(out), phases("agent") as progress:
        found = run_agent(
            out, options, chosen, model=model, episodes=episodes, behavior=behavior,
            resume=resume, progress=progress,
        )  # fmt: skip
    _print_summary(found)
    console.print(f"{out / 'records.jsonl'}, summary.json.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), **found})
    if not found["completed"]:
        errors.print(f"sepsis-jax: every stay failed; {goes_on}", soft_wrap=True)
        raise typer.Exit(2)


@app.command(
    "show",
    epilog="Example: sepsis-jax agent show --run runs/agent --patient 3 --out patient3.html",
)
def show(
    run: Annotated[Path, typer.Option("--run", help="Folder that `agent run` wrote.")],
    patient: Annotated[
        int | None, typer.Option("--patient", help="Show this patient's dialogue.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Write to a file: a dialogue as .md or .html, or without --patient all completed "
            "stays in the published result format as .json.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show a run: its summary and stays, or one patient's dialogue."""
    from policy.agent.records import RECORDS_FILE, last_attempts
    from policy.agent.transcript import markdown, page, published_results
    from sepsis_jax.pipelines.agent import SUMMARY
    from worldmodel.errors import InputError
    from worldmodel.files import atomic_file, read_json, write_json

    records = last_attempts(run / RECORDS_FILE)
    if patient is not None:
        if patient not in records:
            raise InputError(f"--patient: {run} has no patient {patient}")
        record = records[patient]
        forms = {".md": markdown, ".html": page}
        if out is None:
            console.print(markdown(record), soft_wrap=True)
        elif out.suffix not in forms:
            raise InputError(f"--out: {out} should end with .md or .html")
        else:
            with claimed(out), atomic_file(out) as temporary:
                temporary.write_text(forms[out.suffix](record), encoding="utf-8")
            console.print(str(out))
        if json:
            print_json(record)
        return
    if out is not None:
        if out.suffix != ".json":
            raise InputError(f"--out: {out} should end with .json; --patient writes pages")
        with claimed(out):
            write_json(out, published_results(records.values()))
        console.print(str(out))
        if json:
            print_json({"out": str(out), "patients": len(records)})
        return
    print_table(
        "Stays",
        ("patient", "status", "outcome", "total reward", "decisions", "invalid calls", "replies"),
        [
            (
                record["patient"], record["failure"] or record["status"], record["outcome"],
                record["total_reward"], len(record["decisions"]),
                sum(record["invalid"].values()), len(record["turns"]),
            )
            for record in records.values()
        ],
    )  # fmt: skip
    found = read_json(run / SUMMARY)
    _print_summary(found)
    if json:
        print_json(found)


def _print_summary(found: JsonDict) -> None:
    rows = [(title, found[name]) for name, title in _SHOWN.items()]
    for kind in ("failures", "invalid"):
        rows += [(f"{kind}: {reason}", count) for reason, count in sorted(found[kind].items())]
    print_table("Agent", ("", ""), rows)
    if found["failure_example"]:
        console.print(f"first failure: {found['failure_example']}", soft_wrap=True)
