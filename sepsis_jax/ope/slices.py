"""Slices of stays that stay in the cache, all of one shape.

The last slice is moved back to end with the last stay; the stays that it repeats are not fresh.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

SIZE = 512  # stays at most, of what is as wide as all columns of the estimators


def even(stays: int) -> int:
    """Size of the fewest slices of at most `SIZE` stays, all nearly full."""
    return -(-stays // -(-stays // SIZE))


def numbers(stays: int, size: int) -> jax.Array:
    """Numbers of all slices."""
    return jnp.arange(-(-stays // size))


def take(array: jax.Array, which: jax.Array, size: int, axis: int = -1) -> jax.Array:
    """One slice of an array along its axis of stays."""
    start = jnp.minimum(which * size, array.shape[axis] - size)
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def fresh(stays: int, which: jax.Array, size: int) -> jax.Array:
    """[size] 1 for the stays that no earlier slice holds, else 0."""
    place = jnp.minimum(which * size, stays - size) + jnp.arange(size)
    return (place >= which * size).astype(jnp.float32)
