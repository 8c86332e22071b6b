"""Causal attention over packed rows, block by block, and over a cache of keys and values.

Blocks of keys are read one after another with a running maximum and sum of the softmax (Rabe &
Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135), so that no array of length x length is ever
in memory, in the backward pass neither. Blocks that no query of the batch sees are left out: later
ones, and those before the segments begin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Shaped

from policy.qwen3.sharding import on_own_share

S = TypeVar("S")  # PyTrees of arrays
T = TypeVar("T")

BLOCK = 512
"""Tokens per block of queries and of keys at most."""

CPU_SCORES = 2**21
"""Scores of a block at most on CPUs, whose caches should hold them: 8 MiB of float32."""

CHECKPOINT_NAME = "attention"
"""Of what attention hands to its backward pass, for policies of `jax.checkpoint`."""

CPU_SLOTS = 256
"""Slots per block of a cache on CPUs."""

CPU_SLOTS_PER_USED = 2
"""Slots per one that is seen up to which CPUs read all of them, rather than copy blocks."""

SCORES_AT_ONCE = 2**28
"""Scores of queries with the keys of a cache in memory at once; 1 GiB of float32."""

_UNSEEN = float(np.finfo(np.float32).min)


class _Mask(NamedTuple):
    """What is seen, by block; N blocks of S columns."""

    segment: Int[Array, "N B S"]
    shared: Bool[Array, "N B S"]  # keys that later columns of every segment see
    first: Int[Array, " N"]  # block at which the keys of each block of queries begin

    def of(self, i: jax.Array, j: jax.Array) -> Bool[Array, "B 1 1 S S"]:
        """What queries of block i see of keys of block j."""
        size = self.segment.shape[2]
        column = jnp.arange(size)
        earlier = j * size + column[None, :] <= i * size + column[:, None]
        same = self.segment[i][:, :, None] == self.segment[j][:, None, :]
        return ((same | self.shared[j][:, None, :]) & earlier)[:, None, None]


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    segments: Int[Array, "B T"],
    shared: Bool[Array, "B T"] | None = None,
    *,
    block: int | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention of whole rows with scores, weights and sums in float32; differentiable.

    A token sees itself, earlier columns of its own segment, and earlier columns that are shared.

    Args:
      q: [B, T, H, D] queries.
      k, v: [B, T, K, D]; K divides H, and each key head serves H / K query heads.
      segments: [B, T] int; the tokens of a segment stand side by side.
      shared: [B, T] keys that later columns of every segment see; none if not given.
      block: tokens per block; if not given `BLOCK`, or on CPUs fewer by `CPU_SCORES`.

    Returns:
      [B, T, H, D] in the type of `v`.
    """
    arrays = (q, k, v, segments, jnp.zeros_like(segments, bool) if shared is None else shared)

    def attended(*arrays: jax.Array) -> jax.Array:
        if block is not None:
            return _attend(block, *arrays)
        batch, _, heads, _ = arrays[0].shape  # a device's own share
        found: jax.Array = jax.lax.platform_dependent(
            *arrays,
            cpu=partial(_attend, _cpu_block(batch, heads)),
            default=partial(_attend, BLOCK),
        )
        return found

    heads, tokens = ("batch", "length", "heads", None), ("batch", "length")
    return on_own_share(attended, (heads, heads, heads, tokens, tokens), heads, *arrays)


