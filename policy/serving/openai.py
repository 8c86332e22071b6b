"""Dialogues over `/v1/chat/completions` of any OpenAI-compatible endpoint.

A vLLM server gives the tokens of a reply, which are read here as those of every other backend. Of
another endpoint only text and the calls that it found come back: calls in the text are read here,
and its own calls are taken as they are, unless they come from within a thought that can be seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

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
from policy.serving.tokens import TAIL, ends_in_thought, parse_reply, read_reply
from policy.serving.vllm.check import PLAIN_SAMPLING, UNKNOWN, detokenize

T = TypeVar("T")

REASONING_MODELS = frozenset({"temperature", "top_p", "seed"})
"""What OpenAI's reasoning models, o3 for instance, do not take."""

_SWITCHES = "chat_template_kwargs"


@dataclass(frozen=True)
class ChatOptions:
    """What an endpoint takes and gives."""

    vllm: bool = False  # a vLLM server: its tokens are read; see `check_server`
    omit: frozenset[str] = frozenset()  # parameters not to send; see REASONING_MODELS
    limit: str = "max_completion_tokens"  # what the limit is called; older ones: max_tokens
    extra: Mapping[str, object] = field(default_factory=dict)  # sent as it is, reasoning_effort say
    enable_thinking: bool | None = None  # switch of the chat template; None sends none


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


class _Heard(NamedTuple):
    """A reply, and how it is sent back in later requests."""

    reply: Reply
    message: Mapping[str, object]
    unsent: frozenset[str] = frozenset()  # calls that are no calls in this message, but text


class OpenAIConversation:
    """One dialogue; all of it is sent every time."""

    def __init__(
        self, client: Client, options: ChatOptions, tools: Sequence[Mapping[str, object]]
    ) -> None:
        """Starts with nothing said; see `OpenAIBackend.open`."""
        self._client, self._options = client, options
        self._tools = [dict(tool) for tool in tools]
        self._said: list[Message] = []
        self._unsent: frozenset[str] = frozenset()
        self._turns = 0

    async def ask(self, messages: Sequence[Message], *, sampling: Sampling, seed: int) -> Reply:
        """Appends messages and lets the model speak; see `Conversation.ask`.

        Raises:
          BackendError: the model could not be asked, or a filter cut its reply; the conversation
            is as it was.
        """
        said = [*self._said, *(self._sent(message) for message in messages)]
        body = self._body(said, sampling, seed)
        hear = self._hear_tokens if self._options.vllm else self._hear
        heard = await hear(body, f"call-{self._turns + 1}")
        self._said, self._unsent = [*said, heard.message], self._unsent | heard.unsent
        self._turns += 1
        return heard.reply

    def _body(self, said: Sequence[Message], sampling: Sampling, seed: int) -> dict[str, object]:
        options = self._options
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
            body |= {"logprobs": True, "return_token_ids": True, **PLAIN_SAMPLING}
            if self._tools:  # told to the model, but neither parsed nor forced by the server
                body["tool_choice"] = "none"
        body = {k: v for k, v in body.items() if k not in options.omit} | dict(options.extra)
        if options.enable_thinking is not None:
            given = options.extra.get(_SWITCHES)
            switches = dict(given) if isinstance(given, Mapping) else {}
            body[_SWITCHES] = {**switches, "enable_thinking": options.enable_thinking}
        return body

    def _sent(self, message: Message) -> Message:
        """A message as endpoints take it: what answers no call of theirs is a user's word."""
        if message["role"] == "tool" and message.get("tool_call_id") in self._unsent:
            return {"role": "user", "content": message["content"]}
        return dict(message)

    async def _hear(self, body: Mapping[str, object], id_prefix: str) -> _Heard:
        """A reply that the endpoint has taken apart, in its own way."""
        heard = await self._client.post(
            "/v1/chat/completions", body, lambda found: _heard(found, id_prefix)
        )
        self._refuse_cut(heard.reply.finish_reason)
        return heard

    async def _hear_tokens(self, body: Mapping[str, object], id_prefix: str) -> _Heard:
        """A reply that is read from its tokens, whatever the server made of them."""
        drawn = await self._client.post("/v1/chat/completions", body, _drawn)
        known = drawn.reply
        self._refuse_cut(known.finish_reason)
        assert known.prompt_ids is not None and known.token_ids is not None
        spoken = known.token_ids[:-1] if drawn.ended else known.token_ids
        text, tail = await asyncio.gather(
            detokenize(self._client, spoken), detokenize(self._client, known.prompt_ids[-TAIL:])
        )
        reply = read_reply(text, known, id_prefix=id_prefix, prompt_tail=tail)
        if all(call.name for call in reply.tool_calls):
            return _Heard(reply, as_message(reply))
        # Servers refuse dialogues with calls that are none, so the model's words go back as text.
        ids = frozenset(call.id for call in reply.tool_calls)
        return _Heard(reply, {"role": "assistant", "content": text}, ids)

    def _refuse_cut(self, finish_reason: str) -> None:
        if finish_reason not in (STOP, LENGTH, TOOL_CALLS):
            raise BackendError(f"{self._client.endpoint.model}: ended by {finish_reason}")


