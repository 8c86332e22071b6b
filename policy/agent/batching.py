"""Many small questions answered as one batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Batcher(Generic[Q, A]):
    """Gathers questions that wait at the same time and has them answered together.

    A batch leaves when it is full, or when its first question has waited `max_wait_s`. Batches
    are answered one after another on a thread, so that the event loop goes on meanwhile.

    Args:
      answer: takes one to `capacity` questions, gives their answers in order.
      capacity: most questions in a batch.
      max_wait_s: seconds.
      thread: the executor of one thread that answers; batchers whose answers touch the same state
        share one.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Q]], Sequence[A]],
        *,
        capacity: int,
        max_wait_s: float = 0.002,
        thread: ThreadPoolExecutor | None = None,
    ):
        self._answer, self._capacity, self._max_wait_s = answer, capacity, max_wait_s
        self._thread = thread or ThreadPoolExecutor(1)
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Task[None]] = set()
        self.batches = 0
        self.questions = 0

    async def ask(self, question: Q) -> A:
        """The answer; what `answer` raises is raised for every question of its batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[A] = loop.create_future()
        self._waiting.append((question, future))
        if len(self._waiting) >= self._capacity:
            self._leave()
        elif self._timer is None:
            self._timer = loop.call_later(self._max_wait_s, self._leave)
        return await future

    def _leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._waiting = self._waiting, []
        if batch:
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, batch: list[tuple[Q, asyncio.Future[A]]]) -> None:
        self.batches += 1
        self.questions += len(batch)
        questions = [question for question, _ in batch]
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self._answer, questions)
        except BaseException as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():  # its dialogue may have been cancelled
                future.set_result(answer)
