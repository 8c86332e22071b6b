"""Checkpoints: a training run's state after every epoch, and finished world models.

Both are Orbax folders of arrays with JSON beside them. A world model can also be a folder as the
Hugging Face hub has them: config.json, model.safetensors, README.md. Nothing is pickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from worldmodel import schema
from worldmodel.cards import CARD, world_model_card
from worldmodel.episode_files import dose_edges_of, dose_edges_to_dict
from worldmodel.errors import InputError
from worldmodel.files import (
    atomic_folder,
    load_arrays,
    named_leaves,
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
MODEL_TYPE = "sepsis_jax_world_model"
PARAMS, WEIGHTS, CONFIG = "params", "model.safetensors", "config.json"
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
        write_json(folder / "manifest.json", _described(world_model) | dict(manifest or {}))
    return path


def save_pretrained(
    world_model: WorldModel, path: str | Path, *, manifest: Mapping[str, object] | None = None
) -> Path:
    """Writes a world model as a folder as the Hugging Face hub has them.

    Args:
      world_model: what to save.
      path: folder to make; an existing one of this kind is replaced.
      manifest: metrics and provenance, for config.json and the model card.

    Raises:
      InputError: something else is in the way.
    """
    path = Path(path).absolute()
    facts = _described(world_model) | dict(manifest or {})
    leaves = named_leaves(_params(world_model))
    with atomic_folder(path, marker=WEIGHTS) as folder:
        save_file(
            {name: np.asarray(leaf) for name, leaf in leaves.items()},
            folder / WEIGHTS,
            metadata={"format": "flax"},
        )
        scaler = world_model.scaler.to_dict()
        write_json(folder / CONFIG, {"model_type": MODEL_TYPE, **facts, "scaler": scaler})
        (folder / CARD).write_text(world_model_card(facts))
    return path


def load_pretrained(path: str | Path) -> WorldModel:
    """The world model that `save_pretrained` wrote, bit by bit.

    Raises:
      InputError: the folder is missing, is not a world model, or holds other shapes.
    """
    path = Path(path).absolute()
    require_folder(path, "write one with `sepsis-jax world-model export --pretrained`")
    file = path / CONFIG
    config = read_json(file)
    like = _empty(config, file)
    try:
        found = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path / WEIGHTS}: not readable ({error})") from None
    wanted = named_leaves(_params(like))
    if set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))[0]
        raise InputError(f"{path / WEIGHTS}: tensor {odd} is missing or unknown")
    for name, leaf in wanted.items():
        if found[name].shape != leaf.shape or found[name].dtype != leaf.dtype:
            raise InputError(
                f"{path / WEIGHTS}: {name} is {found[name].dtype} of shape {found[name].shape}, "
                f"expected {leaf.dtype} of {leaf.shape}"
            )
    leaves = [jnp.asarray(found[name]) for name in wanted]
    params = jax.tree.unflatten(jax.tree.structure(_params(like)), leaves)
    scaler = config.get("scaler")
    if not isinstance(scaler, dict):
        raise InputError(f"{file}: no scaler")
    return _filled(like, params, Scaler.from_dict(scaler, source=str(file)))


def load_world_model(path: str | Path) -> WorldModel:
    """A world model from a checkpoint folder, or from one of another form.

    These are a folder that `save_pretrained` wrote, and SepsisAgent's folder of `.pt` files.

    Raises:
      InputError: the folder is missing, is not a world model, or holds other shapes.
    """
    path = Path(path).absolute()
    require_folder(path, "train one with `sepsis-jax world-model train`")
    if is_reference_folder(path):
        return load_reference(path)
    if (path / WEIGHTS).exists():
        return load_pretrained(path)
    file = path / "manifest.json"
    like = _empty(read_json(file), file)
    params = load_arrays(path / PARAMS, _params(like))
    scaler = Scaler.from_dict(read_json(path / "scaler.json"), source=str(path))
    return _filled(like, params, scaler)


def _described(world_model: WorldModel) -> dict[str, object]:
    """What a world model is, as JSON."""
    return {
        "kind": KIND,
        "schema_version": schema.SCHEMA_VERSION,
        "config": asdict(world_model.config),
        "members": world_model.num_members,
        "step_hours": world_model.step_hours,
        "dose_edges": dose_edges_to_dict(world_model.dose_edges),
        "stay_steps": world_model.stay_steps,
    }


def _empty(manifest: object, file: Path) -> WorldModel:
    """A world model as described, with shapes in place of arrays."""
    path = file.parent
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if not isinstance(manifest, dict) or kind != KIND:
        raise InputError(f"{path}: not a world model (its {file.stem} says {kind!r})")
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
        stay_steps = int(manifest.get("stay_steps", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: field missing or malformed ({error})") from None
    edges = dose_edges_of(manifest, source=str(file))
    found: WorldModel = jax.eval_shape(
        lambda: init_world_model(
            jax.random.key(0),
            Scaler(*(jnp.zeros(n) for n in (39, 39, 3, 3))),
            config,
            members=members,
        )
    )
    return replace(found, step_hours=step_hours, dose_edges=edges, stay_steps=stay_steps)


def _filled(
    like: WorldModel,
    params: tuple[StateModel | RecurrentStateModel, OutcomeModel | CompetingRisks],
    scaler: Scaler,
) -> WorldModel:
    state_model, outcome_model = params
    return replace(like, state_model=state_model, outcome_model=outcome_model, scaler=scaler)


def _params(
    world_model: WorldModel,
) -> tuple[StateModel | RecurrentStateModel, OutcomeModel | CompetingRisks]:
    return world_model.state_model, world_model.outcome_model


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: TreeT) -> TreeT:
    plain: TreeT = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)
    return plain
