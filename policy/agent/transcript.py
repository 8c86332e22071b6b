"""Transcripts of records in Markdown and HTML, and result files in the format of SepsisAgent."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from policy.agent.dialogue import COMPLETED
from policy.agent.records import Record
from worldmodel import schema
from worldmodel.clinical import rules


class Entry(NamedTuple):
    """A message and its speaker."""

    speaker: str
    text: str


def markdown(record: Record) -> str:
    """The dialogue of a stay as Markdown; messages are fenced code blocks."""
    parts = [f"# Patient {record['patient']}", _headline(record)]
    for entry in entries(record):
        fence = "```"
        while fence in entry.text:
            fence += "`"
        parts.append(f"**{entry.speaker}**\n\n{fence}\n{entry.text}\n{fence}")
    return "\n\n".join(parts) + "\n"


def page(record: Record) -> str:
    """The dialogue of a stay as a self-contained HTML page; messages are escaped."""
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


def entries(record: Record) -> Iterator[Entry]:
    """All messages in order."""
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


def _headline(record: Record) -> str:
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


def published_results(records: Iterable[Record]) -> list[dict[str, object]]:
    """One entry per completed stay: metadata and the log of messages.

    Failed stays are left out, since the format does not allow them. `real` is the recorded course,
    if the record has it.
    """
    done = [record for record in records if record["status"] == COMPLETED]
    return [
        {"metadata": _metadata(number, record), "messages": list(_messages(record))}
        for number, record in enumerate(done)
    ]


def _metadata(number: int, record: Record) -> dict[str, object]:
    decisions = record["decisions"]
    return {
        "episode_id": number,
        "stay_id": record["patient"],
        "model": {
            "total_reward": record["total_reward"],
            "trajectory_length": len(decisions),
            "outcome": record["outcome"],
            "actions": actions_text(decision["action"] for decision in decisions),
        },
        "real": record.get("real"),
        "guideline_compliance": {
            "total_prescriptions": len(decisions),
            "hypoperfusion_violations": sum(g1(decision) for decision in decisions),
            "vaso_weaning_violations": sum(g2(decision) for decision in decisions),
        },
    }


def actions_text(actions: Iterable[int]) -> str:
    """Joint actions as "[vasopressor,fluid],[vasopressor,fluid]"."""
    return ",".join("[{},{}]".format(*schema.action_levels(int(action))) for action in actions)


# fields of several types; a record's decision or `vars` of a `Decision`
def g1(decision: Mapping[str, Any]) -> bool:
    """Whether a decision leaves hypoperfusion untreated."""
    levels = schema.action_levels(decision["action"])
    return bool(rules.g1_untreated_hypoperfusion(decision["meanbp"], decision["lactate"], *levels))


def g2(decision: Mapping[str, Any]) -> bool:
    """Whether a decision raises the vasopressor without need."""
    vasopressor, _ = schema.action_levels(decision["action"])
    return bool(
        rules.g2_unneeded_escalation(
            decision["meanbp"], vasopressor, decision["previous_vasopressor"], decision["step"]
        )
    )


def _messages(record: Record) -> Iterable[dict[str, object]]:
    for turn in record["turns"]:
        for message in turn["messages"]:
            role = "tool_response" if message["role"] == "tool" else message["role"]
            yield {"role": role, "content": message["content"]}
        reply = turn["reply"]
        yield {"role": "assistant", "content": reply["content"]}
        for call in reply["tool_calls"]:
            content = json.dumps({"name": call["name"], "arguments": call["arguments"]})
            yield {"role": "tool_call", "content": content}
    if record["closing"]:
        yield {"role": "tool_response", "content": record["closing"]}
