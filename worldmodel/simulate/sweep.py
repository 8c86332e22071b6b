"""The grid of a sweep, cut into blocks of few shapes.

A group is a start (stay and row) under a plan or a policy, with all its samples. Blocks are cut
by the request alone, never by the machine, so that any of them can be played anywhere, at any
time, to the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from worldmodel.errors import InputError

MAX_STARTS = 2048  # per block, which bounds the memory that their histories take


class Starts(NamedTuple):
    """N rows to start from, stay by stay."""

    stay: np.ndarray  # [N] int32 row of the episodes
    step: np.ndarray  # [N] int32 row of the stay, 0 at admission
    skipped: int  # requested rows after the end of a stay


class Section(NamedTuple):
    """Plans that are simulated together from every start; or one policy."""

    plans: tuple[int, ...]  # numbers of the plans; policies are numbered after them
    width: int  # plans that are simulated, the last one repeated as padding
    starts: int  # per block, the last one repeated as padding
    cost: int = 1  # model calls that a step takes, more than one for a planner


class Block(NamedTuple):
    """Some starts of a section: what is computed and written as one."""

    number: int
    section: int
    first: int  # of the starts
    size: int  # starts


@dataclass(frozen=True)
class Grid:
    """Every group of a sweep, in blocks.

    Attributes:
      starts: N starts.
      sections: of the plans, then one per policy.
      blocks: section by section.
      samples: S per group.
      horizon: steps H.
    """

    starts: Starts
    sections: tuple[Section, ...]
    blocks: tuple[Block, ...]
    samples: int
    horizon: int

    def branch_steps(self, block: Block) -> int:
        """Branches of a block times the horizon."""
        plans = len(self.sections[block.section].plans)
        return block.size * plans * self.samples * self.horizon


def find_starts(length: Int[np.ndarray, " N"], steps: Sequence[int], every: int = 0) -> Starts:
    """Rows to start from.

    Args:
      length: [N] steps per stay.
      steps: rows of every stay; those that it does not have are skipped and counted.
      every: instead, every so many-th row of a stay, from admission on.

    Raises:
      InputError: no steps, twice the same, a negative one, or no stay reaches any.
    """
    length = np.asarray(length)
    wanted = np.arange(0, max(length.max(), 1), every) if every > 0 else np.sort(np.array(steps))
    if every < 0 or not len(wanted) or wanted.min() < 0 or len(set(wanted)) < len(wanted):
        raise InputError(
            f"steps: got {list(steps)}, every: {every}; expected different rows, 0 or more"
        )
    reached = wanted[None] < length[:, None]
    if not reached.any():
        raise InputError(
            f"steps: no stay reaches step {wanted.min()}; the longest has {length.max()}"
        )
    stay, column = np.nonzero(reached)
    skipped = 0 if every > 0 else int((~reached).sum())
    return Starts(stay.astype(np.int32), wanted[column].astype(np.int32), skipped)


def make_grid(
    starts: Starts,
    *,
    plans: int,
    policies: Sequence[int],
    samples: int,
    horizon: int,
    branches: int,
) -> Grid:
    """Cuts a sweep into blocks.

    Args:
      starts: N starts.
      plans: number of plans.
      policies: model calls that a step of each policy costs, 1 for most.
      samples: S per group.
      horizon: steps H.
      branches: about so many per block, unless the samples of one group are more.

    Raises:
      InputError: there is nothing to simulate.
    """
    if samples < 1 or branches < 1 or plans + len(policies) < 1:
        raise InputError("sweep: expected at least one plan or policy, one sample, one branch")
    sections = []
    together = max(branches // samples, 1)
    parts = -(-plans // together)
    size = -(-plans // parts) if parts else 0
    for first in range(0, plans, max(size, 1)):
        members = tuple(range(first, min(first + size, plans)))
        sections.append(Section(members, size, _starts_of(size, samples, branches, starts)))
    for number, cost in enumerate(policies):
        own = _starts_of(cost, samples, branches, starts)
        sections.append(Section((plans + number,), 1, own, cost))
    blocks: list[Block] = []
    total = len(starts.stay)
    for index, section in enumerate(sections):
        for first in range(0, total, section.starts):
            size = min(section.starts, total - first)
            blocks.append(Block(len(blocks), index, first, size))
    return Grid(starts, tuple(sections), tuple(blocks), samples, horizon)


def _starts_of(plans: int, samples: int, branches: int, starts: Starts) -> int:
    return int(np.clip(branches // (plans * samples), 1, min(MAX_STARTS, len(starts.stay))))


def padded(numbers: Int[np.ndarray, " n"], size: int) -> Int[np.ndarray, " m"]:
    """Numbers [n] to [size], the last one repeated, so that blocks keep their shape."""
    return numbers[np.minimum(np.arange(size), len(numbers) - 1)]
