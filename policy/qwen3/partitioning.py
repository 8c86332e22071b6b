"""Which axis of which array lies along which axis of the mesh.

Arrays have logical axes; `RULES` maps those to the mesh axes `data` (copies), `fsdp` (rows and
shards of parameters) and `tensor` (heads, columns of the MLP, vocabulary).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

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
    "length": None,
    "embed": None,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

_LOGICAL: dict[tuple[str, str], tuple[str | None, ...]] = {
    ("embed_tokens", "embedding"): ("param_vocab", "param_embed"),
    ("lm_head", "kernel"): ("param_embed", "param_vocab"),
    ("q_proj", "kernel"): ("param_embed", "param_heads"),
    ("k_proj", "kernel"): ("param_embed", "param_heads"),
    ("v_proj", "kernel"): ("param_embed", "param_heads"),
    ("o_proj", "kernel"): ("param_heads", "param_embed"),
    ("gate_proj", "kernel"): ("param_embed", "param_mlp"),
    ("up_proj", "kernel"): ("param_embed", "param_mlp"),
    ("down_proj", "kernel"): ("param_mlp", "param_embed"),
}


def to_mesh(logical: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of logical axes."""
    return PartitionSpec(*(RULES[name] for name in logical))


def param_spec(path: Sequence[Any], ndim: int) -> PartitionSpec:
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

    Does nothing outside of `jax.set_mesh` with a mesh of `AXES`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) != set(AXES):
        return x
    return jax.lax.with_sharding_constraint(x, to_mesh(logical))


def _of_leaf(names: Sequence[str]) -> tuple[str | None, ...] | None:
    module, leaf = names[-2:]
    if module != "adapter":
        return _LOGICAL.get((module, leaf))
    owner = _LOGICAL.get((names[-3], "kernel")) if len(names) > 2 else None
    if owner is None:
        return None
    return {"a": (owner[0], None), "b": (None, owner[1])}.get(leaf)
