"""Checkpoints: a training run's state after every epoch, and finished world models.

Both are Orbax folders of arrays with JSON beside them; nothing is pickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp

from worldmodel import schema
from worldmodel.episode_files import dose_edges_of, dose_edges_to_dict
from worldmodel.errors import InputError
from worldmodel.files import (
    atomic_folder,
    load_arrays,
    read_json,
    require_folder,
    save_arrays,
    write_json,
)
from worldmodel.models.clinical_model import ModelConfig, OutcomeModel, StateModel
from worldmodel.models.recurrent import CompetingRisks, RecurrentStateModel
from worldmodel.models.reference import is_reference_folder, load_reference
from worldmodel.models.world_model import WorldModel, init_world_model
from worldmodel.scaling import Scaler

TreeT = TypeVar("TreeT")

KIND = "sepsis-jax world model"
PARAMS = "params"
RUN_FILE = "run.json"


class Saver:
    """Keeps the newest training state of one run in a folder.

    Args:
      folder: made when the first epoch is saved.
      fingerprint: what the run depends on; a folder of another run is refused.

    Raises:
      InputError: the folder holds the state of another run.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, object]):
        self._folder = Path(folder).absolute()
        self._fingerprint = dict(fingerprint)
        file = self._folder / "state" / RUN_FILE
        if file.exists() and read_json(file) != self._fingerprint:
            raise InputError(
                f"{self._folder}: holds the state of a run with other settings or data; "
                "remove it or train into another folder"
            )

    def save(self, epoch: int, state: object, history: list[dict[str, float]]) -> None:
        """Saves after an epoch; the previous state is deleted once the new one is complete."""
        with atomic_folder(self._folder / "state", marker=RUN_FILE) as temporary:
            save_arrays(temporary / "arrays", _without_keys(state))
            write_json(temporary / "history.json", {"epoch": epoch, "history": history})
            write_json(temporary / RUN_FILE, self._fingerprint)

    def restore(self, state: TreeT) -> tuple[TreeT, list[dict[str, float]]]:
        """The saved state and history, or the given state where nothing was saved."""
        folder = self._folder / "state"
        if not folder.exists():
            return state, []
        arrays = load_arrays(folder / "arrays", _without_keys(state))
        restored = jax.tree.map(
            lambda new, old: jax.random.wrap_key_data(new) if _is_key(old) else new, arrays, state
        )
        return restored, read_json(folder / "history.json")["history"]


def save_world_model(
    world_model: WorldModel, path: str | Path, *, manifest: Mapping[str, object] | None = None
) -> Path:
    """Writes a world model as a folder that appears whole or not at all.

    Args:
      world_model: what to save.
      path: folder to make; an existing world model there is replaced.
      manifest: metrics and provenance to keep beside the parameters.

    Raises:
      InputError: something else is in the way.
    """
    path = Path(path).absolute()
    with atomic_folder(path, marker=PARAMS) as folder:
        save_arrays(folder / PARAMS, _params(world_model))
        write_json(folder / "scaler.json", world_model.scaler.to_dict())
        write_json(
            folder / "manifest.json",
            {
                "kind": KIND,
                "schema_version": schema.SCHEMA_VERSION,
                "config": asdict(world_model.config),
                "members": world_model.num_members,
                "step_hours": world_model.step_hours,
                "dose_edges": dose_edges_to_dict(world_model.dose_edges),
                "stay_steps": world_model.stay_steps,
                **(manifest or {}),
            },
        )
    return path


def load_world_model(path: str | Path) -> WorldModel:
    """A world model from a checkpoint folder, or from SepsisAgent's folder of `.pt` files.

    Raises:
      InputError: the folder is missing, is not a world model, or holds other shapes.
    """
    path = Path(path).absolute()
    require_folder(path, "train one with `sepsis-jax world-model train`")
    if is_reference_folder(path):
        return load_reference(path)
    file = path / "manifest.json"
    manifest = read_json(file)
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if kind != KIND:
        raise InputError(f"{path}: not a world model (its manifest says {kind!r})")
    if manifest.get("schema_version") != schema.SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema version {manifest.get('schema_version')}, this software reads "
            f"{schema.SCHEMA_VERSION}; train the model again"
        )
    try:
        config = ModelConfig(**manifest["config"])
        members, step_hours = int(manifest["members"]), float(manifest["step_hours"])
        if members < 1 or not 0 < step_hours < math.inf:
            raise ValueError(f"members {members}, step_hours {step_hours}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: field missing or malformed ({error})") from None
    world_model = jax.eval_shape(
        lambda: init_world_model(
            jax.random.key(0),
            Scaler(*(jnp.zeros(n) for n in (39, 39, 3, 3))),
            config,
            members=members,
        )
    )
    state_model, outcome_model = load_arrays(path / PARAMS, _params(world_model))
    return WorldModel(
        state_model=state_model,
        outcome_model=outcome_model,
        scaler=Scaler.from_dict(read_json(path / "scaler.json"), source=str(path)),
        config=config,
        step_hours=step_hours,
        dose_edges=dose_edges_of(manifest, source=str(file)),
        stay_steps=int(manifest.get("stay_steps", 0)),
    )


def _params(
    world_model: WorldModel,
) -> tuple[StateModel | RecurrentStateModel, OutcomeModel | CompetingRisks]:
    return world_model.state_model, world_model.outcome_model


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: TreeT) -> TreeT:
    plain: TreeT = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)
    return plain
