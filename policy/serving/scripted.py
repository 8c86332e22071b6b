"""A backend that follows a script: for tests, and to measure everything but the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from policy.serving.backend import Message, Reply, Sampling, as_message

Script = Callable[[Sequence[Message], int], Reply]
"""`(all messages so far, seed) -> reply`; its own replies are among the messages."""


class ScriptedBackend:
    """Replies that a function gives.

    Args:
      script: see `Script`.
      name: for records.
    """

    def __init__(self, script: Script, *, name: str = "scripted"):
        self.script, self.name = script, name

    def open(self, tools: Sequence[Mapping[str, Any]]) -> ScriptedConversation:
        """A new dialogue."""
        return ScriptedConversation(self.script)

    async def close(self) -> None:
        """Nothing to let go of."""


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
