"""Timing in turns: every contender runs once per repeat, so that other load slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from sepsis_jax.runs import Progress, silent

T = TypeVar("T")

# Thread pools spin for some milliseconds after their work, on cores that the next one needs.
_SETTLE = 0.03

Summary = dict[str, float]  # median, min, max


@dataclass(frozen=True)
class Contender:
    """A function to be timed.

    Attributes:
      name: of what is measured.
      run: does the work once and waits for its end; takes the number of the repeat, for noise
        of its own each time.
      work: units done in one run: branch-steps, or floating-point operations.
      branches: B; 0 for matrix products.
      checksum: a number that depends on all that a run returns.
      compile_seconds: spent before the first run; None where nothing is compiled.
      memory_bytes: of arguments, results and temporaries on the device, where known.
    """

    name: str
    run: Callable[[int], object]
    work: float
    branches: int = 0
    # whatever `run` returns
    checksum: Callable[[Any], float] | None = None
    compile_seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Timed:
    """A contender with its rates."""

    contender: Contender
    rates: np.ndarray  # [repeats] units of work per second
    checksum: float | None


def take_turns(
    contenders: Sequence[Contender], repeats: int, progress: Progress = silent
) -> list[Timed]:
    """Times the contenders; each runs once untimed before.

    Args:
      contenders: in the order of their turns.
      repeats: timed runs of each.
      progress: called with (phase, share done).
    """
    checksums: list[float | None] = []
    seconds = np.zeros((len(contenders), repeats))
    turns = len(contenders) * (repeats + 1)
    for index, contender in enumerate(contenders):
        progress(f"warming up {contender.name}", index / turns)
        found = contender.run(-1)
        checksums.append(contender.checksum(found) if contender.checksum else None)
        del found
    for repeat in range(repeats):
        for index, contender in enumerate(contenders):
            done = len(contenders) * (repeat + 1) + index
            progress(f"repeat {repeat + 1} of {repeats}", done / turns)
            time.sleep(_SETTLE)
            start = time.perf_counter()
            contender.run(repeat)
            seconds[index, repeat] = time.perf_counter() - start
    return [
        Timed(contender, contender.work / seconds[index], checksums[index])
        for index, contender in enumerate(contenders)
    ]


def summary(values: np.ndarray | Sequence[float]) -> Summary:
    """Median and range."""
    values = np.asarray(values, np.float64)
    return {
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def best(timed: Sequence[Timed]) -> Timed:
    """The one with the highest median rate."""
    return max(timed, key=lambda found: float(np.median(found.rates)))


def seconds_of(function: Callable[[], T]) -> tuple[T, float]:
    """The result of a call, and its seconds."""
    start = time.perf_counter()
    found = function()
    return found, time.perf_counter() - start
