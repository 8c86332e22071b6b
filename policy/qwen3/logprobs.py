"""Log-probabilities and entropies of tokens without ever holding [B, T, V] logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from policy.qwen3.model import Qwen3, project
from policy.qwen3.sampler import SMALLEST_BUCKET, bucket
from worldmodel.errors import InputError

LOGITS_AT_ONCE = 2**27
"""Logits that are held at once; 512 MiB of float32."""


class TokenLogprobs(NamedTuple):
    """Under the distribution from which each token was, or would be, drawn."""

    logprob: jax.Array  # [B, T] float32
    entropy: jax.Array  # [B, T] float32, nats


def token_logprobs(
    model: Qwen3,
    ids: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    remat: str = "none",
    chunk: int | None = None,
) -> TokenLogprobs:
    """Log-probability of each token given those before it in its segment; differentiable.

    Args:
      ids: [B, T] int.
      positions, segments, remat: as for `Qwen3.hidden`.
      temperature: logits are divided by it; positive.
      chunk: as for `chunked_logprobs`.

    Returns:
      [B, T] each; 0 for the first token of a segment, which nothing predicts, and for padding.
    """
    hidden = model.hidden(ids, positions=positions, segments=segments, remat=remat)
    found = chunked_logprobs(
        hidden[:, :-1], model.head(), ids[:, 1:], temperature=temperature, chunk=chunk
    )
    if segments is None:
        segments = jnp.ones_like(ids)
    predicted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return jax.tree.map(
        lambda x: jnp.pad(jnp.where(predicted, x, 0.0), ((0, 0), (1, 0))),
        found,
    )


def chunked_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    chunk: int | None = None,
) -> TokenLogprobs:
    """Log-probabilities of targets, and entropies, from final hidden states.

    Args:
      hidden: [B, T, D].
      head: [D, V] output projection.
      targets: [B, T] int token ids.
      temperature: logits are divided by it; positive.
      chunk: columns whose logits [B, chunk, V] are held at once; as many as `LOGITS_AT_ONCE`
        allows if not given. Rows are never mixed, so a batch split over devices stays so.

    Returns:
      [B, T] each, float32.
    """
    batch, vocab = hidden.shape[0], head.shape[1]

    def one(part: tuple[jax.Array, jax.Array]) -> TokenLogprobs:
        logprobs = jax.nn.log_softmax(project(part[0], head) / temperature)  # [B, chunk, V]
        logprob = jnp.take_along_axis(logprobs, part[1][..., None], axis=-1)[..., 0]
        return TokenLogprobs(logprob, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1))

    return map_chunks(one, (hidden, targets), chunk or max(8, LOGITS_AT_ONCE // (batch * vocab)))


def map_chunks(f: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """f applied to pieces of the second axis, one after another, and put together again.

    Args:
      f: from arrays [B, size, ...] to arrays [B, size, ...], the columns independent of one
        another. Its inner values are not kept for the backward pass but computed again.
      arrays: PyTree of arrays [B, T, ...]; filled up with zeros to whole pieces.
      size: columns of a piece.

    Returns:
      PyTree of arrays [B, T, ...].
    """
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    size = min(size, length)
    count = -(-length // size)

    def split(x: jax.Array) -> jax.Array:
        pad = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, pad).reshape(batch, count, size, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, count * size, *x.shape[3:])[:, :length]

    return jax.tree.map(join, jax.lax.map(jax.checkpoint(f), jax.tree.map(split, arrays)))


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
