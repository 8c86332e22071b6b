"""`sepsis-jax policy sft|bc|rl|stages`: train the language model that treats patients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sepsis_jax.commands.options import Config, Json, Out
from sepsis_jax.console import DISCLAIMER, console, phases, print_json, print_table

if TYPE_CHECKING:
    from sepsis_jax.pipelines.llm.study import StudyOptions

Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A setting as NAME=VALUE, such as rl.learner.learning_rate=1e-6; repeat."
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what an earlier run left in --out.")
]
LLM = Annotated[Path, typer.Option("--llm", help="Hugging Face folder of the Qwen3 to train.")]
WorldModel = Annotated[Path, typer.Option("--model", help="World model that answers simulations.")]
SomeEpisodes = Annotated[
    Path | None,
    typer.Option("--episodes", help="Folder of episodes, as `sepsis-jax cohort` writes it."),
]


def sft(
    llm: LLM,
    episodes: Annotated[Path, typer.Option("--episodes", help="Episodes to ask about.")],
    out: Out,
    config: Config = None,
    setting: Setting = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Stage I: learn patient dynamics from questions about recorded stays."""
    from sepsis_jax.pipelines.llm.sft import run_sft

    options = _options(config, setting).sft
    with phases("stage I") as progress:
        reports = run_sft(
            out, options, llm=llm, episodes=episodes, resume=resume, progress=progress
        )
    _done(out, reports[-1].loss if reports else None, json)


def bc(
    llm: LLM,
    out: Out,
    model: Annotated[
        Path | None, typer.Option("--model", help="World model that the teacher asks.")
    ] = None,
    episodes: SomeEpisodes = None,
    records: Annotated[
        Path | None,
        typer.Option(
            "--records",
            help="Run of `sepsis-jax agent run` to learn from instead of a teacher, such as of a "
            "strong model behind an endpoint; only its good stays count.",
        ),
    ] = None,
    config: Config = None,
    setting: Setting = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Stage II: clone dialogues that propose, simulate, refine and prescribe."""
    from sepsis_jax.pipelines.llm.bc import run_bc

    options = _options(config, setting).bc
    with phases("stage II") as progress:
        reports = run_bc(
            out, options, llm=llm, model=model, episodes=episodes, records=records,
            resume=resume, progress=progress,
        )  # fmt: skip
    _done(out, reports[-1].loss if reports else None, json)


def rl(
    llm: LLM,
    model: WorldModel,
    out: Out,
    episodes: SomeEpisodes = None,
    backend: Annotated[
        str,
        typer.Option("--backend", help="Who generates: embedded, or vllm with --url."),
    ] = "embedded",
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            help="vLLM server of --llm, started with `sepsis-jax policy serve --swaps`, that "
            "shares this disk.",
        ),
    ] = None,
    key_variable: Annotated[
        str | None,
        typer.Option("--key-variable", help="Environment variable that holds the server's key."),
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="File that holds the server's key.")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option("--served-name", help="The server's name of the model.")
    ] = None,
    config: Config = None,
    setting: Setting = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Stage III: treat simulated patients and learn from what came of it."""
    from sepsis_jax.pipelines.agent_backends import BackendOptions
    from sepsis_jax.pipelines.llm.rl import run_rl

    options = _options(config, setting).rl
    asked = BackendOptions(
        kind=backend, llm=str(llm), url=url, key_variable=key_variable, key_file=key_file,
        served_name=served_name,
    )  # fmt: skip
    with phases("stage III") as progress:
        found = run_rl(
            out, options, llm=llm, model=model, episodes=episodes, backend=asked,
            resume=resume, progress=progress,
        )  # fmt: skip
    if found:
        print_table("Last iteration", ("what", "value"), list(found.items()))
    console.print(f"{out / 'model'}, metrics/, checkpoints/.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), **found})


def stages(
    out: Out,
    llm: Annotated[
        Path | None,
        typer.Option(
            "--llm", help="Hugging Face folder of a Qwen3; a tiny random one if not given."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="World model; trained on the episodes if not given."),
    ] = None,
    episodes: SomeEpisodes = None,
    config: Config = None,
    setting: Setting = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """All three stages in a row, each judged on fresh patients and on questions."""
    from sepsis_jax.pipelines.llm.study import run_study

    options = _options(config, setting)
    with phases("all stages") as progress:
        table = run_study(
            out, options, llm=llm, model=model, episodes=episodes, resume=resume,
            progress=progress,
        )  # fmt: skip
    shown = ["stage", "value", "low", "high", "valid", "completed", "adherence", "unsafe",
             "mortality_auroc", "vasopressor_auroc"]  # fmt: skip
    rows = [
        [row[0], *("-" if value is None or value != value else f"{value:.2f}" for value in row[1:])]
        for row in table[shown].itertuples(index=False)
    ]
    print_table("What each stage brought, on fresh patients", tuple(shown), rows)
    console.print(f"{out / 'stages.csv'}, curves.png, a folder per stage.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "rows": table.to_dict("records")})


def _options(config: Path | None, setting: list[str] | None) -> StudyOptions:
    """The settings of all stages, of which each command takes its section; joins the job."""
    from policy.train.distributed import start
    from sepsis_jax.pipelines.llm.study import StudyOptions
    from worldmodel.configuration import resolve_config

    start()
    return resolve_config(StudyOptions, config, setting, source="--set")


def _done(out: Path, loss: float | None, json: bool) -> None:
    console.print(f"{out / 'model'}, metrics/, checkpoints/.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "loss": loss})


COMMANDS: dict[Callable[..., None], str] = {
    sft: "Example: sepsis-jax policy sft --llm models/Qwen3-4B --episodes runs/mimic "
    "--out runs/sft",
    bc: "Example: sepsis-jax policy bc --llm runs/sft/model --model runs/model "
    "--set bc.teacher=runs/planner --out runs/bc",
    rl: "Example: sepsis-jax policy rl --llm runs/bc/model --model runs/model --out runs/rl",
    stages: "Example: sepsis-jax policy stages --config configs/train_tiny_cpu.yaml "
    "--out runs/stages",
}
"""Commands and their examples."""
