"""A scripted agent that reads nothing: it simulates three treatments and gives the first."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from policy.agent.tools import (
    MAX_OPTIONS,
    PRESCRIPTION,
    SIMULATION,
    prescription_arguments,
    simulation_arguments,
)
from policy.serving.backend import TOOL_CALLS, Message, Reply, ToolCall
from worldmodel import schema


def simulate_and_prescribe(messages: Sequence[Message], seed: int) -> Reply:
    """A script for `ScriptedBackend`: treatments are drawn by the seed, evenly."""
    name = f"call-{len(messages)}"
    last = messages[-1]
    if last["role"] == "tool" and last["name"] == SIMULATION:
        called = messages[-2]["tool_calls"][0]["function"]["arguments"]
        levels = json.loads(json.loads(called)["actions"][0])
        call = ToolCall(name, PRESCRIPTION, prescription_arguments(schema.action_index(*levels)))
    else:
        drawn = np.random.default_rng(seed).choice(schema.NUM_ACTIONS, MAX_OPTIONS, replace=False)
        call = ToolCall(name, SIMULATION, simulation_arguments(tuple(drawn.tolist())))
    return Reply(content="", tool_calls=(call,), finish_reason=TOOL_CALLS)
