"""Language models by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policy.serving.backend import Backend
from worldmodel.errors import InputError

EMBEDDED, VLLM, OPENAI, SCRIPTED = KINDS = ("embedded", "vllm", "openai", "scripted")


@dataclass(frozen=True)
class BackendOptions:
    """Which model is asked, and where it runs.

    Attributes:
      kind: "embedded" (a Qwen3 folder in this process), "vllm" (a server of such a folder, token
        by token), "openai" (any OpenAI-compatible endpoint, message by message), or "scripted"
        (draws treatments and reads nothing).
      llm: folder of the model (for vllm of its tokenizer), or the endpoint's name of it.
      url: of the endpoint, such as http://127.0.0.1:8000/v1.
      key_variable: environment variable that holds the endpoint's key; none is sent without it.
      key_file: file that holds the key, where the variable is not set.
      served_name: the server's name of the model, where it is not the folder's name.
      reasoning: the endpoint takes neither temperature, top_p nor seed, as o3.
      extra: further parameters of the endpoint's requests, each NAME=VALUE with YAML values.
    """

    kind: str = EMBEDDED
    llm: str | None = None
    url: str | None = None
    key_variable: str | None = None
    key_file: Path | None = None
    served_name: str | None = None
    reasoning: bool = False
    extra: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"--backend: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.kind != SCRIPTED and not self.llm:
            raise InputError("--llm: name the model's folder, or the endpoint's name of it")
        if self.kind in (VLLM, OPENAI) and not self.url:
            raise InputError(
                f"--url: the {self.kind} backend needs one, as http://127.0.0.1:8000/v1"
            )


def open_backend(options: BackendOptions) -> Backend:
    """A backend, ready to be asked.

    Raises:
      InputError: a folder that cannot be read, or a key that is missing.
    """
    if options.kind == SCRIPTED:
        from policy.agent.script import simulate_and_prescribe
        from policy.serving.scripted import ScriptedBackend

        return ScriptedBackend(simulate_and_prescribe)
    llm = str(options.llm)
    if options.kind == EMBEDDED:
        from policy.serving.embedded import EmbeddedGenerator
        from policy.serving.tokens import ChatTokens, TokenBackend

        return TokenBackend(EmbeddedGenerator.from_folder(llm), ChatTokens.load(llm))
    server = endpoint(options)
    if options.kind == VLLM:
        from policy.serving.tokens import ChatTokens, TokenBackend
        from policy.serving.vllm.generator import VLLMGenerator

        return TokenBackend(VLLMGenerator(server), ChatTokens.load(llm))
    from policy.serving.openai import REASONING_MODELS, ChatOptions, OpenAIBackend

    omit = REASONING_MODELS if options.reasoning else frozenset()
    return OpenAIBackend(server, ChatOptions(omit=omit, extra=_parameters(options.extra)))


def endpoint(options: BackendOptions) -> Any:
    """The endpoint of a vllm or openai backend, as `policy.serving.client.Endpoint`."""
    from policy.serving.client import Endpoint

    llm = Path(str(options.llm))
    name = options.served_name or (llm.resolve().name if options.kind == VLLM else str(options.llm))
    return Endpoint(
        url=str(options.url),
        model=name,
        key_variable=options.key_variable,
        key_file=options.key_file,
    )


def _parameters(texts: tuple[str, ...]) -> dict[str, Any]:
    import yaml

    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise InputError(f"--extra: {text!r} is not NAME=VALUE")
        found[name] = yaml.safe_load(value)
    return found
