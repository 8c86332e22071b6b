"""Training with several processes, and arrays that are sharded over their devices.

Every process runs the same program on the same data and keeps its shard of every array. All of them
write checkpoints; the first process writes all other files.
"""

from __future__ import annotations

import math
import os
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from policy.qwen3.sharding import batch_sharding, shardings
from worldmodel.errors import InputError

T = TypeVar("T")  # a PyTree of arrays

COORDINATOR, PROCESSES, PROCESS, DISTRIBUTED = (
    f"SEPSIS_JAX_{name}" for name in ("COORDINATOR", "PROCESSES", "PROCESS", "DISTRIBUTED")
)


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins this process with the others of its job; does nothing where it is alone.

    To be called before JAX is asked for its devices. What is not given is read from
    `SEPSIS_JAX_COORDINATOR`, `SEPSIS_JAX_PROCESSES` and `SEPSIS_JAX_PROCESS`. Without those, JAX
    finds out by itself in a step of several Slurm tasks, on several TPU hosts of GKE, and, if
    `SEPSIS_JAX_DISTRIBUTED=auto`, wherever else it can (TPU virtual machines, Open MPI).

    Args:
      coordinator: host:port of the first process.
      processes: how many there are.
      process: the number of this one, from 0.

    Raises:
      InputError: some of the three are missing or mean nothing, or the others cannot be reached.
    """
    given = (coordinator, processes, process)
    names = (COORDINATOR, PROCESSES, PROCESS)
    values = [
        os.environ.get(name) if value is None else value
        for value, name in zip(given, names, strict=True)
    ]
    explicit = any(value is not None for value in values)
    if jax.distributed.is_initialized() or not (explicit or _in_a_cluster()):
        return
    try:
        if explicit:
            address, count, number = values
            if address is None or count is None or number is None:
                raise InputError(f"distributed: give all of {', '.join(names)}, or none")
            # "deactivate": else Slurm's presence would leave this process one of its devices.
            jax.distributed.initialize(
                str(address), int(count), int(number), cluster_detection_method="deactivate"
            )
        else:
            jax.distributed.initialize()
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:
        raise InputError(f"distributed: cannot join the other processes ({error})") from None


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until all processes have called this function (a barrier).

    Args:
      name: of the barrier, for the message on a timeout.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def whole(tree: T) -> T:
    """Arrays as every process can read them: NumPy, gathered from all devices."""
    if jax.process_count() == 1:
        found: T = jax.device_get(tree)
    else:
        found = multihost_utils.process_allgather(tree, tiled=True)
    return found


def from_first(tree: T, like: object) -> T:
    """Broadcasts arrays of the first process to all processes.

    Args:
      tree: PyTree of NumPy arrays; ignored in the other processes.
      like: PyTree of the same structure with the same types and numbers of axes, of any shape.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(like)
    mine = jax.tree.leaves(tree) if is_first() else leaves
    sizes = np.concatenate([np.asarray(leaf.shape, np.int32) for leaf in mine])
    sizes = multihost_utils.broadcast_one_to_all(sizes)
    shapes = np.split(sizes, np.cumsum([leaf.ndim for leaf in leaves])[:-1])
    mine = [
        np.asarray(leaf) if is_first() else np.zeros(shape, leaf.dtype)
        for leaf, shape in zip(mine, shapes, strict=True)
    ]
    found = [np.asarray(leaf) for leaf in multihost_utils.broadcast_one_to_all(mine)]
    result: T = jax.tree.unflatten(structure, found)
    return result


def gathered(mine: bytes) -> list[bytes]:
    """Bytes of every process, in the order of the processes, all of which call this function."""
    if jax.process_count() == 1:
        return [mine]
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    found = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(found, sizes.tolist(), strict=True)]


def place_state(tree: T, mesh: Mesh) -> T:
    """A model's state laid out over a mesh, of several processes too.

    Args:
      tree: arrays that every process holds alike, or that lie on the mesh already.
    """
    placed: T = jax.tree.map(_place, tree, shardings(tree, mesh))
    return placed


def place_batch(batch: T, mesh: Mesh) -> T:
    """Micro-batches laid out over a mesh: rows over data and fsdp.

    Args:
      batch: PyTree of leaves [gradient_accumulation_steps, rows, ...], the same in every process;
        leaves with a single axis are replicated on every device.

    Raises:
      InputError: the rows do not divide.
    """
    (rows,) = batch_sharding(mesh).spec
    count = math.prod(mesh.shape[axis] for axis in rows)

    def one(leaf: jax.Array | np.ndarray) -> jax.Array:
        split = leaf.ndim > 1
        if split and leaf.shape[1] % count:
            raise InputError(
                f"batch: {leaf.shape[1]} rows per micro-batch are no multiple of the {count} "
                "devices along data and fsdp"
            )
        spec = PartitionSpec(None, rows) if split else PartitionSpec()
        return _place(leaf, NamedSharding(mesh, spec))

    placed: T = jax.tree.map(one, batch)
    return placed


def _place(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1 or not getattr(leaf, "is_fully_addressable", True):
        result: jax.Array = jax.device_put(leaf, sharding)
        return result
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def _in_a_cluster() -> bool:
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    return (
        os.environ.get(DISTRIBUTED) == "auto"
        or (tasks.isdecimal() and int(tasks) > 1)
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    )
