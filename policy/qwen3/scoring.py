"""Log-probabilities of many continuations of a prompt, which is read once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from policy.qwen3.logprobs import chunked_logprobs
from policy.qwen3.model import Qwen3
from policy.qwen3.sampler import SMALLEST_BUCKET, bucket
from worldmodel.errors import InputError

TOKENS_PER_ROW = 1024
"""Continuations beyond this many tokens get a further copy of their prompt."""

Question = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A prompt and its continuations."""


def score(model: Qwen3, questions: Sequence[Question]) -> list[list[float]]:
    """Summed log-probability of each continuation after its prompt, at temperature 1.

    A row of the batch holds a prompt and, packed after it as segments of their own, its
    continuations: each sees the prompt and itself. Shapes are rounded up to powers of two.

    Raises:
      InputError: a prompt is empty, or ids are unknown.
    """
    vocab = model.config.vocab_size
    for prompt, continuations in questions:
        if not len(prompt):
            raise InputError("prompt: expected at least one token before a continuation")
        if not all(0 <= token < vocab for part in (prompt, *continuations) for token in part):
            raise InputError(f"prompt or continuation: token ids must be 0 to {vocab - 1}")
    rows = [_pack(prompt, part) for prompt, all_ in questions for part in _groups(all_)]
    if not rows:
        return [[] for _ in questions]
    batch = _stack(rows)
    found = iter(np.asarray(_logprobs(*nnx.split(model), batch)))
    scores: list[list[float]] = []
    for _, continuations in questions:
        scores.append([])
        for part in _groups(continuations):
            logprobs = next(found)
            ends = np.cumsum([0, *map(len, part)])
            scores[-1] += [float(logprobs[a:b].sum()) for a, b in pairwise(ends)]
    return scores


class _Row(NamedTuple):
    ids: Any  # [T]
    position: Any  # [T]
    segment: Any  # [T]; 1 for the prompt, then one per continuation, 0 for padding
    before: Any  # [N] index of the token before each token of a continuation
    target: Any  # [N]


def _groups(continuations: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    groups: list[list[Sequence[int]]] = []
    filled = 0
    for continuation in continuations:
        if not groups or filled + len(continuation) > TOKENS_PER_ROW:
            groups.append([])
            filled = 0
        groups[-1].append(continuation)
        filled += len(continuation)
    return groups


def _pack(prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> _Row:
    length = len(prompt)
    ids, position, segment = list(prompt), list(range(length)), [1] * length
    before: list[int] = []
    for number, continuation in enumerate(continuations, 2):
        start = len(ids)
        before += [length - 1, *range(start, start + len(continuation) - 1)][: len(continuation)]
        ids += continuation
        position += range(length, length + len(continuation))
        segment += [number] * len(continuation)
    return _Row(ids, position, segment, before, ids[length:])


def _stack(rows: Sequence[_Row]) -> _Row:
    def padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
        out = np.zeros(
            (bucket(len(lists)), bucket(max(map(len, lists)), SMALLEST_BUCKET)), np.int32
        )
        for row, values in zip(out, lists, strict=False):
            row[: len(values)] = values
        return out

    return _Row(*(padded(lists) for lists in zip(*rows, strict=True)))


@partial(jax.jit, static_argnames="graphdef")
def _logprobs(graphdef: Any, state: Any, batch: _Row) -> jax.Array:
    model: Qwen3 = nnx.merge(graphdef, state)
    hidden = model.hidden(
        batch.ids, positions=batch.position, segments=batch.segment, shared=batch.segment == 1
    )
    before = jnp.take_along_axis(hidden, batch.before[..., None], axis=1)
    return chunked_logprobs(before, model.head(), batch.target).logprob
