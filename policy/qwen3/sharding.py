"""Models laid out over a mesh: which axis of which array lies along which axis of the mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from policy.qwen3.config import Qwen3Config
from worldmodel.errors import InputError

T = TypeVar("T")  # a PyTree or a module


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `data` x `fsdp` x `tensor` devices.

    Args:
      data: copies of the parameters, each reading rows of its own.
      fsdp: shards of the parameters, gathered layer by layer; they too read rows of their own.
      tensor: shards of heads, MLP and vocabulary, that read the same rows.
      devices: to use; the first of `jax.devices()` if not given.

    Raises:
      InputError: there are too few devices.
    """
    count = data * fsdp * tensor
    devices = jax.devices() if devices is None else devices
    if count > len(devices):
        raise InputError(
            f"mesh of {data} x {fsdp} x {tensor}: needs {count} devices, there are {len(devices)}"
        )
    return jax.make_mesh(
        (data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count]
    )


def check_divisible(config: Qwen3Config, mesh: Mesh | AbstractMesh) -> None:
    """Makes sure that the axes of a model divide evenly.

    Raises:
      InputError: heads, MLP, vocabulary or width do not.
    """
    for name, axis in (
        ("num_key_value_heads", "tensor"),
        ("intermediate_size", "tensor"),
        ("vocab_size", "tensor"),
        ("hidden_size", "fsdp"),
    ):
        if getattr(config, name) % mesh.shape[axis]:
            raise InputError(
                f"{name} {getattr(config, name)} is no multiple of the {mesh.shape[axis]} devices "
                f"along {axis}"
            )


# the structure is that of the tree
def shardings(tree: object, mesh: Mesh | AbstractMesh) -> Any:
    """How each array of a tree lies on the mesh.

    Args:
      tree: a model's state, its gradients, or the state of an optimiser over it; arrays or shapes.
    """

    def place(path: tuple[object, ...], leaf: jax.Array) -> NamedSharding:
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        names = [name for name in names if isinstance(name, str) and name != "value"]
        return NamedSharding(mesh, param_spec(names, leaf.ndim))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How arrays [B, ...] of a batch lie: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def shard(tree: T, mesh: Mesh) -> T:
    """A model's or an optimiser's state, laid out over the mesh."""
    placed: T = jax.device_put(tree, shardings(tree, mesh))
    return placed


def abstract(make: Callable[[], T], mesh: Mesh | AbstractMesh) -> T:
    """Shapes, types and shardings of a tree that is never made.

    Args:
      make: gives the tree; a module's state, an optimiser's, ...
    """
    shapes = jax.eval_shape(make)
    result: T = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings(shapes, mesh),
    )
    return result


def init_sharded(make: Callable[[], T], mesh: Mesh) -> T:
    """A module whose parameters are made where they will lie; no device holds them all.

    Args:
      make: gives the module.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(make))

    def state() -> object:
        return nnx.state(make())

    places = shardings(jax.eval_shape(state), mesh)
    made: T = nnx.merge(graphdef, jax.jit(state, out_shardings=places)())
    return made


def bytes_per_device(tree: object) -> int:
    """Bytes that one device holds of arrays or shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    # parameters
    "param_embed": "fsdp",
    "param_heads": "tensor",
    "param_mlp": "tensor",
    "param_vocab": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "rows": "data",  # read by all that share the parameters
    "length": None,
    "embed": None,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": ("fsdp", "tensor"),
}

_LOGICAL: dict[tuple[str, str], tuple[str | None, ...]] = {
    ("embed_tokens", "embedding"): ("param_vocab", "param_embed"),
    ("lm_head", "kernel"): ("param_embed", "param_vocab"),
    ("q_proj", "kernel"): ("param_embed", "param_heads"),
    ("k_proj", "kernel"): ("param_embed", "param_heads"),
    ("v_proj", "kernel"): ("param_embed", "param_heads"),
    ("q_proj", "bias"): ("param_heads",),
    ("k_proj", "bias"): ("param_heads",),
    ("v_proj", "bias"): ("param_heads",),
    ("o_proj", "kernel"): ("param_heads", "param_embed"),
    ("gate_proj", "kernel"): ("param_embed", "param_mlp"),
    ("up_proj", "kernel"): ("param_embed", "param_mlp"),
    ("down_proj", "kernel"): ("param_mlp", "param_embed"),
}


def to_mesh(logical: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of logical axes."""
    return PartitionSpec(*(RULES[name] for name in logical))


def param_spec(path: Sequence[object], ndim: int) -> PartitionSpec:
    """How the array at a path lies on the mesh.

    Args:
      path: names that end as in the model's state, such as (..., "q_proj", "kernel"); what comes
        before does not matter, so gradients and moments of an optimiser are placed alike.
      ndim: axes of the array; leading ones beyond the logical (layers) are not split. Norms,
        counters and whatever else has no rule lie whole on every device.
    """
    names = [str(name) for name in path]
    for end in range(len(names), 1, -1):
        found = _of_leaf(names[:end])
        if found is not None and ndim >= len(found):
            return PartitionSpec(*([None] * (ndim - len(found))), *to_mesh(found))
    return PartitionSpec()


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Asks the compiler to lay an activation along its logical axes.

    Does nothing outside of `jax.set_mesh` with a mesh of `AXES`. An axis that does not divide over
    its devices lies whole on each.
    """
    mesh = _mesh()
    if mesh is None:
        return x
    spec = to_mesh(logical)
    even = (
        axes if size % _devices(mesh, axes) == 0 else None
        for axes, size in zip(spec, x.shape, strict=True)
    )  # fmt: skip
    result: jax.Array = jax.lax.with_sharding_constraint(x, PartitionSpec(*even))
    return result


def _mesh() -> AbstractMesh | None:
    """That of `jax.set_mesh`, if it has our axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or set(mesh.axis_names) != set(AXES) else mesh


def _devices(mesh: AbstractMesh, axes: str | Sequence[str] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def on_own_share(
    f: Callable[..., jax.Array],
    logical: Sequence[Sequence[str | None]],
    out: Sequence[str | None],
    *arrays: jax.Array,
) -> jax.Array:
    """f, run by every device on its own share of the arrays, of which it needs no other.

    Left to itself the compiler gathers what loops over blocks of a split array read.

    Args:
      f: of the arrays, or of a device's share of them.
      logical: logical axes of each array.
      out: of the result.
      arrays: as they lie. f gets them whole outside of `jax.set_mesh` with a mesh of `AXES`, and
        where an axis does not divide over the devices.
    """
    mesh = _mesh()
    if mesh is None:
        return f(*arrays)
    specs = tuple(to_mesh(names) for names in logical)
    for spec, array in zip(specs, arrays, strict=True):
        if any(n % _devices(mesh, axes) for axes, n in zip(spec, array.shape, strict=True)):
            return f(*arrays)
    shared = jax.shard_map(f, in_specs=specs, out_specs=to_mesh(out), check_vma=False)
    result: jax.Array = shared(*arrays)
    return result


def _of_leaf(names: Sequence[str]) -> tuple[str | None, ...] | None:
    module, leaf = names[-2:]
    if module != "adapter":
        return _LOGICAL.get((module, leaf))
    owner = _LOGICAL.get((names[-3], "kernel")) if len(names) > 2 else None
    if owner is None:
        return None
    return {"a": (owner[0], None), "b": (None, owner[1])}.get(leaf)