def _cpu_block(batch: int, heads: int) -> int:
    return min(max(math.isqrt(CPU_SCORES // (batch * heads)), 16), BLOCK)


def _attend(
    block: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    shared: jax.Array,
) -> Float[Array, "B T H D"]:
    batch, length, heads, width = q.shape
    split = partial(_split, size=_even(length, block))
    groups = heads // k.shape[2]
    grouped = split(q.reshape(batch, length, k.shape[2], groups, width))
    segment, shared = split(segments), split(shared)
    mask = _Mask(segment, shared, _first(segment, shared))
    out = _blocks(
        jnp.moveaxis(grouped, 2, 4),
        jnp.moveaxis(split(k), 2, 3),
        jnp.moveaxis(split(v), 2, 3),
        mask,
    )  # [N, B, K, G, S, D]
    return _join(jnp.moveaxis(out, 4, 2), length).reshape(batch, length, heads, width)


def _first(segment: Int[Array, "N B S"], shared: Bool[Array, "N B S"]) -> Int[Array, " N"]:
    """[N] the first block that a query of each block sees, in any row; 0 with anything shared."""
    count, _, size = segment.shape
    rows = _join(segment, count * size)
    column = jnp.arange(rows.shape[1])
    new = jnp.pad(rows[:, 1:] != rows[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    begin = jax.lax.cummax(jnp.where(new, column, 0), axis=1)
    begin = jnp.where(rows == 0, column, begin)  # what padding sees does not matter
    first: jax.Array = jnp.min(begin.reshape(-1, count, size), axis=(0, 2)) // size
    return jnp.where(jnp.any(shared), 0, first)


class _Running(NamedTuple):
    """Softmax over the keys read so far, relative to the highest score."""

    read: Float[Array, "B K G T D"]  # float32, sum of values by their weights
    most: Float[Array, "B K G T"]  # float32, highest score
    total: Float[Array, "B K G T"]  # float32, sum of weights

    @classmethod
    def begin(cls, shape: tuple[int, ...]) -> _Running:
        """Nothing is read, for queries of a shape [B, K, G, T, D]."""
        nothing = jnp.zeros(shape, jnp.float32)
        return cls(nothing, jnp.full(shape[:-1], _UNSEEN), nothing[..., 0])

    def after(self, scores: Float[Array, "B K G T S"], v: Float[Array, "B K S D"]) -> _Running:
        """With further keys and their values."""
        most = jnp.maximum(self.most, jnp.max(scores, axis=-1))
        weights, before = jnp.exp(scores - most[..., None]), jnp.exp(self.most - most)
        read = jnp.einsum(
            "bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return _Running(
            self.read * before[..., None] + read, most,
            self.total * before + jnp.sum(weights, axis=-1),
        )  # fmt: skip

    def mean(self) -> Float[Array, "B K G T D"]:
        """What is read: the values' mean by the softmax's weights."""
        return self.read / self.total[..., None]


def _scores(
    q: Float[Array, "B K G T D"], k: Float[Array, "B K D S"], seen: jax.Array
) -> Float[Array, "B K G T S"]:
    scores = jnp.einsum("bkgtd,bkds->bkgts", q, k, preferred_element_type=jnp.float32)
    return jnp.where(seen, scores * q.shape[-1] ** -0.5, _UNSEEN)


@jax.custom_vjp
def _blocks(
    q: Float[Array, "N B K G S D"],
    k: Float[Array, "N B K S D"],
    v: Float[Array, "N B K S D"],
    mask: _Mask,
) -> Float[Array, "N B K G S D"]:
    return _forward(q, k, v, mask)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: _Mask
) -> tuple[Float[Array, "N B K G S D"], Float[Array, "N B K G S"]]:
    """What is read, and the logarithm of each query's sum of exponentials."""

    def of_queries(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_keys(j: jax.Array, now: _Running) -> _Running:
            return now.after(_scores(q[i], jnp.swapaxes(k[j], -1, -2), mask.of(i, j)), v[j])

        begun = _Running.begin(q.shape[1:])
        read = jax.lax.fori_loop(mask.first[i], i + 1, of_keys, begun)
        return read.mean().astype(v.dtype), read.most + jnp.log(read.total)

    found: tuple[jax.Array, jax.Array] = jax.lax.map(of_queries, jnp.arange(q.shape[0]))
    return found


def _forward_for_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: _Mask
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, _Mask, jax.Array, jax.Array]]:
    out, total = (checkpoint_name(x, CHECKPOINT_NAME) for x in _forward(q, k, v, mask))
    return out, (q, k, v, mask, out, total)


def _backward(
    kept: tuple[jax.Array, jax.Array, jax.Array, _Mask, jax.Array, jax.Array], change: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Gradients by the weights of each block, computed again (arXiv 2205.14135, algorithm 4).

    Scores beyond some hundreds lose digits in the difference to the logarithm of the sum.
    """
    q, k, v, mask, out, total = kept
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    turned_k = jnp.swapaxes(k, -1, -2)

    def of_queries(
        of_all: tuple[jax.Array, jax.Array], i: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        given = change[i]
        dot = jnp.sum(given.astype(jnp.float32) * out[i].astype(jnp.float32), axis=-1)

        # Scores stand as [keys, queries], and no product contracts the rows of its first operand:
        # XLA's CPU backend turns these around first, and lacks them in bfloat16.
        turned_q, turned_given = (jnp.moveaxis(x, 4, 2) for x in (q[i], given))

        def of_keys(j: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = now
            scores = einsum("bksd,bkdgt->bksgt", k[j], turned_q) * q.shape[-1] ** -0.5
            scores = jnp.where(jnp.moveaxis(mask.of(i, j), 4, 2), scores, _UNSEEN)
            weights = jnp.exp(scores - total[i][:, :, None])
            dv = dv.at[j].add(einsum("bksgt,bkgtd->bksd", weights.astype(v.dtype), given))
            of_weights = einsum("bksd,bkdgt->bksgt", v[j], turned_given)
            of_scores = weights * (of_weights - dot[:, :, None]) * q.shape[-1] ** -0.5
            of_scores = of_scores.astype(q.dtype)
            dk = dk.at[j].add(einsum("bksgt,bkgtd->bksd", of_scores, q[i]))
            return dq + einsum("bkds,bksgt->bkdgt", turned_k[j], of_scores), dk, dv

        start = (jnp.zeros(turned_q.shape, jnp.float32), *of_all)
        dq, *of_all_new = jax.lax.fori_loop(mask.first[i], i + 1, of_keys, start)
        return tuple(of_all_new), jnp.moveaxis(dq, 2, 4).astype(q.dtype)

    nothing = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(of_queries, (nothing, nothing), jnp.arange(q.shape[0]))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_blocks.defvjp(_forward_for_backward, _backward)


def attend_cache(
    q: Float[Array, "B T H D"],
    k: Float[Array, "L B K D S"],
    v: Float[Array, "L B K S D"],
    layer: int | Int[Array, ""],
    position: Int[Array, "B T"],
    *,
    block: int | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention of further tokens to the slots of a cache, which are positions.

    Slots are read block by block, with a running softmax, up to the block of the last that any
    query sees: a whole layer is never copied out of a cache of several, and empty blocks cost
    nothing. On CPUs a single token reads a cache of one layer where it lies, without copies, as
    soon as 1 of `CPU_SLOTS_PER_USED` slots is seen.

    Args:
      q: [B, T, H, D] queries.
      k: [L, B, K, D, S] keys of a cache, with those of the queries' own positions. They lie as the
        product with queries takes them.
      v: [L, B, K, S, D] values likewise.
      layer: whose keys and values are read.
      position: [B, T] of the queries; each sees the slots up to its own.
      block: slots per block; if not given, `CPU_SLOTS`, or on accelerators as many as
        `SCORES_AT_ONCE` allows.

    Returns:
      [B, T, H, D] in the type of `v`.
    """
    if block is not None:
        return _attend_cache(block, q, k, v, layer, position)
    most = max(SCORES_AT_ONCE // math.prod(q.shape[:3]), 16)
    found: jax.Array = jax.lax.platform_dependent(
        q, k, v, layer, position,
        cpu=partial(_attend_cache_on_cpu, min(most, CPU_SLOTS)),
        default=partial(_attend_cache, most),
    )  # fmt: skip
    return found


def _attend_cache_on_cpu(
    block: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: int | jax.Array,
    position: jax.Array,
) -> Float[Array, "B T H D"]:
    slots = k.shape[-1]
    blocks = partial(_attend_cache, block)
    if len(k) > 1 or q.shape[1] > 1 or slots <= block:
        return blocks(q, k, v, layer, position)
    whole = partial(_attend_cache, slots)
    much_seen = CPU_SLOTS_PER_USED * jnp.max(position) >= slots
    found: jax.Array = jax.lax.cond(much_seen, whole, blocks, q, k, v, layer, position)
    return found


def _attend_cache(
    block: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: int | jax.Array,
    position: jax.Array,
) -> Float[Array, "B T H D"]:
    batch, length, heads, width = q.shape
    keys, slots = v.shape[2:4]
    size = min(block, slots)
    grouped = jnp.moveaxis(q.reshape(batch, length, keys, heads // keys, width), 1, 3)

    def further(i: int | jax.Array, now: _Running) -> _Running:
        start = jnp.minimum(i * size, slots - size)  # the last block may overlap
        slot = start + jnp.arange(size)
        seen = (slot <= position[:, :, None]) & (slot >= i * size)  # [B, T, S]

        def block_of(x: jax.Array, axis: int) -> Float[Array, "B K *d"]:
            of_layer = x[layer]
            if size == slots:
                return of_layer
            return jax.lax.dynamic_slice_in_dim(of_layer, start, size, axis)

        return now.after(_scores(grouped, block_of(k, 3), seen[:, None, None]), block_of(v, 2))

    read = _Running.begin(grouped.shape)
    if size == slots:
        read = further(0, read)
    else:
        count = jnp.minimum(jnp.max(position) // size + 1, -(-slots // size))
        read = jax.lax.fori_loop(0, count, further, read)
    return jnp.moveaxis(read.mean().astype(v.dtype), 3, 1).reshape(batch, length, heads, width)


def map_chunks(
    f: Callable[[S], T], arrays: S, size: int, *, used: Int[Array, ""] | None = None
) -> T:
    """Applies f to pieces of the second axis, one after another, and concatenates the results.

    Args:
      f: from arrays [B, size, ...] to arrays [B, size, ...], the columns independent of one
        another. Its inner values are not kept for the backward pass but computed again.
      arrays: PyTree of arrays [B, T, ...]; filled up with zeros to whole pieces.
      size: columns of a piece at most; pieces are as equal as can be.
      used: columns that matter; pieces without any are 0 and cost nothing. All if not given.

    Returns:
      PyTree of arrays [B, T, ...].
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    size = _even(length, size)
    pieces = jax.tree.map(partial(_split, size=size), arrays)
    if used is None:
        found = jax.lax.map(jax.checkpoint(f), pieces)
    else:
        blank = jax.eval_shape(f, jax.tree.map(lambda x: x[0], pieces))

        def where_used(numbered: tuple[jax.Array, S]) -> T:
            number, piece = numbered
            nothing: T = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), blank)
            result: T = jax.lax.cond(number * size < used, f, lambda _: nothing, piece)
            return result

        # The condition is inside what is computed again: what it hands on, such as the output
        # projection that `f` reads, would be kept once for every piece.
        found = jax.lax.map(jax.checkpoint(where_used), (jnp.arange(-(-length // size)), pieces))
    result: T = jax.tree.map(partial(_join, length=length), found)
    return result


def _even(length: int, most: int) -> int:
    """Columns of pieces that are as few as `most` allows, and as equal as can be."""
    return -(-length // -(-length // most))


def _split(x: Shaped[Array, "B T *d"], size: int) -> Shaped[Array, "N B S *d"]:
    """Pieces of the second axis, in front, the last filled up with zeros."""
    batch, length = x.shape[:2]
    count = -(-length // size)
    padded = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(batch, count, size, *x.shape[2:]), 1, 0)


def _join(x: Shaped[Array, "N B S *d"], length: int) -> Shaped[Array, "B T *d"]:
    """What `_split` was given."""
    count, batch, size = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(batch, count * size, *x.shape[3:])[:, :length]
