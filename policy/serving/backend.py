"""Interfaces of language models, and batching of concurrent requests.

A `Backend` for messages opens one `Conversation` per patient; the agent needs nothing else. A
`Generator` is for token ids; `TokenBackend` of `policy.serving.tokens` makes a backend of any.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

STOP, LENGTH, TOOL_CALLS = "stop", "length", "tool_calls"

# values are texts and lists of calls, read by their role
Message = Mapping[str, Any]
"""A chat message in OpenAI's form: role, content, and `tool_call_id` where the role is tool."""


class BackendError(Exception):
    """Raised when a model cannot be reached after all retries; nothing was generated."""


class RefusedError(BackendError):
    """Raised when an endpoint refuses a request, so that asking again cannot help."""


class ContextError(RefusedError):
    """Raised when a dialogue has grown longer than the model's context; it cannot go on."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling."""

    RENAMED: ClassVar[dict[str, str]] = {
        "max_new_tokens": "max_completion_length",
    }

    temperature: float = 0.7  # 0 takes the most probable token
    top_p: float = 0.95
    max_completion_length: int = 1024


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it; neither name nor arguments are checked here."""

    id: str
    name: str  # empty if the text is not a valid call
    arguments: str  # JSON if valid, else the text as it is


@dataclass(frozen=True)
class Completion:
    """Tokens drawn after a prompt."""

    token_ids: tuple[int, ...]  # with the token that ended it, if one did
    logprobs: tuple[float, ...]  # of each token under the distribution it was drawn from
    finish_reason: str  # STOP or LENGTH
    weight_version: str | None = None


@dataclass(frozen=True)
class Reply:
    """A reply of the model."""

    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = STOP  # STOP, LENGTH or TOOL_CALLS
    reasoning: str = ""  # set apart by a reasoning parser
    prompt_ids: tuple[int, ...] | None = None  # all the tokens before the reply, if known
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    weight_version: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)  # prompt_tokens, completion_tokens


class Conversation(Protocol):
    """One dialogue; keeps all earlier messages."""

    async def ask(self, messages: Sequence[Message], *, sampling: Sampling, seed: int) -> Reply:
        """Appends messages (system, user or tool), then asks for a reply.

        Args:
          messages: new ones alone, in order; a tool message answers a call of the last reply.
          sampling: how to draw.
          seed: equal seeds and equal dialogues draw equal replies, where the backend can.

        Raises:
          BackendError: the model could not be reached; the conversation is as it was before, so
            the same call may be made again.
        """
        ...


class Backend(Protocol):
    """A language model that takes part in many dialogues at once."""

    name: str  # for records: the model's name or folder

    def open(self, tools: Sequence[Mapping[str, object]]) -> Conversation:
        """A new dialogue with tools as JSON schemas in OpenAI's form."""
        ...

    async def close(self) -> None:
        """Closes connections and tasks."""
        ...


class Generator(Protocol):
    """A language model at the level of tokens."""

    name: str

    async def generate(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, seed: int
    ) -> Completion:
        """Draws tokens until one of the model's stop tokens or the limit.

        Raises:
          BackendError: the model could not be reached.
        """
        ...

    async def score(
        self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """Summed log-probability of each continuation after the prompt, at temperature 1.

        Raises:
          BackendError: the model could not be reached.
        """
        ...

    async def close(self) -> None:
        """Closes connections and tasks."""
        ...


def as_message(reply: Reply) -> dict[str, object]:
    """A reply as a message in OpenAI's form."""
    message: dict[str, object] = {"role": "assistant", "content": reply.content}
    if reply.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in reply.tool_calls
        ]
    return message


def unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object from its members, for `json.loads`.

    Raises:
      ValueError: a name is given twice, of which JSON readers would take the last.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


_SETTLED = 16  # rounds of the event loop without a new request


def _alike(_: object) -> Hashable:
    return None


class Lockstep:
    """Makes the batches of several batchers independent of the clock.

    A batch starts when no other batch is running and the event loop has been idle for some rounds,
    so that no further request can arrive. Equal runs then have equal batches, which bitwise equal
    results require.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._free = asyncio.Lock()

    def asked(self) -> None:
        """Counts a request."""
        self._asked += 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits until no new requests arrive, and excludes other batches meanwhile."""
        async with self._free:
            quiet, seen = 0, self._asked
            while quiet < _SETTLED:
                await asyncio.sleep(0)
                quiet = quiet + 1 if self._asked == seen else 0
                seen = self._asked
            yield


class Batcher(Generic[Ask, Answer]):
    """Answers requests that wait at the same time in one call, on a thread.

    The first batch starts when it is full or its first request has waited `max_wait_s`; further
    batches follow while requests wait. The event loop is not blocked.

    Args:
      answer: takes one to `capacity` requests, gives their answers in order.
      thread: an executor of one thread; batchers whose answers touch the same state share one.
      capacity: requests in a batch at most, by their kind.
      max_wait_s: seconds.
      kind: of a request; a batch holds one kind, that of the request that has waited longest.
      one_by_one: if a batch fails, its requests are tried alone, so that a bad one fails alone;
        otherwise all of them fail.
      lockstep: shared by the batchers of one event loop; batches then start by its rule.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Ask]], Sequence[Answer]],
        *,
        thread: ThreadPoolExecutor,
        capacity: int | Callable[[Hashable], int],
        max_wait_s: float,
        kind: Callable[[Ask], Hashable] = _alike,
        one_by_one: bool = False,
        lockstep: Lockstep | None = None,
    ):
        self._answer, self._thread, self._kind = answer, thread, kind
        self._capacity = capacity if callable(capacity) else lambda _: capacity
        self._max_wait_s, self._one_by_one = max_wait_s, one_by_one
        self._lockstep = lockstep
        self._waiting: list[tuple[Ask, asyncio.Future[Answer]]] = []
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed: Exception | None = None

    async def ask(self, what: Ask) -> Answer:
        """The answer; raises what `answer` raised."""
        if self._closed is not None:
            raise self._closed
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((what, future))
        if self._lockstep is not None:
            self._lockstep.asked()
        if self._task is None or self._task.done():
            self._full = asyncio.Event()
            self._task = loop.create_task(self._work())
        if len(self._waiting) >= self._capacity(self._kind(what)):
            self._full.set()
        return await future

    def refuse(self, error: Exception) -> None:
        """Fails the requests that wait, and all that come later."""
        self._closed = error
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()

    async def _work(self) -> None:
        if self._lockstep is not None:
            while self._waiting:
                async with self._lockstep.turn():
                    if batch := self._next():
                        await self._run(batch)
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._full.wait(), self._max_wait_s)
        while batch := self._next():
            await self._run(batch)

    def _next(self) -> list[tuple[Ask, asyncio.Future[Answer]]]:
        self._waiting = [pair for pair in self._waiting if not pair[1].done()]  # cancelled
        if not self._waiting:
            return []
        kind = self._kind(self._waiting[0][0])
        alike = [pair for pair in self._waiting if self._kind(pair[0]) == kind]
        batch = alike[: self._capacity(kind)]
        taken = {id(future) for _, future in batch}
        self._waiting = [pair for pair in self._waiting if id(pair[1]) not in taken]
        return batch

    async def _run(self, batch: list[tuple[Ask, asyncio.Future[Answer]]]) -> None:
        loop = asyncio.get_running_loop()
        asked = [what for what, _ in batch]
        try:
            answers = await loop.run_in_executor(self._thread, self._answer, asked)
        except Exception as error:  # passed on to the requests
            if self._one_by_one and len(batch) > 1:
                for one in batch:
                    await self._run([one])
                return
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
