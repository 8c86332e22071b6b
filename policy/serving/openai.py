"""Dialogues over `/v1/chat/completions` of any OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from policy.serving.backend import (
    LENGTH,
    STOP,
    TOOL_CALLS,
    BackendError,
    Message,
    Reply,
    Sampling,
    ToolCall,
    as_message,
)
from policy.serving.client import Client, Endpoint, MalformedError, integers, member

T = TypeVar("T")

_UNKNOWN = -9999.0  # stands for one that vLLM does not have, or cannot write as JSON

REASONING_MODELS = frozenset({"temperature", "top_p", "seed"})
"""What OpenAI's reasoning models, o3 for instance, do not take."""


@dataclass(frozen=True)
class ChatOptions:
    """What an endpoint takes and gives."""

    vllm: bool = False  # gives token ids and log-probabilities of what it read and wrote
    omit: frozenset[str] = frozenset()  # parameters not to send; see REASONING_MODELS
    limit: str = "max_completion_tokens"  # what the limit is called; older ones: max_tokens
    extra: Mapping[str, object] = field(default_factory=dict)  # sent as it is, reasoning_effort say


class OpenAIBackend:
    """A `Backend` behind HTTP."""

    def __init__(
        self, endpoint: Endpoint, options: ChatOptions | None = None, *, key: str | None = None
    ) -> None:
        """Opens no connection yet.

        Args:
          endpoint: whom to ask.
          options: what it takes.
          key: instead of the endpoint's variable or file.

        Raises:
          InputError: the URL or the key is missing.
        """
        self.name = endpoint.model
        self.options = options or ChatOptions()
        self._client = Client(endpoint, key=key)

    def open(self, tools: Sequence[Mapping[str, object]]) -> OpenAIConversation:
        """A new dialogue with tools as JSON schemas in OpenAI's form."""
        return OpenAIConversation(self._client, self.options, tools)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()


class OpenAIConversation:
    """One dialogue; all of it is sent every time."""

    def __init__(
        self, client: Client, options: ChatOptions, tools: Sequence[Mapping[str, object]]
    ) -> None:
        """Starts with nothing said; see `OpenAIBackend.open`."""
        self._client, self._options = client, options
        self._tools = [dict(tool) for tool in tools]
        self._said: list[Message] = []

    async def ask(self, messages: Sequence[Message], *, sampling: Sampling, seed: int) -> Reply:
        """Appends messages and lets the model speak; see `Conversation.ask`.

        Raises:
          BackendError: the model could not be asked, or a filter cut its reply; the conversation
            is as it was.
        """
        options = self._options
        said = [*self._said, *(dict(message) for message in messages)]
        body: dict[str, object] = {
            "model": self._client.endpoint.model,
            "messages": said,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            options.limit: sampling.max_completion_length,
        }
        if self._tools:
            body["tools"] = self._tools
        if options.vllm:
            body |= {"logprobs": True, "return_token_ids": True}
        body = {k: v for k, v in body.items() if k not in options.omit} | dict(options.extra)
        reply = await self._client.post(
            "/v1/chat/completions", body, lambda found: _reply(found, options)
        )
        if reply.finish_reason not in (STOP, LENGTH, TOOL_CALLS):
            raise BackendError(f"{self._client.endpoint.model}: ended by {reply.finish_reason}")
        self._said = [*said, as_message(reply)]
        return reply


def _reply(found: object, options: ChatOptions) -> Reply:
    choices = member(found, "choices", list)
    if len(choices) != 1:
        raise MalformedError(f"{len(choices)} choices")
    choice = choices[0]
    message = member(choice, "message", dict)
    finish = member(choice, "finish_reason", str)
    calls = tuple(_call(call) for call in _optional(message, "tool_calls", list) or ())
    if calls and finish == STOP:  # as some servers write
        finish = TOOL_CALLS
    if finish == TOOL_CALLS and not calls:
        raise MalformedError("a call of tools without calls")
    prompt_ids = token_ids = logprobs = None
    if options.vllm:
        prompt_ids = integers(member(found, "prompt_token_ids", list), "prompt_token_ids")
        token_ids = integers(member(choice, "token_ids", list), "token_ids")
        entries = member(member(choice, "logprobs", dict), "content", list)
        logprobs = tuple(float(member(entry, "logprob", (int, float))) for entry in entries)
        if any(logprob <= _UNKNOWN for logprob in logprobs):
            raise MalformedError("a token was drawn without a log-probability")
        if len(logprobs) != len(token_ids):
            raise MalformedError(f"{len(logprobs)} log-probabilities of {len(token_ids)} tokens")
    usage = _optional(found, "usage", dict) or {}
    reasoning = _optional(message, "reasoning", str) or _optional(message, "reasoning_content", str)
    return Reply(
        content=_optional(message, "content", str) or "",
        tool_calls=calls,
        finish_reason=finish,
        reasoning=reasoning or "",
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        logprobs=logprobs,
        usage={
            name: usage[name]
            for name in ("prompt_tokens", "completion_tokens")
            if type(usage.get(name)) is int
        },
    )


def _call(call: object) -> ToolCall:
    function = member(call, "function", dict)
    return ToolCall(
        id=member(call, "id", str),
        name=member(function, "name", str),
        arguments=member(function, "arguments", str),
    )


def _optional(value: object, name: str, kind: type[T]) -> T | None:
    if not isinstance(value, dict) or value.get(name) is None:
        return None
    return member(value, name, kind)
