"""Batches in lockstep: the same whoever is fast."""

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from policy.serving.backend import Batcher, Lockstep


def dialogues(seed, count=12, lockstep=True):
    """Batches of two batchers that dialogues of different lengths ask in turn."""
    draw = random.Random(seed)
    batches = []

    def answers(name):
        def answer(asked):
            time.sleep(draw.random() / 300)  # whoever is fast
            batches.append((name, sorted(asked)))
            return list(asked)

        return answer

    async def go():
        shared = Lockstep() if lockstep else None
        threads = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
        settings = {"capacity": 5, "max_wait_s": 0.001, "lockstep": shared}
        model, world = (
            Batcher(answers(name), thread=thread, **settings)
            for name, thread in zip(("model", "world"), threads, strict=True)
        )

        async def one(number):
            for turn in range(1 + number % 4):
                assert await model.ask((number, turn)) == (number, turn)
                if number % 3:
                    await asyncio.gather(world.ask((number, turn, 0)), world.ask((number, turn, 1)))

        await asyncio.gather(*(one(number) for number in range(count)))
        for thread in threads:
            thread.shutdown()

    asyncio.run(asyncio.wait_for(go(), 20))
    return batches


def test_equal_runs_have_equal_batches():
    one, two, three = (dialogues(seed) for seed in (1, 2, 3))
    assert one == two == three
    assert max(len(asked) for _, asked in one) == 5


def test_by_the_clock_they_need_not():
    """The test above can fail: without lockstep the same dialogues make other batches."""
    found = [dialogues(seed, lockstep=False) for seed in range(6)]
    assert any(batches != found[0] for batches in found)


def test_errors_reach_those_who_asked():
    def fails(asked):
        raise ValueError("no")

    async def go():
        batcher = Batcher(
            fails, thread=ThreadPoolExecutor(1), capacity=2, max_wait_s=1.0, lockstep=Lockstep()
        )
        found = await asyncio.gather(*(batcher.ask(n) for n in range(3)), return_exceptions=True)
        assert [str(error) for error in found] == ["no"] * 3

    asyncio.run(asyncio.wait_for(go(), 20))


def test_requests_that_were_given_up_hold_nobody_up():
    async def go():
        batcher = Batcher(
            list, thread=ThreadPoolExecutor(1), capacity=2, max_wait_s=1.0, lockstep=Lockstep()
        )
        given_up = asyncio.create_task(batcher.ask(1))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert await batcher.ask(2) == 2

    asyncio.run(asyncio.wait_for(go(), 20))
