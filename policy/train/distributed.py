"""Several processes, and arrays that none of them holds alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from policy.qwen3.sharding import batch_sharding, shardings
from worldmodel.errors import InputError


def place_state(tree: Any, mesh: Mesh) -> Any:
    """A model's state laid out over a mesh, of several processes too.

    Args:
      tree: arrays that every process holds alike, or that lie on the mesh already.
    """
    return jax.tree.map(_place, tree, shardings(tree, mesh))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Micro-batches laid out over a mesh: rows over data and fsdp.

    Args:
      batch: PyTree of leaves [accumulate, rows, ...], the same in every process; leaves with a
        single axis lie whole on every device.

    Raises:
      InputError: the rows do not divide.
    """
    (rows,) = batch_sharding(mesh).spec
    count = math.prod(mesh.shape[axis] for axis in rows)

    def one(leaf: Any) -> jax.Array:
        split = leaf.ndim > 1
        if split and leaf.shape[1] % count:
            raise InputError(
                f"batch: {leaf.shape[1]} rows per micro-batch are no multiple of the {count} "
                "devices along data and fsdp"
            )
        spec = PartitionSpec(None, rows) if split else PartitionSpec()
        return _place(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(one, batch)


def _place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1 or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
