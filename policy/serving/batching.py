"""Batching of concurrent requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar

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
      capacity: requests in a batch at most.
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
        capacity: int,
        max_wait_s: float,
        kind: Callable[[Ask], Hashable] = _alike,
        one_by_one: bool = False,
        lockstep: Lockstep | None = None,
    ):
        self._answer, self._thread, self._kind = answer, thread, kind
        self._capacity, self._max_wait_s, self._one_by_one = capacity, max_wait_s, one_by_one
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
        if len(self._waiting) >= self._capacity:
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
        batch = alike[: self._capacity]
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
