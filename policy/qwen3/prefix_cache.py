"""Keys and values of finished batches, for prompts that go on where a reply ended.

A turn of a dialogue begins with all that was read and drawn in the turn before, so that only what
is new has to be read: vLLM calls this prefix caching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from policy.qwen3.model import Caches
from worldmodel.resources import bucket


def rows_kept(dialogues: int) -> int:
    """Rows to keep for so many dialogues at a time: two batches, since one may wait for another."""
    return 2 * bucket(dialogues)


class Continued(NamedTuple):
    """Where the beginnings of B prompts lie in the cache of one batch."""

    cache: Caches
    rows: np.ndarray  # [B] int32
    lengths: np.ndarray  # [B] int32, tokens of each prompt that were read


@dataclass(frozen=True)
class _Batch:
    number: int
    rows: dict[tuple[int, ...], int]  # by the tokens read
    lengths: tuple[int, ...]  # of these, the longest first
    cache: Caches

    def find(self, prompt: Sequence[int]) -> tuple[int, int] | None:
        """Row and length of the longest beginning; at least one token of the prompt is new."""
        for length in self.lengths:
            if length < len(prompt):
                row = self.rows.get(tuple(prompt[:length]))
                if row is not None:
                    return row, length
        return None


class PrefixCache:
    """The caches of the newest batches of one model.

    Prompts match where all that a row read and drew is their beginning; a common system prompt
    alone is no match. What is found may be used from another thread than the one that keeps.

    Args:
      rows: of all kept batches together at most; older batches are dropped.
    """

    def __init__(self, rows: int):
        self._most = rows
        self._batches: tuple[_Batch, ...] = ()  # the newest first

    def number_of(self, prompt: Sequence[int]) -> int | None:
        """Number of the newest batch that read the beginning of a prompt; None if none did."""
        found = (batch.number for batch in self._batches if batch.find(prompt))
        return next(found, None)

    def find(self, prompts: Sequence[Sequence[int]]) -> Continued | None:
        """The beginnings of all prompts in the newest batch that has them all; None if none has."""
        for batch in self._batches:
            places = [place for prompt in prompts if (place := batch.find(prompt))]
            if len(places) == len(prompts):
                rows, lengths = np.array(places, np.int32).T
                return Continued(batch.cache, rows, lengths)
        return None

    def keep(self, read: Sequence[tuple[int, ...]], cache: Caches) -> None:
        """Keeps the cache of a batch.

        Args:
          read: tokens of each row whose keys and values are in the cache.
          cache: of as many rows, or more.
        """
        number = self._batches[0].number + 1 if self._batches else 0
        rows = {ids: row for row, ids in enumerate(read)}
        lengths = tuple(sorted({len(ids) for ids in read}, reverse=True))
        kept, left = [], self._most
        for batch in (_Batch(number, rows, lengths, cache), *self._batches):
            left -= jax.tree.leaves(batch.cache)[0].shape[1]
            if left < 0:
                break
            kept.append(batch)
        self._batches = tuple(kept)
