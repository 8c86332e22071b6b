"""Interfaces of language models: `Backend` for messages, `Generator` for token ids.

A `Backend` opens one `Conversation` per patient; the agent needs nothing else. `TokenBackend` of
`policy.serving.tokens` makes a backend of any generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

STOP, LENGTH, TOOL_CALLS = "stop", "length", "tool_calls"

# values are texts and lists of calls, read by their role
Message = Mapping[str, Any]
"""A chat message in OpenAI's form: role, content, and `tool_call_id` where the role is tool."""


class BackendError(Exception):
    """Raised when a model cannot be reached after all retries; nothing was generated."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling."""

    RENAMED: ClassVar[dict[str, str]] = {
        "max_new_tokens": "max_completion_length",
    }

    temperature: float = 0.7  # 0 takes the most probable token
    top_p: float = 0.95
    max_completion_length: int = 1024


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it; neither name nor arguments are checked here."""

    id: str
    name: str  # empty if the text is not a valid call
    arguments: str  # JSON if valid, else the text as it is


@dataclass(frozen=True)
class Completion:
    """Tokens drawn after a prompt."""

    token_ids: tuple[int, ...]  # with the token that ended it, if one did
    logprobs: tuple[float, ...]  # of each token under the distribution it was drawn from
    finish_reason: str  # STOP or LENGTH
    weight_version: str | None = None


@dataclass(frozen=True)
class Reply:
    """A reply of the model."""

    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = STOP  # STOP, LENGTH or TOOL_CALLS
    reasoning: str = ""  # set apart by a reasoning parser
    prompt_ids: tuple[int, ...] | None = None  # all the tokens before the reply, if known
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    weight_version: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)  # prompt_tokens, completion_tokens


class Conversation(Protocol):
    """One dialogue; keeps all earlier messages."""

    async def ask(self, messages: Sequence[Message], *, sampling: Sampling, seed: int) -> Reply:
        """Appends messages (system, user or tool), then asks for a reply.

        Args:
          messages: new ones alone, in order; a tool message answers a call of the last reply.
          sampling: how to draw.
          seed: equal seeds and equal dialogues draw equal replies, where the backend can.

        Raises:
          BackendError: the model could not be reached; the conversation is as it was before, so
            the same call may be made again.
        """
        ...


class Backend(Protocol):
    """A language model that takes part in many dialogues at once."""

    name: str  # for records: the model's name or folder

    def open(self, tools: Sequence[Mapping[str, object]]) -> Conversation:
        """A new dialogue with tools as JSON schemas in OpenAI's form."""
        ...

    async def close(self) -> None:
        """Closes connections and tasks."""
        ...


class Generator(Protocol):
    """A language model at the level of tokens."""

    name: str

    async def generate(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, seed: int
    ) -> Completion:
        """Draws tokens until one of the model's stop tokens or the limit.

        Raises:
          BackendError: the model could not be reached.
        """
        ...

    async def score(
        self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """Summed log-probability of each continuation after the prompt, at temperature 1.

        Raises:
          BackendError: the model could not be reached.
        """
        ...

    async def close(self) -> None:
        """Closes connections and tasks."""
        ...


def as_message(reply: Reply) -> dict[str, object]:
    """A reply as a message in OpenAI's form."""
    message: dict[str, object] = {"role": "assistant", "content": reply.content}
    if reply.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in reply.tool_calls
        ]
    return message