def _heard(found: object, id_prefix: str) -> _Heard:
    choice, reply = _choice(found)
    message = member(choice, "message", dict)
    content = _optional(message, "content", str) or ""
    given = _optional(message, "tool_calls", list) or ()
    calls = tuple(_call(call) for call in given)
    if reply.finish_reason == TOOL_CALLS and not calls:
        raise MalformedError("a call of tools without calls")
    if ends_in_thought(content):  # the endpoint looked for calls in thoughts, too
        calls = tuple(replace(call, name="") for call in calls)
    parts = parse_reply(content, id_prefix=f"{id_prefix}-text")
    reason = reply.finish_reason
    if (calls or parts.tool_calls) and reason == STOP:  # as some servers write
        reason = TOOL_CALLS
    thoughts = [
        _optional(message, "reasoning", str) or _optional(message, "reasoning_content", str),
        parts.reasoning,
    ]
    sent: dict[str, object] = {"role": "assistant", "content": content}
    if given:
        sent["tool_calls"] = [{"type": "function", **call} for call in given]
    reply = replace(
        reply,
        content=parts.content,
        tool_calls=(*calls, *parts.tool_calls),
        finish_reason=reason,
        reasoning="\n\n".join(filter(None, thoughts)),
    )
    return _Heard(reply, sent, frozenset(call.id for call in parts.tool_calls))


class _Drawn(NamedTuple):
    reply: Reply  # without what its tokens say
    ended: bool  # by a token that is the last of them


def _drawn(found: object) -> _Drawn:
    choice, reply = _choice(found)
    prompt_ids = integers(member(found, "prompt_token_ids", list), "prompt_token_ids")
    token_ids = integers(member(choice, "token_ids", list), "token_ids")
    entries = member(member(choice, "logprobs", dict), "content", list)
    logprobs = tuple(float(member(entry, "logprob", (int, float))) for entry in entries)
    if any(logprob <= UNKNOWN for logprob in logprobs):
        raise MalformedError("a token was drawn without a log-probability")
    if len(logprobs) != len(token_ids):
        raise MalformedError(f"{len(logprobs)} log-probabilities of {len(token_ids)} tokens")
    ended = reply.finish_reason != LENGTH and not isinstance(choice.get("stop_reason"), str)
    known = replace(reply, prompt_ids=prompt_ids, token_ids=token_ids, logprobs=logprobs)
    return _Drawn(known, ended)


def _choice(found: object) -> tuple[Mapping[str, object], Reply]:
    """The one choice of an answer, and the reply with what can be read without its message."""
    choices = member(found, "choices", list)
    if len(choices) != 1:
        raise MalformedError(f"{len(choices)} choices")
    choice: Mapping[str, object] = choices[0]
    finish = member(choice, "finish_reason", str)
    usage = _optional(found, "usage", dict) or {}
    counted = {
        name: usage[name]
        for name in ("prompt_tokens", "completion_tokens")
        if type(usage.get(name)) is int
    }
    return choice, Reply(content="", finish_reason=finish, usage=counted)


def _call(call: object) -> ToolCall:
    """A call that an endpoint found; without a name where it has more than a call has."""
    function = member(call, "function", dict)
    found = ToolCall(
        id=member(call, "id", str),
        name=member(function, "name", str),
        arguments=member(function, "arguments", str),
    )
    other = isinstance(call, dict) and call.get("type", "function") != "function"
    return replace(found, name="") if other or len(function) > 2 else found


def _optional(value: object, name: str, kind: type[T]) -> T | None:
    if not isinstance(value, dict) or value.get(name) is None:
        return None
    return member(value, name, kind)
