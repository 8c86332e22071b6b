"""PyTrees of arrays in Orbax folders; nothing is pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from worldmodel.errors import InputError


def save_arrays(folder: Path, tree: Any) -> None:
    """Writes the leaves of a PyTree under the names of their paths; the folder must be new."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, _named(tree))


def load_arrays(folder: Path, like: Any) -> Any:
    """The PyTree that `save_arrays` wrote.

    Args:
      folder: to read.
      like: a PyTree of the same structure whose leaves have the shapes and types expected.

    Raises:
      InputError: the folder is missing or damaged, or holds other leaves or shapes.
    """
    abstract = _named(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like))
    if not folder.is_dir():
        raise InputError(f"{folder}: missing; the checkpoint is incomplete")
    try:
        restored = _restore(folder, abstract)
    except InputError:
        raise
    except Exception as error:  # Orbax and its stores fail in many ways on damaged folders
        raise InputError(f"{folder}: not a readable checkpoint ({error})") from None
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in abstract])


def _restore(folder: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder)
        found = {name: tuple(leaf.shape) for name, leaf in metadata.item_metadata.tree.items()}
        wanted = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
        if found != wanted:
            name = next(n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n))
            raise InputError(
                f"{folder}: {name} has shape {found.get(name)}, expected {wanted.get(name)}; "
                "the checkpoint belongs to another model configuration"
            )
        return checkpointer.restore(folder, abstract)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as `0.gru.cells.1.weight_hidden.value`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
