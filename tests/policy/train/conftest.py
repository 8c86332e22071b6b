"""A tokenizer, and stays that no world was needed for."""

import json

import pytest

from policy.agent.dialogue import COMPLETED, Stay, Turn
from policy.serving.backend import TOOL_CALLS, Reply, ToolCall
from policy.serving.tokens import ChatTokens
from policy.testing.tiny_qwen3 import make_tiny


def stay_of(number, decisions):
    """A stay with a simulation and a prescription per decision."""
    said = ({"role": "user", "content": f"Patient {number}. MAP 61 lactate 2.4"},)
    turns = []
    for step in range(decisions):
        for name, arguments in (
            ("simulation", {"actions": ["[1, 2]", f"[{step % 5}, 0]"]}),
            ("prescription", {"vasopressor": 1, "iv_fluid": step % 5}),
        ):
            call = ToolCall(f"call-{len(turns)}", name, json.dumps(arguments))
            turns.append(
                Turn(said, Reply("", (call,), TOOL_CALLS), seed=len(turns), opens=not turns)
            )
            answer = f"t {step} MAP 7{step} lactate 1.{step}"
            said = ({"role": "tool", "tool_call_id": call.id, "name": name, "content": answer},)
    return Stay(number, status=COMPLETED, turns=turns)


@pytest.fixture(scope="session")
def untaught(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("untaught") / "tiny", initializer_range=0.1)


@pytest.fixture(scope="session")
def tokens(untaught):
    return ChatTokens.load(untaught)
