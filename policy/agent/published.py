"""Records in the form of SepsisAgent's result files (arXiv 2605.14723)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from policy.agent.dialogue import COMPLETED
from worldmodel import schema
from worldmodel.clinical import rules


def published_results(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per completed stay: metadata and the log of messages.

    Failed stays are left out, since that form has no place for them. `real`, the recorded course,
    is there where the record has it.
    """
    done = [record for record in records if record["status"] == COMPLETED]
    return [
        {"metadata": _metadata(number, record), "messages": list(_messages(record))}
        for number, record in enumerate(done)
    ]


def _metadata(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
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


def _messages(record: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
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
