"""bfloat16 that loses nothing on average: stochastic rounding.

A bfloat16 number has 8 significant bits, so that to nearest, a change below 1/512 of a parameter
is lost however often it is made. Rounded up with the probability of what would be cut off, it
arrives in expectation (Gupta et al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of its two neighbours in bfloat16; their mean over keys is x.

    Args:
      x: float32, any shape. What bfloat16 holds exactly stays, and so does what is not finite.
      key: each element's draw depends on the key and its index, not on how x is sharded.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)  # a carry out of the lower half rounds up
    rounded = jax.lax.bitcast_convert_type(cut, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def store(tree: Any, like: Any, key: jax.Array) -> Any:
    """A tree in the types of another; float32 becomes bfloat16 by stochastic rounding.

    Args:
      tree: arrays.
      like: arrays of the same structure.
      key: leaves get keys of their own.
    """
    leaves, structure = jax.tree.flatten(tree)

    def one(index: int, x: jax.Array, old: jax.Array) -> jax.Array:
        if x.dtype == jnp.float32 and old.dtype == jnp.bfloat16:
            return round_stochastically(x, jax.random.fold_in(key, index))
        return x.astype(old.dtype)

    pairs = enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    return jax.tree.unflatten(structure, [one(index, *pair) for index, pair in pairs])


def widen(tree: Any) -> Any:
    """A tree with bfloat16 as float32, and the rest as it is."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
        tree,
    )
