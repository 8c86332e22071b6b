"""Folders of episodes.

A folder of episodes holds

- `episodes.parquet`: one row per stay and step, in physical units;
- `scaler.json`: the scaler fitted on the training split (`worldmodel.scaling.Scaler`);
- `manifest.json`: schema version, step length, dose edges, counts and what made the folder;
- `croissant.json` and `README.md`: files, fields, units and terms, for those who find the folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from worldmodel import croissant, schema
from worldmodel.cards import CARD, Manifest, data_card
from worldmodel.episodes import COLUMNS, Episodes, from_table, table_problems, to_table
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, read_json, require_folder, write_json
from worldmodel.scaling import Scaler

__all__ = [
    "COLUMNS",
    "EPISODES_FILE",
    "dose_edges_of",
    "dose_edges_to_dict",
    "from_table",
    "load_dose_edges",
    "load_episodes",
    "load_episodes_for",
    "load_manifest",
    "load_scaler",
    "save_episodes",
    "table_problems",
    "to_table",
]
EPISODES_FILE = "episodes.parquet"


def save_episodes(
    episodes: Episodes,
    path: str | Path,
    *,
    scaler: Scaler | None = None,
    dose_edges: schema.DoseEdges = schema.DEFAULT_DOSE_EDGES,
    step_hours: float = schema.STEP_HOURS,
    manifest: Mapping[str, object] | None = None,
) -> Path:
    """Writes a folder of episodes; the folder appears whole or not at all.

    Args:
      episodes: what to write.
      path: folder to make; an existing folder of episodes is replaced.
      scaler: written beside; fitted on the training split when not given.
      dose_edges: edges of the dose levels in `episodes`.
      step_hours: length of a step in hours.
      manifest: provenance and counts to keep in `manifest.json`.

    Returns:
      The folder.

    Raises:
      InputError: something else is in the way, or no scaler can be fitted.
    """
    path = Path(path)
    facts: dict[str, object] = {
        "schema_version": schema.SCHEMA_VERSION,
        "step_hours": step_hours,
        "dose_edges": dose_edges_to_dict(dose_edges),
        "units": {feature.name: feature.unit for feature in schema.FEATURES},
        "stays": episodes.num_stays,
        "rows": int(np.asarray(episodes.length).sum()),
        **(manifest or {}),
    }
    table = to_table(episodes)
    with atomic_folder(path, marker=EPISODES_FILE) as folder:
        table.to_parquet(folder / EPISODES_FILE, index=False)
        write_json(folder / "scaler.json", (scaler or Scaler.fit(episodes)).to_dict())
        write_json(folder / "manifest.json", facts)
        write_json(
            folder / croissant.FILE,
            croissant.croissant(folder, EPISODES_FILE, dict(table.dtypes), facts),
        )
        (folder / CARD).write_text(data_card(facts))
    return path


# JSON of any structure
def load_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a folder of episodes.

    Raises:
      InputError: the folder or its manifest is missing, or has another schema version.
    """
    path = Path(path)
    require_folder(path, f"make one with `sepsis-jax cohort synthetic --out {path}`")
    manifest = read_json(path / "manifest.json")
    if not isinstance(manifest, dict):
        raise InputError(f"{path / 'manifest.json'}: not a manifest; rebuild the cohort")
    version = manifest.get("schema_version")
    if version != schema.SCHEMA_VERSION:
        raise InputError(
            f"{path / 'manifest.json'}: schema version {version}, this software reads "
            f"{schema.SCHEMA_VERSION}; rebuild the cohort"
        )
    hours = manifest.get("step_hours", schema.STEP_HOURS)
    if not isinstance(hours, int | float) or not 0 < hours < math.inf:
        raise InputError(
            f"{path / 'manifest.json'}: step_hours is {hours!r}, expected hours above 0; "
            "rebuild the cohort"
        )
    return manifest


