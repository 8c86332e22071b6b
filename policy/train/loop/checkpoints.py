"""Checkpoints of a training run, for exact resumption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from worldmodel.errors import InputError
from worldmodel.files import read_json, write_json

RUN_FILE, _STEPS = "run.json", "steps"


class Restored(NamedTuple):
    """Contents of a checkpoint."""

    state: Any  # like the template
    extra: dict[str, Any]
    arrays: Any  # like the template; None if none was given


class Checkpoints:
    """The newest states of one run in a folder.

    Checkpoints are written atomically: a run that is killed leaves the previous one. With several
    processes, all of them call every method, on a shared folder.

    Args:
      folder: made at once; of this run alone.
      keep: checkpoints that stay; the disk must have room for one more.
      fingerprint: JSON of what the run depends on, such as its settings.

    Raises:
      InputError: the folder belongs to a run with another fingerprint, or cannot be made.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 2, fingerprint: Mapping[str, object] | None = None
    ):
        self.folder = Path(folder).absolute()
        if keep < 1:
            raise InputError(f"keep: got {keep}, expected at least 1")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        handlers: Any = {
            "state": ocp.StandardCheckpointHandler(),
            "extra": ocp.JsonCheckpointHandler(),
            "arrays": ocp.StandardCheckpointHandler(),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim(json.loads(json.dumps(dict(fingerprint or {}))))
            self._manager = ocp.CheckpointManager(
                self.folder / _STEPS, options=options, item_handlers=handlers
            )
        except OSError as error:
            raise InputError(f"{self.folder}: cannot keep checkpoints here ({error})") from None

    def latest(self) -> int | None:
        """The newest checkpoint's step; None if there is none."""
        result: int | None = self._manager.latest_step()
        return result

    def save(
        self, step: int, state: object, extra: Mapping[str, object], arrays: object = None
    ) -> None:
        """Saves, then removes what is too old.

        Args:
          step: of the checkpoint; one that is there already stays as it is.
          state: PyTree of arrays, sharded or not.
          extra: JSON: data cursor, policy version, ...
          arrays: a further PyTree, such as the weights of a lagged policy.

        Raises:
          InputError: a value is not finite, or the disk is full or not writable; the checkpoints
            before are still good.
        """
        if step == self.latest():
            return
        if not _finite(state):
            raise InputError(
                f"step {step}: parameters or moments are not finite and were not saved; "
                f"{self._before()}; lower learning_rate or look for damaged data"
            )
        items: dict[str, object] = {
            "state": ocp.args.StandardSave(_named(state)),
            "extra": ocp.args.JsonSave(dict(extra)),
        }
        if arrays is not None:
            items["arrays"] = ocp.args.StandardSave(_named(arrays))
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # Orbax and its stores fail in many ways on full disks
            raise InputError(
                f"{self.folder}: cannot save step {step} ({_first_line(error)}); {self._before()}; "
                "make room on the disk and start again"
            ) from None

    def restore(self, state: object, *, step: int | None = None, arrays: object = None) -> Restored:
        """Reads a checkpoint.

        Args:
          state: template; what is read has its structure, shapes, types and shardings.
          step: which; the newest if not given.
          arrays: template of the further PyTree, if it is wanted.

        Raises:
          InputError: there is none, it is damaged, or it holds other shapes.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise InputError(f"{self.folder}: no checkpoint to go on from")
        folder = self.folder / _STEPS / str(step)
        templates = {"state": state} | ({} if arrays is None else {"arrays": arrays})
        items: dict[str, object] = {"extra": ocp.args.JsonRestore()}
        try:
            for name, template in templates.items():
                _check(self._manager.item_metadata(step)[name], template, folder / name)
                items[name] = ocp.args.StandardRestore(_named(_abstract(template)))
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except InputError:
            raise
        except Exception as error:  # likewise on damaged folders
            raise InputError(
                f"{folder}: not a readable checkpoint ({_first_line(error)}); remove it to go on "
                "from the one before"
            ) from None
        trees = {
            name: jax.tree.unflatten(
                jax.tree.structure(template), [found[name][key] for key in _named(template)]
            )
            for name, template in templates.items()
        }
        return Restored(trees["state"], found["extra"], trees.get("arrays"))

    def close(self) -> None:
        """Frees the threads that write."""
        self._manager.close()

    def _claim(self, fingerprint: dict[str, object]) -> None:
        file = self.folder / RUN_FILE
        if file.exists():
            before = read_json(file)
            if before != fingerprint:
                names = sorted({*before, *fingerprint})
                name = next(n for n in names if before.get(n) != fingerprint.get(n))
                raise InputError(
                    f"{self.folder}: holds checkpoints of a run with another {name!r} "
                    f"({before.get(name)}, now {fingerprint.get(name)}); choose another folder"
                )
        elif jax.process_index() == 0:
            write_json(file, fingerprint)

    def _before(self) -> str:
        step = self.latest()
        return "nothing was saved before" if step is None else f"step {step} is still good"


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _finite(tree: object) -> bool:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return not leaves or bool(_all_finite(leaves))


def _check(metadata: Any, template: object, source: Path) -> None:
    found = {name: tuple(leaf.shape) for name, leaf in metadata.tree.items()}
    wanted = {name: tuple(leaf.shape) for name, leaf in _named(template).items()}
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{source}: {name} has shape {found.get(name)}, expected {wanted.get(name)}; "
                "the checkpoint belongs to another model or other settings"
            )


def _abstract(tree: object) -> object:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        tree,
    )


def _named(tree: object) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _first_line(error: Exception) -> str:
    """Shortened at its beginning: chains of errors end with the cause."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line if len(line) <= 200 else f"...{line[-200:]}"
