"""Long axes a piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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
