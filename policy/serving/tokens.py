"""Dialogues in token ids: later prompts contain the sampled ids of earlier replies unchanged.

Rendering the whole dialogue again for every turn would tokenise replies again, sometimes into other
tokens than were sampled, and log-probabilities would then be of a different sequence. Here ids are
only appended.

Qwen3 and the Hermes models write replies with tool calls as:

    <think> reasoning </think> content
    <tool_call>
    {"name": "prescription", "arguments": {"vasopressor": 1, "iv_fluid": 2}}
    </tool_call>

A chat template that ignores tools, such as SmolLM2's, is given them as Qwen3's template would say
them: in the system message, with the answers of tools in user messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from policy.serving.backend import (
    LENGTH,
    STOP,
    TOOL_CALLS,
    Generator,
    Message,
    Reply,
    Sampling,
    ToolCall,
    unique_names,
)
from worldmodel.errors import InputError

_MARK = "\u2063assistant\u2063"  # placeholder of a reply, to find what a template appends after it
_THINK, _THINK_END = "<think>", "</think>"
_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    f"within {_CALL}{_CALL_END} XML tags:\n{_CALL}\n"
    f'{{"name": <function-name>, "arguments": <args-json-object>}}\n{_CALL_END}',
)  # what Qwen3's chat template says before and after the schemas
_ANY_TOOL: tuple[Mapping[str, object], ...] = (
    {
        "type": "function",
        "function": {
            "name": "any",
            "description": "Any.",
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    },
)  # to see whether a template says anything of tools
TAIL = 16  # tokens of a prompt that hold a beginning of a thought at its end


class ReplyParts(NamedTuple):
    """A reply taken apart."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]


def parse_reply(text: str, *, id_prefix: str = "call", in_thought: bool = False) -> ReplyParts:
    """Takes a reply apart.

    Thoughts may stand anywhere; what is in one is no call, and neither are the pieces on its two
    sides together. What stands between call marks but is no call becomes a `ToolCall` without a
    name, and so does a call that was never closed: neither is dropped, and nothing is repaired.

    Args:
      text: of the reply.
      id_prefix: of the ids of its calls.
      in_thought: whether the prompt left a thought open.
    """
    thoughts, pieces = _thoughts(text, in_thought)
    spoken: list[str] = []
    calls: list[ToolCall] = []
    for piece in pieces:
        content, *blocks = piece.split(_CALL)
        for block in blocks:
            body, closed, after = block.partition(_CALL_END)
            content += after
            name, arguments = _call(body) if closed else ("", body)
            calls.append(ToolCall(f"{id_prefix}-{len(calls)}", name, arguments))
        spoken.append(content.strip())
    content = "\n\n".join(filter(None, spoken))
    reasoning = "\n\n".join(filter(None, map(str.strip, thoughts)))
    return ReplyParts(content, reasoning, tuple(calls))


def opens_thought(tail: str) -> bool:
    """Whether a prompt that ends with this text leaves a thought open, as some templates do."""
    return tail.rstrip().endswith(_THINK)


def ends_in_thought(text: str) -> bool:
    """Whether a thought is open where a text ends."""
    return text.rfind(_THINK) > text.rfind(_THINK_END)


def read_reply(text: str, known: Reply, *, id_prefix: str, prompt_tail: str) -> Reply:
    """A reply that was drawn as tokens, with what its text says.

    Args:
      text: of the reply, without the token that ended it.
      known: the rest of the reply; its finish reason is that of the tokens.
      id_prefix: of the ids of its calls.
      prompt_tail: text of the last tokens of the prompt.
    """
    parts = parse_reply(text, id_prefix=id_prefix, in_thought=opens_thought(prompt_tail))
    reason = known.finish_reason
    if reason != LENGTH:
        reason = TOOL_CALLS if parts.tool_calls else STOP
    return replace(
        known,
        content=parts.content,
        tool_calls=parts.tool_calls,
        reasoning=parts.reasoning,
        finish_reason=reason,
    )


def write_call(name: str, arguments: str) -> str:
    """The text of a call; `arguments` is a JSON object."""
    return mark_call(f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}')


def mark_call(body: str) -> str:
    """A text between the marks of a call, whatever it is."""
    return f"{_CALL}\n{body}\n{_CALL_END}"


def _thoughts(text: str, in_thought: bool) -> tuple[list[str], list[str]]:
    """Thoughts, which may be cut off, and what stands between them.

    Everything before an end without a beginning is a thought: the model began it somewhere.
    """
    thoughts: list[str] = []
    pieces: list[str] = []
    for part in re.split(f"({_THINK}|{_THINK_END})", text):
        if part == _THINK:
            in_thought = True
        elif part == _THINK_END:
            if not in_thought:
                thoughts, pieces = [*thoughts, *pieces], []
            in_thought = False
        else:
            (thoughts if in_thought else pieces).append(part)
    return thoughts, pieces


def _call(body: str) -> tuple[str, str]:
    """Name and arguments; an empty name and the body, without blanks around, if it is no call."""
    try:
        call = json.loads(body, object_pairs_hook=unique_names)
    except (ValueError, RecursionError):
        return "", body.strip()
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return "", body.strip()
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return "", body.strip()
    try:
        return name, json.dumps(arguments)
    except RecursionError:
        return "", body.strip()


