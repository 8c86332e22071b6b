"""Rotary positions, and attention over packed sequences, grouped queries and caches."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from policy.qwen3.chunks import map_chunks

SCORES_AT_ONCE = 2**28
"""Scores of queries with keys that are held at once; 1 GiB of float32."""


class Tokens(NamedTuple):
    """Where tokens stand; a query sees keys of its segment at its own or an earlier position."""

    position: jax.Array  # [B, T] int32, counted within the segment
    segment: jax.Array  # [B, T] int32; 0 marks padding
    shared: jax.Array | None = None  # [B, T] bool: keys that later positions of any segment see


def rotary(position: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, T, 1, head_dim / 2] float32 of the rotary embedding's angles."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle = position[..., None, None].astype(jnp.float32) * (1.0 / theta**exponent)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Heads [B, T, H, head_dim] turned by their positions; halves are pairs, as in the weights."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Tokens,
    keys: Tokens,
    *,
    block: int | None = None,
) -> jax.Array:
    """Causal softmax attention with scores and weights in float32.

    Args:
      q: [B, T, H, D] queries.
      k, v: [B, S, K, D]; K divides H, and each key head serves H / K query heads.
      queries: [B, T].
      keys: [B, S].
      block: queries at once; as many as `SCORES_AT_ONCE` allows if not given. Several blocks are
        computed one after another, and again in the backward pass.

    Returns:
      [B, T, H, D] in the type of `v`. Where a query sees nothing the value means nothing, but it
      is finite.
    """
    batch, length, heads, width = q.shape
    block = block or max(16, SCORES_AT_ONCE // (batch * heads * k.shape[1]))
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], width)
    if length <= block:
        return _attend(q, k, v, queries, keys).reshape(batch, length, heads, width)

    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _attend(part[0], k, v, Tokens(part[1], part[2]), keys)

    out = map_chunks(one, (q, queries.position, queries.segment), block)
    return out.reshape(batch, length, heads, width)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens
) -> jax.Array:  # q: [B, T, K, G, D]
    same = queries.segment[:, :, None] == keys.segment[:, None, :]
    if keys.shared is not None:
        same |= keys.shared[:, None, :]
    sees = same & (keys.position[:, None, :] <= queries.position[:, :, None])  # [B, T, S]
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    scores = jnp.where(sees[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v)