def load_episodes(
    path: str | Path,
    *,
    step_hours: float | None = None,
    dose_edges: schema.DoseEdges | None = None,
    shared_patients: bool = False,
) -> Episodes:
    """Episodes from a folder that `save_episodes` wrote.

    Args:
      path: the folder.
      step_hours: length of a step that is needed, as of a world model; None for any.
      dose_edges: edges of the dose levels that are needed, as of a world model; None for any.
      shared_patients: allow stays of one patient in several splits, for an audit to tell.

    Raises:
      InputError: a file is missing, unreadable or of another schema version, a value is bad
        (as in `from_table`), or the steps, dose levels or units are others.
    """
    path = Path(path)
    manifest = load_manifest(path)
    found = manifest.get("step_hours", schema.STEP_HOURS)
    if step_hours is not None and found != step_hours:
        raise InputError(
            f"{path}: steps of {found:g} h, but the model was trained on {step_hours:g} h; "
            "build the cohort with the model's step_hours"
        )
    _check_edges(path, manifest, dose_edges)
    for feature in schema.FEATURES:
        unit = manifest.get("units", {}).get(feature.name, feature.unit)
        if unit != feature.unit:
            raise InputError(
                f"{path / 'manifest.json'}: {feature.name} is in {unit}, expected "
                f"{feature.unit}; convert the column and the manifest, or rebuild the cohort"
            )
    file = path / EPISODES_FILE
    if not file.exists():
        raise InputError(f"{file}: missing; rebuild the cohort")
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable Parquet file ({error}); rebuild it") from None
    return from_table(table, source=str(file), shared_patients=shared_patients)


class StepsAndLevels(Protocol):
    """What a world model and its episodes must share."""

    @property
    def step_hours(self) -> float:
        """Length of a step in hours."""

    @property
    def dose_edges(self) -> schema.DoseEdges:
        """Edges of the dose levels."""


def load_episodes_for(
    world_model: StepsAndLevels | None, path: str | Path, *, shared_patients: bool = False
) -> Episodes:
    """`load_episodes` with the steps and dose levels of a world model; None for any.

    Raises:
      InputError: as `load_episodes` does.
    """
    if world_model is None:
        return load_episodes(path, shared_patients=shared_patients)
    return load_episodes(
        path,
        step_hours=world_model.step_hours,
        dose_edges=world_model.dose_edges,
        shared_patients=shared_patients,
    )


def _check_edges(
    path: Path, manifest: Mapping[str, object], needed: schema.DoseEdges | None
) -> None:
    if needed is None:
        return
    found = dose_edges_of(manifest, source=str(path / "manifest.json"))
    for drug in ("vasopressor", "fluid"):
        here, there = getattr(found, drug), getattr(needed, drug)
        if not np.allclose(here, there, rtol=1e-6, atol=0):
            raise InputError(
                f"{path}: {drug} levels have the edges {_listed(here)}, but the model was "
                f"trained with {_listed(there)}; build the cohort with the model's "
                f"{drug}_edges, or train a model on these episodes"
            )


def _listed(edges: Iterable[float]) -> str:
    return ", ".join(f"{edge:.6g}" for edge in edges)


def load_dose_edges(path: str | Path) -> schema.DoseEdges:
    """Edges of the dose levels of a folder of episodes."""
    return dose_edges_of(load_manifest(path), source=str(Path(path) / "manifest.json"))


def dose_edges_to_dict(edges: schema.DoseEdges) -> dict[str, list[float]]:
    """Dose edges as manifests hold them."""
    return {"vasopressor_mcg_kg_min": list(edges.vasopressor), "fluid_ml": list(edges.fluid)}


def dose_edges_of(manifest: Manifest, *, source: str) -> schema.DoseEdges:
    """Dose edges from a manifest's `dose_edges`.

    Raises:
      InputError: the field is missing or is not three doses in order per drug.
    """
    try:
        edges = manifest["dose_edges"]
        return schema.DoseEdges(
            vasopressor=_rising(edges["vasopressor_mcg_kg_min"]), fluid=_rising(edges["fluid_ml"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source}: dose_edges missing or malformed ({error})") from None


def _rising(doses: Iterable[float]) -> tuple[float, float, float]:
    first, second, third = (float(dose) for dose in doses)
    if not 0 < first <= second <= third:
        raise ValueError(f"{doses} do not rise from above 0")
    return first, second, third


def load_scaler(path: str | Path) -> Scaler:
    """The scaler beside a folder of episodes."""
    load_manifest(path)
    return Scaler.from_dict(read_json(Path(path) / "scaler.json"), source=str(path))
