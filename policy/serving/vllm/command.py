"""The environment in which vLLM is installed, and the command that starts a server."""

from __future__ import annotations

import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from policy.serving.client import is_loopback
from worldmodel.errors import InputError

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable that holds the key of servers started here, and of their clients."""

PLUGINS = Path(__file__).with_name("plugins")


@dataclass(frozen=True)
class ServerOptions:
    """How a folder of weights is served.

    `swaps` opens vLLM's endpoints for new weights and adapters, which can also run code in the
    server: they ask for the key, and only servers on the loopback interface get them.
    """

    model: Path  # Hugging Face folder
    name: str | None = None  # in requests; default: the folder's name
    host: str = "127.0.0.1"
    port: int = 0  # 0 takes a free one
    allow_remote: bool = False  # lets the host be other than loopback
    max_model_len: int | None = None  # tokens of prompt and reply; default: the model's own
    dtype: str = "auto"  # the folder's own; on CPUs float32
    data_parallel: int = 1
    tensor_parallel: int = 1
    lora_rank: int = 0  # highest rank of adapters; 0 takes none
    swaps: bool = False
    tool_parser: str | None = "hermes"
    eager: bool | None = None  # no compilation; default: on CPUs
    gpu_memory_utilization: float | None = None  # vLLM's share of a GPU; default: its own, 0.9
    cpu_cache_gib: float = 1.0  # for keys and values, on CPUs
    seed: int = 0
    extra: tuple[str, ...] = ()  # further flags of vLLM, as they are

    @property
    def served_name(self) -> str:
        """The name that requests give."""
        return self.name or self.model.resolve().name


def check_options(options: ServerOptions) -> None:
    """Refuses what cannot or must not be served.

    Raises:
      InputError: says what and how to mend it.
    """
    if not (options.model / "config.json").is_file():
        raise InputError(
            f"{options.model}: no config.json; give a folder of weights in Hugging Face's form"
        )
    try:
        json.loads((options.model / "config.json").read_text())
    except ValueError as error:
        raise InputError(f"{options.model / 'config.json'}: not readable JSON ({error})") from None
    if not any(options.model.glob("*.safetensors")):
        raise InputError(f"{options.model}: no weights (*.safetensors)")
    if not is_loopback(options.host):
        if not options.allow_remote:
            raise InputError(
                f"host {options.host}: not of this machine alone; keep 127.0.0.1, or set "
                "allow_remote"
            )
        if options.swaps:
            raise InputError(
                f"host {options.host}: weights can be swapped on loopback hosts only; serve on "
                "127.0.0.1 or without swaps"
            )
    if not 0 <= options.port <= 65535:
        raise InputError(f"port {options.port}: expected 0 (a free one) to 65535")
    share = options.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        raise InputError(f"gpu_memory_utilization {share}: expected above 0 and at most 1")
    for what in ("data_parallel", "tensor_parallel"):
        if getattr(options, what) < 1:
            raise InputError(f"{what} {getattr(options, what)}: expected at least 1")


def make_key(variable: str = KEY_VARIABLE) -> str:
    """The key in an environment variable, or else a new one of 256 bits."""
    return os.environ.get(variable) or secrets.token_urlsafe(32)


def command(environment: ServingEnvironment, options: ServerOptions, port: int) -> list[str]:
    """The command line; it holds no secret."""
    flags: dict[str, str | None] = {
        "--model": str(options.model.resolve()),
        "--served-model-name": options.served_name,
        "--host": options.host,
        "--port": str(port),
        # Some virtual CPUs announce AMX, which bfloat16 is computed with, and die of it.
        "--dtype": "float32" if environment.cpu and options.dtype == "auto" else options.dtype,
        "--seed": str(options.seed),
        # Log-probabilities of the distribution that was drawn from, temperature included.
        "--logprobs-mode": "processed_logprobs",
        # The folder's own top-k and temperature would apply to whoever leaves them out.
        "--generation-config": "vllm",
        "--max-logprobs": "128",
        "--enable-scale-out": None,  # token ids in and out, with the version of the weights
        "--middleware": "sepsis_jax_key.KeyOnEveryPath",
        "--disable-uvicorn-access-log": None,
    }
    if options.max_model_len is not None:
        flags["--max-model-len"] = str(options.max_model_len)
    if options.gpu_memory_utilization is not None:
        flags["--gpu-memory-utilization"] = f"{options.gpu_memory_utilization:g}"
    if options.data_parallel > 1:
        flags["--data-parallel-size"] = str(options.data_parallel)
    if options.tensor_parallel > 1:
        flags["--tensor-parallel-size"] = str(options.tensor_parallel)
    if options.lora_rank:
        flags["--enable-lora"] = None
        flags["--max-lora-rank"] = str(options.lora_rank)
    if options.swaps:
        flags["--worker-extension-cls"] = "sepsis_jax_worker.WeightTools"
    if options.tool_parser:
        flags["--enable-auto-tool-choice"] = None
        flags["--tool-call-parser"] = options.tool_parser
    if environment.cpu if options.eager is None else options.eager:
        flags["--enforce-eager"] = None
    if environment.cpu:
        # A prompt that is read in parts, drawn from with a seed, ends the engine of vLLM 0.32.
        flags["--no-enable-chunked-prefill"] = None
    words = [word for flag, value in flags.items() for word in (flag, value) if word is not None]
    # The `vllm` program fails in the CPU build: it looks for a package named vllm.
    module = "vllm.entrypoints.openai.api_server"
    return [str(environment.python), "-m", module, *words, *options.extra]


def variables(environment: ServingEnvironment, options: ServerOptions, key: str) -> dict[str, str]:
    """Environment variables of the server: those of this process, the key, and no telemetry."""
    found = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONHOME", "VIRTUAL_ENV", "VLLM_SERVER_DEV_MODE")
    }
    found |= {
        KEY_VARIABLE: key,
        "PYTHONPATH": str(PLUGINS),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if environment.cpu:
        found |= {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": f"{options.cpu_cache_gib:g}",
        }
    if options.swaps:
        found["VLLM_SERVER_DEV_MODE"] = "1"
        if options.lora_rank:
            found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    return found


VARIABLE = "SEPSIS_JAX_SERVING"
"""Environment variable that names another serving environment: the folder with `bin/python`."""

_CHECKOUT = Path(__file__).resolve().parents[3]
_DISTRIBUTION = re.compile(r"(vllm|vllm_cpu)-([^-]+)\.dist-info")


@dataclass(frozen=True)
class ServingEnvironment:
    """A Python that can run vLLM."""

    python: Path
    version: str  # of vLLM
    cpu: bool  # the build for CPUs; otherwise CUDA's


def find_environment(path: Path | None = None) -> ServingEnvironment:
    """The serving environment; reads file names alone and runs nothing.

    Args:
      path: folder of the environment. Else $SEPSIS_JAX_SERVING, else `.venv-serving` in the
        checkout, else in the current folder.

    Raises:
      InputError: there is none, or vLLM is not in it.
    """
    named = os.environ.get(VARIABLE)
    if path is None and named:
        path = Path(named)
    places = [path] if path else [_CHECKOUT / ".venv-serving", Path(".venv-serving")]
    folder = next((place for place in places if (place / "bin" / "python").exists()), None)
    mend = f"make it with `make serving` in the checkout, or name one in ${VARIABLE}"
    if folder is None:
        raise InputError(f"{places[0]}: no environment in which vLLM is installed; {mend}")
    for entry in sorted(folder.glob("lib/python3*/*-packages/vllm*.dist-info")):
        if found := _DISTRIBUTION.fullmatch(entry.name):
            name, version = found.groups()
            # Not resolved: the link in a virtual environment is what selects its packages.
            python = folder.absolute() / "bin" / "python"
            return ServingEnvironment(python, version, cpu=name == "vllm_cpu" or "cpu" in version)
    raise InputError(f"{folder}: vLLM is not installed in this environment; {mend}")
