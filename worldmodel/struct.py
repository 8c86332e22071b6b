"""Frozen dataclasses that are PyTrees, as of `flax.struct`, whose structures know their type.

JAX's `register_dataclass`, which `flax.struct` uses, makes PyTrees of different classes with equal
fields compare equal (JAX 0.10.2; their hashes differ). The cache of `jax.jit` looks programs up by
this equality behind 7 bits of the hash: now and then it ran one policy's program for another.
Nodes with functions of their own compare by class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


# as `dataclasses.field`, whose value has the type of the field
def field(*, pytree_node: bool = True, **settings: Any) -> Any:
    """A field of a dataclass; static, a part of the structure, unless it is a `pytree_node`."""
    return dataclasses.field(metadata={"pytree_node": pytree_node}, **settings)


@dataclass_transform(field_specifiers=(field,), frozen_default=True)
def dataclass(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a PyTree; `replace` returns a changed copy."""
    made = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    nodes = [one.name for one in fields if one.metadata.get("pytree_node", True)]
    static = [one.name for one in fields if not one.metadata.get("pytree_node", True)]
    keys = [jax.tree_util.GetAttrKey(name) for name in nodes]

    def flatten(value: T) -> tuple[list[object], tuple[object, ...]]:
        given = vars(value)
        return [given[name] for name in nodes], tuple(given[name] for name in static)

    def flatten_with_keys(value: T) -> tuple[list[tuple[object, object]], tuple[object, ...]]:
        children, rest = flatten(value)
        return list(zip(keys, children, strict=True)), rest

    def unflatten(rest: tuple[object, ...], children: Iterable[object]) -> T:
        value = object.__new__(made)
        vars(value).update(zip(nodes, children, strict=True))
        vars(value).update(zip(static, rest, strict=True))
        return value

    def replace(self: T, **changes: object) -> T:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    made.replace = replace  # type: ignore[attr-defined]
    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made
