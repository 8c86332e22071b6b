"""A record as a page that people read."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from policy.agent.dialogue import COMPLETED
from worldmodel import schema


class Entry(NamedTuple):
    """Something said, and by whom."""

    speaker: str
    text: str


def markdown(record: Mapping[str, Any]) -> str:
    """The dialogue of a stay as Markdown; what was said stands in fences."""
    parts = [f"# Patient {record['patient']}", _headline(record)]
    for entry in entries(record):
        fence = "```"
        while fence in entry.text:
            fence += "`"
        parts.append(f"**{entry.speaker}**\n\n{fence}\n{entry.text}\n{fence}")
    return "\n\n".join(parts) + "\n"


def page(record: Mapping[str, Any]) -> str:
    """The same as one self-contained HTML page; whatever was said is text, never markup."""
    body = "\n".join(
        f"<section><h2>{html.escape(entry.speaker)}</h2><pre>{html.escape(entry.text)}</pre>"
        "</section>"
        for entry in entries(record)
    )
    title = f"Patient {record['patient']}"
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>{title}</title>\n<style>body{{font-family:sans-serif;max-width:60rem;"
        "margin:2rem auto}pre{white-space:pre-wrap;background:#f4f4f4;padding:.8rem}"
        "h2{font-size:1rem;margin-bottom:.2rem}</style>\n"
        f"<h1>{title}</h1>\n<p>{html.escape(_headline(record))}</p>\n{body}\n</html>\n"
    )


def entries(record: Mapping[str, Any]) -> Iterator[Entry]:
    """All that was said, in order."""
    for turn in record["turns"]:
        for message in turn["messages"]:
            name = f": {message['name']}" if message["role"] == "tool" else ""
            yield Entry(f"{message['role']}{name}", message["content"])
        reply = turn["reply"]
        if reply["reasoning"]:
            yield Entry("assistant thinks", reply["reasoning"])
        if reply["content"] or not reply["tool_calls"]:
            yield Entry("assistant", reply["content"])
        for call in reply["tool_calls"]:
            yield Entry("assistant calls", f"{call['name'] or '(unreadable)'} {call['arguments']}")
    if record["closing"]:
        yield Entry("tool: prescription", record["closing"])


def _headline(record: Mapping[str, Any]) -> str:
    given = ", ".join(
        json.dumps([int(level) for level in schema.action_levels(decision["action"])])
        for decision in record["decisions"]
    )
    ended = (
        f"{record['outcome']}, total reward {record['total_reward']:.2f}"
        if record["status"] == COMPLETED
        else f"failed: {record['failure']} ({record['detail']})"
    )
    return (
        f"Simulated, not a real patient's care. {ended}; {len(record['decisions'])} decisions "
        f"(vasopressor, fluid): {given or 'none'}; {sum(record['invalid'].values())} invalid calls."
    )
