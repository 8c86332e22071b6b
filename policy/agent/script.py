"""Scripted agents that read nothing: they simulate treatments and give the first of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

from policy.agent.tools import (
    MAX_OPTIONS,
    PRESCRIPTION,
    SIMULATION,
    prescription_arguments,
    simulation_arguments,
)
from policy.serving.backend import TOOL_CALLS, Message, Reply, ToolCall
from policy.serving.scripted import Script
from worldmodel import schema


def simulating(choose: Callable[[int], tuple[int, ...]]) -> Script:
    """A script for `ScriptedBackend`.

    Args:
      choose: by the seed of a reply, the one to three joint actions to simulate; the first of
        them is prescribed.
    """

    def script(messages: Sequence[Message], seed: int) -> Reply:
        name = f"call-{len(messages)}"
        last = messages[-1]
        if last["role"] == "tool" and last["name"] == SIMULATION:
            called = messages[-2]["tool_calls"][0]["function"]["arguments"]
            levels = json.loads(json.loads(called)["actions"][0])
            action = schema.action_index(*levels)
            call = ToolCall(name, PRESCRIPTION, prescription_arguments(action))
        else:
            call = ToolCall(name, SIMULATION, simulation_arguments(choose(seed)))
        return Reply(content="", tool_calls=(call,), finish_reason=TOOL_CALLS)

    return script


def _drawn(seed: int) -> tuple[int, ...]:
    draw = np.random.default_rng(seed)
    return tuple(draw.choice(schema.NUM_ACTIONS, MAX_OPTIONS, replace=False).tolist())


simulate_and_prescribe = simulating(_drawn)
"""Treatments are drawn by the seed, evenly."""
