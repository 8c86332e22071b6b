"""`sepsis-jax policy sft|bc|rl|stages`: train the language model that treats patients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sepsis_jax.console import (
    DISCLAIMER,
    Config,
    Json,
    Out,
    Setting,
    console,
    phases,
    print_json,
    print_table,
    resumable,
)
from sepsis_jax.runs import claimed
from worldmodel.errors import InputError

if TYPE_CHECKING:
    from sepsis_jax.pipelines.llm.memory_plan import Hardware, Plan
    from sepsis_jax.pipelines.llm.rl import RLOptions
    from sepsis_jax.pipelines.llm.setup import SupervisedOptions
    from sepsis_jax.pipelines.llm.stages import StagesOptions

Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what an earlier run left in --out.")
]
LLM = Annotated[
    Path, typer.Option("--llm", help="Hugging Face folder of the Qwen3 or Llama to train.")
]
WorldModel = Annotated[Path, typer.Option("--model", help="World model that answers simulations.")]
SomeEpisodes = Annotated[
    Path | None,
    typer.Option("--episodes", help="Folder of episodes, as `sepsis-jax cohort` writes it."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Tell what the job needs of each device's memory and whether it fits; start nothing. "
        "Of --llm, config.json is enough.",
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        "--device-memory", help="GiB, or a card: H200, H100, A100, v5e, v5p, v6e; else this one's."
    ),
]
Devices = Annotated[
    int | None, typer.Option("--devices", min=1, help="Of a dry run; else those of this job.")
]
Processes = Annotated[
    int | None, typer.Option("--processes", min=1, help="Of a dry run; else those of this job.")
]


def sft(
    llm: LLM,
    episodes: Annotated[Path, typer.Option("--episodes", help="Episodes to ask about.")],
    out: Out,
    config: Config = None,
    setting: Setting = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    device_memory: DeviceMemory = None,
    devices: Devices = None,
    processes: Processes = None,
    json: Json = False,
) -> None:
    """Stage I: learn patient dynamics from questions about recorded stays."""
    from sepsis_jax.pipelines.llm.memory_plan import Start, plan_sft
    from sepsis_jax.pipelines.llm.supervised import run_sft

    options = _options(config, setting).sft
    hardware = _hardware(device_memory, devices, processes, dry_run)
    _check([plan_sft(options, Start.load(llm), hardware)], dry_run, json)
    if dry_run:
        return
    with _alone(out), phases("stage I") as progress:
        reports = run_sft(
            out, options, llm=llm, episodes=episodes, resume=resume, progress=progress
        )
    _done(out, reports[-1].loss if reports else None, json)


def bc(
    llm: LLM,
    out: Out,
    model: Annotated[
        Path | None, typer.Option("--model", help="World model for the demonstrations.")
    ] = None,
    episodes: SomeEpisodes = None,
    records: Annotated[
        Path | None,
        typer.Option(
            "--records",
            help="Run of `sepsis-jax agent run` to learn from instead of demonstrations, such as "
            "of a strong model behind an endpoint; only its accepted stays are used.",
        ),
    ] = None,
    config: Config = None,
    setting: Setting = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    device_memory: DeviceMemory = None,
    devices: Devices = None,
    processes: Processes = None,
    json: Json = False,
) -> None:
    """Stage II: clone dialogues that propose, simulate, refine and prescribe."""
    from sepsis_jax.pipelines.llm.memory_plan import Start, plan_bc
    from sepsis_jax.pipelines.llm.supervised import run_bc

    options = _options(config, setting).bc
    hardware = _hardware(device_memory, devices, processes, dry_run)
    _check([plan_bc(options, Start.load(llm), hardware)], dry_run, json)
    if dry_run:
        return
    with _alone(out), phases("stage II") as progress:
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
        typer.Option("--backend", help="Generator: embedded, or vllm with --url."),
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
    dry_run: DryRun = False,
    device_memory: DeviceMemory = None,
    devices: Devices = None,
    processes: Processes = None,
    json: Json = False,
) -> None:
    """Stage III: reinforcement learning on simulated patients."""
    from sepsis_jax.pipelines.agent import BackendOptions
    from sepsis_jax.pipelines.llm.memory_plan import Start, plan_rl
    from sepsis_jax.pipelines.llm.rl import run_rl

    options = _options(config, setting).rl
    hardware = _hardware(device_memory, devices, processes, dry_run)
    plan = plan_rl(options, Start.load(llm), hardware, embedded=backend == "embedded")
    _check([plan], dry_run, json)
    if dry_run:
        return
    asked = BackendOptions(
        kind=backend, llm=str(llm), url=url, key_variable=key_variable, key_file=key_file,
        served_name=served_name,
    )  # fmt: skip
    with _alone(out), phases("stage III") as progress:
        found = run_rl(
            out, options, llm=llm, model=model, episodes=episodes, backend=asked,
            resume=resume, progress=progress,
        )  # fmt: skip
    if found:
        print_table("Last iteration", ("figure", "value"), list(found.items()))
    console.print(f"{out / 'model'}, metrics/, checkpoints/.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), **found})


def stages(
    out: Out,
    llm: Annotated[
        Path | None,
        typer.Option(
            "--llm",
            help="Hugging Face folder of a Qwen3 or Llama; a tiny random Qwen3 if not given.",
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
    dry_run: DryRun = False,
    device_memory: DeviceMemory = None,
    devices: Devices = None,
    processes: Processes = None,
    json: Json = False,
) -> None:
    """All three stages in a row, each evaluated on fresh patients and on questions."""
    from sepsis_jax.pipelines.llm.memory_plan import Start, plan_bc, plan_rl, plan_sft
    from sepsis_jax.pipelines.llm.stages import run_stages

    options = _options(config, setting)
    if llm is not None:  # a tiny one fits everywhere
        hardware, start = _hardware(device_memory, devices, processes, dry_run), Start.load(llm)
        plans = (
            plan_sft(options.sft, start, hardware),
            plan_bc(options.bc, start, hardware),
            plan_rl(options.rl, start, hardware),
        )
        _check(plans, dry_run, json)
    elif dry_run:
        raise InputError("--llm: a dry run needs the folder of the model, with its config.json")
    if dry_run:
        return
    with _alone(out), phases("all stages") as progress:
        table = run_stages(
            out, options, llm=llm, model=model, episodes=episodes, resume=resume,
            progress=progress,
        )  # fmt: skip
    columns = ("stage", "value", "low", "high", "valid", "completed", "adherence", "unsafe",
               "mortality_auroc", "vasopressor_auroc")  # fmt: skip
    shown = [name for name in columns if name in table]  # not every kind of question is asked
    rows = [
        [row[0], *("-" if value is None or value != value else f"{value:.2f}" for value in row[1:])]
        for row in table[shown].itertuples(index=False)
    ]
    print_table("Evaluation of each stage on fresh patients", tuple(shown), rows)
    console.print(f"{out / 'stages.csv'}, curves.png, a folder per stage.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "rows": table.to_dict("records")})


def _hardware(
    memory: str | None, devices: int | None, processes: int | None, dry_run: bool
) -> Hardware:
    from sepsis_jax.pipelines.llm.memory_plan import Hardware

    if not dry_run and (devices, processes) != (None, None):
        raise InputError("--devices, --processes: of a dry run alone; add --dry-run")
    return Hardware.of(memory, devices, processes)


def _check(
    plans: Sequence[Plan[SupervisedOptions] | Plan[RLOptions]], dry_run: bool, json: bool
) -> None:
    """Tells what the stages need of each device, and refuses what does not fit."""
    for plan in plans:
        if dry_run:
            rows = [(when, what, f"{size:.2f}") for when, what, size in plan.budget.rows()]
            print_table(f"{plan.name}: memory per device", ("when", "what", "GiB"), rows)
        console.print(plan.verdict(), soft_wrap=True)
    for plan in plans:
        plan.check()
    if dry_run and json:
        memory = plans[0].hardware.memory
        peaks = {plan.name: plan.budget.peak for plan in plans}
        print_json({"fits": True, "peak_bytes": peaks, "device_bytes": memory})


def _options(config: Path | None, setting: list[str] | None) -> StagesOptions:
    """The settings of all stages, of which each command takes its section; joins the job."""
    from policy.train.loop.distributed import start
    from sepsis_jax.pipelines.llm.stages import StagesOptions
    from worldmodel.configuration import resolve_config

    start()
    return resolve_config(StagesOptions, config, setting, source="--set")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """`claimed` by the first process of a job, for all of them."""
    from policy.train.loop.distributed import is_first

    with resumable(f"the same command with --resume goes on in {out}"):
        if is_first():
            with claimed(out):
                yield
        else:
            yield


def _done(out: Path, loss: float | None, json: bool) -> None:
    console.print(f"{out / 'model'}, metrics/, checkpoints/.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "loss": loss})


COMMANDS: dict[Callable[..., None], str] = {
    sft: "Example: sepsis-jax policy sft --llm runs/tiny-llm --episodes runs/demo/cohort "
    "--out runs/sft",
    bc: "Example: sepsis-jax policy bc --llm runs/sft/model --model runs/demo/model "
    "--set bc.demonstrator=titration --out runs/bc",
    rl: "Example: sepsis-jax policy rl --llm runs/bc/model --model runs/demo/model --out runs/rl",
    stages: "Example: sepsis-jax policy stages --config configs/train_tiny_cpu.yaml "
    "--out runs/stages",
}
"""Commands and their examples."""