def tools_as_text(
    messages: Sequence[Message], tools: Sequence[Mapping[str, object]]
) -> list[Message]:
    """Messages that say what Qwen3's chat template makes of tools, for one that ignores them.

    Args:
      messages: as for a template that knows tools.
      tools: their schemas; with none the system message stays as it is.

    Returns:
      A system message with the schemas, before or in the one that was given, and the answers of
      tools that follow one another as one user message.
    """
    found: list[Message] = []
    answers: list[str] = []
    for message in [*messages, None]:
        if message is not None and message["role"] == "tool":
            answers.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if answers:
            found.append({"role": "user", "content": "\n".join(answers)})
            answers = []
        if message is not None:
            found.append(message)
    if not tools:
        return found
    schemas = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = schemas.join(_TOOLS)
    if found and found[0]["role"] == "system":
        text = f"{found.pop(0)['content']}\n\n{text}"
    return [{"role": "system", "content": text}, *found]


class ChatTokens:
    """Messages as tokens, by the chat template of a tokenizer.

    Args:
      tokenizer: of transformers, with a chat template whose turns end with its `eos_token`.
      enable_thinking: switch of the template; None leaves it as the template has it.

    Raises:
      InputError: there is no such template, or it has no such switch.
    """

    # transformers has no one class of tokenizers
    def __init__(self, tokenizer: Any, *, enable_thinking: bool | None = None):
        template = getattr(tokenizer, "chat_template", None)
        if not template or not tokenizer.eos_token:
            raise InputError("tokenizer: has no chat template; give a folder of a chat model")
        self._switches: dict[str, bool] = {}
        if enable_thinking is not None:
            if "enable_thinking" not in str(template):
                raise InputError("enable_thinking: the model's chat template has no such switch")
            self._switches["enable_thinking"] = enable_thinking
        self._tokenizer = tokenizer
        self.end_id: int = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
        user = [{"role": "user", "content": "."}]
        self._knows_tools = self._template(user, _ANY_TOOL) != self._template(user, [])

    @classmethod
    def load(cls, path: str | Path, *, enable_thinking: bool | None = None) -> ChatTokens:
        """The tokenizer of a model's folder.

        Raises:
          InputError: it cannot be read, or has no switch `enable_thinking`.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"{path}: no readable tokenizer ({first})") from None
        return cls(tokenizer, enable_thinking=enable_thinking)

    def first(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]]
    ) -> list[int]:
        """The ids that begin a dialogue, up to where the model speaks."""
        return self._encode(self._render(messages, tools))

    def more(self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]]) -> list[int]:
        """The ids that follow a reply with its end token, up to where the model speaks again."""
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": _MARK}]
        text = self._render([*before, *messages], tools)
        _, found, after = text.partition(_MARK)
        _, ended, after = after.partition(self._tokenizer.eos_token)
        if not found or not ended:
            raise InputError("tokenizer: its chat template does not end turns with its eos token")
        return self._encode(after)

    def text(self, ids: Sequence[int]) -> str:
        """The text of a reply without its end token; marks of tool calls are kept."""
        kept = list(ids[:-1] if ids and ids[-1] == self.end_id else ids)
        result: str = self._tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return result

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of a reply."""
        return self._encode(text)

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]]) -> str:
        if self._knows_tools:
            return self._template(messages, tools)
        return self._template(tools_as_text(messages, tools), [])

    def _template(self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]]) -> str:
        result: str = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=True,
            **self._switches,
        )
        return result

    def _encode(self, text: str) -> list[int]:
        result: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return result


class TokenBackend:
    """A `Backend` over a `Generator`.

    Args:
      generator: draws tokens and scores them; closed with the backend.
      tokens: of the generator's model.
    """

    def __init__(self, generator: Generator, tokens: ChatTokens):
        self.generator, self.tokens = generator, tokens
        self.name = generator.name

    def open(self, tools: Sequence[Mapping[str, object]]) -> TokenConversation:
        """A new dialogue."""
        return TokenConversation(self, tools)

    async def close(self) -> None:
        """Closes the generator."""
        await self.generator.close()


class TokenConversation:
    """One dialogue; `ids` only grows."""

    def __init__(self, backend: TokenBackend, tools: Sequence[Mapping[str, object]]):
        self._backend, self._tools = backend, tools
        self._turns = 0
        self.ids: list[int] = []

    async def ask(self, messages: Sequence[Message], *, sampling: Sampling, seed: int) -> Reply:
        """See `Conversation`."""
        prompt = [*self.ids, *self._appended(messages)]
        drawn = await self._backend.generator.generate(prompt, sampling=sampling, seed=seed)
        self.ids = [*prompt, *drawn.token_ids]
        self._turns += 1
        known = Reply(
            content="",
            finish_reason=drawn.finish_reason,
            prompt_ids=tuple(prompt),
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            weight_version=drawn.weight_version,
            usage={"prompt_tokens": len(prompt), "completion_tokens": len(drawn.token_ids)},
        )
        tokens = self._backend.tokens
        return read_reply(
            tokens.text(drawn.token_ids),
            known,
            id_prefix=f"call-{self._turns}",
            prompt_tail=tokens.text(prompt[-TAIL:]),
        )

    def prefix(self, messages: Sequence[Message]) -> list[int]:
        """All ids up to where the model would speak after these messages; says nothing."""
        return [*self.ids, *self._appended(messages)]

    def _appended(self, messages: Sequence[Message]) -> list[int]:
        tokens = self._backend.tokens
        if not self.ids:
            return tokens.first(messages, self._tools)
        # A reply that was cut off, or ended by another token, gets the end that templates expect.
        ended = self.ids[-1] == tokens.end_id
        return [*([] if ended else [tokens.end_id]), *tokens.more(messages, self._tools)]
