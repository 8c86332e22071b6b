"""Slices of stays that stay in the cache, all of one shape.

The last slice is moved back to end with the last stay; the stays that it repeats are not fresh.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

SIZE = 512  # stays


def number(stays: int) -> int:
    """How many slices there are."""
    return -(-stays // SIZE)


def begin(stays: int, which: jax.Array) -> jax.Array:
    """First stay of slices."""
    return jnp.minimum(which * SIZE, max(stays - SIZE, 0))


def take(array: jax.Array, which: jax.Array, axis: int = -1) -> jax.Array:
    """One slice of an array along its axis of stays."""
    stays = array.shape[axis]
    start = begin(stays, which)
    return jax.lax.dynamic_slice_in_dim(array, start, min(SIZE, stays), axis)


def fresh(stays: int, which: jax.Array) -> jax.Array:
    """[..., n] 1 for the stays that no earlier slice holds, else 0."""
    place = begin(stays, which)[..., None] + jnp.arange(min(SIZE, stays))
    return (place >= which[..., None] * SIZE).astype(jnp.float32)
