"""Tool calls in the text of a reply, as Qwen3 and the Hermes models write them.

<think> reasoning </think> content
<tool_call>
{"name": "prescription", "arguments": {"vasopressor": 1, "iv_fluid": 2}}
</tool_call>
"""

from __future__ import annotations

import json
from typing import NamedTuple

from policy.serving.backend import ToolCall

_THINK, _THINK_END = "<think>", "</think>"
_CALL, _CALL_END = "<tool_call>", "</tool_call>"


class Parts(NamedTuple):
    """A reply taken apart."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]


def parse(text: str, *, id_prefix: str = "call") -> Parts:
    """Takes a reply apart.

    What stands between call marks but is no call becomes a `ToolCall` without a name, and so does
    a call that was never closed: neither is dropped, and nothing is repaired.
    """
    reasoning, text = _reasoning(text)
    content, *blocks = text.split(_CALL)
    calls: list[ToolCall] = []
    for block in blocks:
        body, closed, after = block.partition(_CALL_END)
        content += after
        name, arguments = _call(body.strip()) if closed else ("", body)
        calls.append(ToolCall(f"{id_prefix}-{len(calls)}", name, arguments))
    return Parts(content.strip(), reasoning, tuple(calls))


def write(name: str, arguments: str) -> str:
    """The text of a call; `arguments` is a JSON object."""
    return f'{_CALL}\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n{_CALL_END}'


def _reasoning(text: str) -> tuple[str, str]:
    """Reasoning, which may be cut off or opened by the prompt, and the rest."""
    before, closed, after = text.partition(_THINK_END)
    if closed:
        return before.replace(_THINK, "", 1).strip(), after
    if text.lstrip().startswith(_THINK):
        return text.lstrip()[len(_THINK) :].strip(), ""
    return "", text


def _call(body: str) -> tuple[str, str]:
    """Name and arguments; an empty name and the body itself where it is no call."""
    try:
        call = json.loads(body, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):
        return "", body
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return "", body
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return "", body
    try:
        return name, json.dumps(arguments)
    except RecursionError:
        return "", body


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is given twice")
    return dict(pairs)
