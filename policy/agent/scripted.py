"""Backend that follows a script instead of a language model, for demonstrations and tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from policy.agent.tools import (
    MAX_OPTIONS,
    PRESCRIPTION,
    SIMULATION,
    prescription_arguments,
    simulation_arguments,
)
from policy.serving.backend import TOOL_CALLS, Message, Reply, Sampling, ToolCall, as_message
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
"""Simulates three actions drawn uniformly by the seed, and prescribes the first."""


Script = Callable[[Sequence[Message], int], Reply]
"""`(all messages so far, seed) -> reply`; its own replies are among the messages."""


class ScriptedBackend:
    """A backend whose replies are computed by a function.

    Args:
      script: see `Script`.
      name: for records.
    """

    def __init__(self, script: Script, *, name: str = "scripted"):
        self.script, self.name = script, name

    def open(self, tools: Sequence[Mapping[str, object]]) -> ScriptedConversation:
        """A new dialogue."""
        return ScriptedConversation(self.script)

    async def close(self) -> None:
        """Does nothing."""


class ScriptedConversation:
    """One dialogue."""

    def __init__(self, script: Script):
        self._script = script
        self._messages: list[Message] = []

    async def ask(self, messages: Sequence[Message], *, sampling: Sampling, seed: int) -> Reply:
        """See `Conversation`."""
        said = [*self._messages, *messages]
        reply = self._script(said, seed)
        self._messages = [*said, as_message(reply)]
        return reply
