"""Backend that follows a script instead of a language model, for demonstrations and tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from policy.agent.tools import (
    MAX_OPTIONS,
    PRESCRIPTION,
    SIMULATION,
    InvalidCallError,
    prescription_arguments,
    read_call,
    simulation_arguments,
)
from policy.serving.backend import (
    STOP,
    TOOL_CALLS,
    Message,
    Reply,
    Sampling,
    ToolCall,
    as_message,
)
from policy.serving.tokens import parse_reply, write_call
from worldmodel import schema


def was_simulated(messages: Sequence[Message]) -> bool:
    """Whether the last message answers a simulation."""
    last = messages[-1]
    return bool(last["role"] == "tool" and last["name"] == SIMULATION)


def simulate(messages: Sequence[Message], actions: Sequence[int]) -> Reply:
    """The reply to these messages that simulates one to three joint actions."""
    return _calling(messages, SIMULATION, simulation_arguments(tuple(actions)))


def prescribe(messages: Sequence[Message], action: int) -> Reply:
    """The reply to these messages that prescribes a joint action."""
    return _calling(messages, PRESCRIPTION, prescription_arguments(action))


def damaged(reply: Reply, draw: np.random.Generator) -> Reply:
    """A reply from which a piece was cut out, so that it asks for nothing that can be done.

    Args:
      reply: with one call.
      draw: of the piece.
    """
    (call,) = reply.tool_calls
    text = write_call(call.name, call.arguments)
    while True:
        start, stop = sorted(draw.integers(0, len(text) + 1, 2).tolist())
        parts = parse_reply(text[:start] + text[stop:], id_prefix=call.id)
        try:
            found = [read_call(one) for one in parts.tool_calls]
        except InvalidCallError:
            found = []
        if not found:
            reason = TOOL_CALLS if parts.tool_calls else STOP
            return Reply(parts.content, parts.tool_calls, reason)


def _calling(messages: Sequence[Message], tool: str, arguments: str) -> Reply:
    call = ToolCall(f"call-{len(messages)}", tool, arguments)
    return Reply(content="", tool_calls=(call,), finish_reason=TOOL_CALLS)


def simulate_and_prescribe(messages: Sequence[Message], seed: int) -> Reply:
    """A script: simulates three actions drawn uniformly by the seed, and prescribes the first."""
    if was_simulated(messages):
        called = messages[-2]["tool_calls"][0]["function"]["arguments"]
        levels = json.loads(json.loads(called)["actions"][0])
        return prescribe(messages, schema.action_index(*levels))
    draw = np.random.default_rng(seed)
    actions = draw.choice(schema.NUM_ACTIONS, MAX_OPTIONS, replace=False)
    return simulate(messages, actions.tolist())


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
