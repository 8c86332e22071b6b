"""`sepsis-jax policy serve`: a language model behind vLLM, in the foreground."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import DISCLAIMER, Json, console, errors, finite, phases, print_json
from worldmodel.errors import InputError

EPILOG = "Example: sepsis-jax policy serve --model runs/tiny-llm --port 8000"


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
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory-utilization", help="vLLM's share of a GPU, beside a learner's; else 0.9."
        ),
    ] = None,
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
        gpu_memory_utilization=gpu_memory_utilization,
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
        with phases("serve") as progress:
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
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="sepsis-jax-serve-")) / "key"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(f"--key-file {path}: exists; remove it or choose another") from None
    with os.fdopen(handle, "w") as file:
        file.write(key + "\n")
    return path
