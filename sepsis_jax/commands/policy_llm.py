"""`sepsis-jax policy sft|bc|rl|stages`: train the language model that treats patients.

`sepsis-jax policy serve`: a language model behind vLLM, in the foreground.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
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
    errors,
    finite,
    phases,
    print_json,
    print_table,
    resumable,
)
from sepsis_jax.runs import claimed

if TYPE_CHECKING:
    from sepsis_jax.pipelines.llm.study import StudyOptions

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
    from sepsis_jax.pipelines.llm.supervised import run_sft

    options = _options(config, setting).sft
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
    json: Json = False,
) -> None:
    """Stage II: clone dialogues that propose, simulate, refine and prescribe."""
    from sepsis_jax.pipelines.llm.supervised import run_bc

    options = _options(config, setting).bc
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
    json: Json = False,
) -> None:
    """Stage III: reinforcement learning on simulated patients."""
    from sepsis_jax.pipelines.agent import BackendOptions
    from sepsis_jax.pipelines.llm.rl import run_rl

    options = _options(config, setting).rl
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
    json: Json = False,
) -> None:
    """All three stages in a row, each evaluated on fresh patients and on questions."""
    from sepsis_jax.pipelines.llm.study import run_study

    options = _options(config, setting)
    with _alone(out), phases("all stages") as progress:
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
    print_table("Evaluation of each stage on fresh patients", tuple(shown), rows)
    console.print(f"{out / 'stages.csv'}, curves.png, a folder per stage.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "rows": table.to_dict("records")})


def _options(config: Path | None, setting: list[str] | None) -> StudyOptions:
    """The settings of all stages, of which each command takes its section; joins the job."""
    from policy.train.loop.distributed import start
    from sepsis_jax.pipelines.llm.study import StudyOptions
    from worldmodel.configuration import resolve_config

    start()
    return resolve_config(StudyOptions, config, setting, source="--set")


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
    sft: "Example: sepsis-jax policy sft --llm models/Qwen3-4B --episodes runs/mimic "
    "--out runs/sft",
    bc: "Example: sepsis-jax policy bc --llm runs/sft/model --model runs/model "
    "--set bc.demonstrator=runs/planner --out runs/bc",
    rl: "Example: sepsis-jax policy rl --llm runs/bc/model --model runs/model --out runs/rl",
    stages: "Example: sepsis-jax policy stages --config configs/train_tiny_cpu.yaml "
    "--out runs/stages",
}
"""Commands and their examples."""


EPILOG = "Example: sepsis-jax policy serve --model runs/agent/weights --port 8000"


def serve(
    model: Annotated[Path, typer.Option("--model", help="Folder of weights, Hugging Face's form.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Name in requests; default: the folder's.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="0 takes a free one.")] = 0,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let --host be other than this machine alone.")
    ] = False,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", min=1, help="Tokens of prompt and reply together."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="bfloat16, float32...; auto takes the folder's, float32 on CPUs."
        ),
    ] = "auto",
    data_parallel: Annotated[
        int, typer.Option("--data-parallel", min=1, help="Copies of the model.")
    ] = 1,
    tensor_parallel: Annotated[
        int,
        typer.Option("--tensor-parallel", min=1, help="Devices that one copy is spread over."),
    ] = 1,
    lora_rank: Annotated[
        int, typer.Option("--lora-rank", min=0, help="Highest rank of adapters; 0 takes none.")
    ] = 0,
    swaps: Annotated[
        bool, typer.Option("--swaps", help="Let clients with the key swap weights and adapters.")
    ] = False,
    tool_parser: Annotated[
        str, typer.Option("--tool-parser", help="vLLM's parser of tool calls.")
    ] = "hermes",
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", help="New file for the key; default: a temporary one."),
    ] = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="File for what vLLM writes; default: temporary.")
    ] = None,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0, callback=finite, help="Seconds that the start may take."),
    ] = 900.0,
    json: Json = False,
) -> None:
    """Serve a language model with vLLM until Ctrl-C. With --json, one line when it is ready."""
    from policy.serving.vllm import KEY_VARIABLE, ServerError, ServerOptions, VLLMServer

    options = ServerOptions(
        model=model,
        name=name,
        host=host,
        port=port,
        allow_remote=allow_remote,
        max_model_len=max_model_len,
        dtype=dtype,
        data_parallel=data_parallel,
        tensor_parallel=tensor_parallel,
        lora_rank=lora_rank,
        swaps=swaps,
        tool_parser=tool_parser or None,
    )
    server = VLLMServer(options, log=log, timeout_s=timeout)
    from_variable = bool(os.environ.get(KEY_VARIABLE))
    written = None
    try:
        if key_file is not None or not from_variable:
            written = _write_key(server.key, key_file)
        with phases("serve", log_every=10.0) as progress:
            server.start(progress)
        where = f"file {written}" if written else f"variable {KEY_VARIABLE}"
        console.print(f"{server.url}/v1 serves {options.served_name}; key: {where}", soft_wrap=True)
        console.print(f"log: {server.log}; Ctrl-C stops.  {DISCLAIMER}", soft_wrap=True)
        if json:
            print_json(
                {
                    "url": f"{server.url}/v1",
                    "model": options.served_name,
                    "key_variable": KEY_VARIABLE if from_variable else None,
                    "key_file": str(written) if written else None,
                    "log": str(server.log),
                    "vllm": server.environment.version,
                    "cpu": server.environment.cpu,
                }
            )
        while server.alive:
            time.sleep(0.5)
        server.check()
    except ServerError as error:
        errors.print(f"sepsis-jax: {error}", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("sepsis-jax: the server is stopped")
    finally:
        server.stop()
        if written is not None:
            written.unlink(missing_ok=True)
            if key_file is None:
                written.parent.rmdir()


def _write_key(key: str, path: Path | None) -> Path:
    """Puts the key where its owner alone can read it; never into a file that exists."""
    from worldmodel.errors import InputError

    if path is None:
        path = Path(tempfile.mkdtemp(prefix="sepsis-jax-serve-")) / "key"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(f"--key-file {path}: exists; remove it or choose another") from None
    with os.fdopen(handle, "w") as file:
        file.write(key + "\n")
    return path
