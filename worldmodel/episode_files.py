"""Episodes as tables and files.

A folder of episodes holds

- `episodes.parquet`: one row per stay and step, in physical units;
- `scaler.json`: the scaler fitted on the training split (`worldmodel.scaling.Scaler`);
- `manifest.json`: schema version, step length, dose edges, counts and what made the folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, read_json, write_json
from worldmodel.scaling import Scaler

EPISODES_FILE = "episodes.parquet"
MASK_SUFFIX = "_measured"
MASK_NAMES: tuple[str, ...] = tuple(name + MASK_SUFFIX for name in schema.MASKED_NAMES)
STEP_COLUMNS: dict[str, str] = {
    "vasopressor": "vasopressor_level",
    "fluid": "fluid_level",
    "vasopressor_dose": "vasopressor_dose",
    "fluid_dose": "fluid_ml",
    "ventilated": "ventilated",
    "sofa": "sofa",
    "urine_24h": "urine_24h",
    "behavior_prob": "behavior_prob",
}
STAY_COLUMNS: tuple[str, ...] = ("died_90d", "died_in_hospital", "stay_id", "subject_id")
COLUMNS: tuple[str, ...] = (
    "stay_id", "subject_id", "split", "step",
    *schema.FEATURE_NAMES, *MASK_NAMES, *schema.STATIC_NAMES,
    *STEP_COLUMNS.values(), "died_90d", "died_in_hospital",
)  # fmt: skip


def to_table(episodes: Episodes) -> pd.DataFrame:
    """One row per stay and step, with the columns of `COLUMNS`, in physical units."""
    host = jax.tree.map(np.asarray, episodes)
    stay, step = np.nonzero(np.asarray(episodes.valid))
    columns: dict[str, object] = {
        "stay_id": host.stay_id[stay],
        "subject_id": host.subject_id[stay],
        "split": pd.Categorical.from_codes(host.split[stay], list(schema.SPLITS)),
        "step": step.astype(np.int32),
    }
    dynamic, measured = host.dynamic[stay, step], host.measured[stay, step]
    columns |= {name: dynamic[:, i] for i, name in enumerate(schema.FEATURE_NAMES)}
    columns |= {name: measured[:, i] for i, name in enumerate(MASK_NAMES)}
    columns |= {name: host.static[stay, i] for i, name in enumerate(schema.STATIC_NAMES)}
    columns |= {column: getattr(host, name)[stay, step] for name, column in STEP_COLUMNS.items()}
    columns |= {name: getattr(host, name)[stay] for name in ("died_90d", "died_in_hospital")}
    return pd.DataFrame(columns, columns=list(COLUMNS))


def from_table(table: pd.DataFrame, *, source: str = "table") -> Episodes:
    """Episodes from a table as `to_table` writes it.

    Args:
      table: rows in any order; the steps of a stay must be 0, 1, 2, ...
      source: named in errors.

    Raises:
      InputError: a column is missing, a value is NaN, infinite or outside its range, a split is
        unknown, a stay's steps have gaps, or what belongs to a stay changes within it.
    """
    _check_table(table, source)
    table = table.sort_values(["stay_id", "step"], kind="stable").reset_index(drop=True)
    stays, first, lengths = np.unique(
        table["stay_id"].to_numpy(), return_index=True, return_counts=True
    )
    steps = table["step"].to_numpy()
    expected = np.arange(len(table)) - np.repeat(first, lengths)
    if not np.array_equal(steps, expected):
        bad = table["stay_id"].to_numpy()[np.argmax(steps != expected)]
        raise InputError(f"{source}: steps of stay {bad} are not 0, 1, 2, ...; rebuild the cohort")
    rows = np.repeat(np.arange(len(stays)), lengths)
    for column in (*schema.STATIC_NAMES, "split", "subject_id", "died_90d", "died_in_hospital"):
        values = table[column].to_numpy()
        changed = values != values[first][rows]
        if changed.any():
            bad = stays[rows[np.argmax(changed)]]
            raise InputError(f"{source}: column {column} changes within stay {bad}")

    def padded(values: np.ndarray) -> np.ndarray:
        out = np.zeros((len(stays), int(lengths.max()), *values.shape[1:]), values.dtype)
        out[rows, steps] = values
        return out

    def block(names: tuple[str, ...], dtype: type) -> np.ndarray:
        result: np.ndarray = table[list(names)].to_numpy(dtype)
        return result

    dtypes = {"vasopressor": np.int32, "fluid": np.int32, "ventilated": np.bool_}
    per_step = {
        name: padded(table[column].to_numpy(dtypes.get(name, np.float32)))
        for name, column in STEP_COLUMNS.items()
    }
    stay_dtypes = {"stay_id": np.int32, "subject_id": np.int32}
    per_stay = {
        name: table[name].to_numpy(stay_dtypes.get(name, np.bool_))[first] for name in STAY_COLUMNS
    }
    split = pd.Categorical(table["split"].to_numpy()[first], categories=list(schema.SPLITS))
    arrays = {
        "dynamic": padded(block(schema.FEATURE_NAMES, np.float32)),
        "measured": padded(block(MASK_NAMES, np.bool_)),
        "static": block(schema.STATIC_NAMES, np.float32)[first],
        "length": lengths.astype(np.int32),
        "split": split.codes.astype(np.int32),
        **per_step,
        **per_stay,
    }
    return Episodes(**{name: jnp.asarray(array) for name, array in arrays.items()})


def _check_table(table: pd.DataFrame, source: str) -> None:
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise InputError(
            f"{source}: columns missing: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; write episodes with save_episodes"
        )
    if table.empty:
        raise InputError(f"{source}: no rows; the cohort is empty")
    for column in COLUMNS:
        if column == "split":
            continue
        try:
            values = table[column].to_numpy(np.float64)
        except (TypeError, ValueError):
            raise InputError(f"{source}: column {column} is not numeric") from None
        if column != "behavior_prob" and not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values)))
            raise InputError(
                f"{source}: column {column} is NaN or infinite in row {row}; impute it first"
            )
    levels = dict.fromkeys(("vasopressor_level", "fluid_level"), range(schema.NUM_LEVELS))
    flags = dict.fromkeys((*MASK_NAMES, "ventilated", "died_90d", "died_in_hospital"), (0, 1))
    for column, allowed in {**levels, **flags}.items():
        _refuse(table, column, ~table[column].isin(allowed), f"expected {[*allowed]}", source)
    probability = table["behavior_prob"]
    outside = (probability <= 0) | (probability > 1)
    _refuse(table, "behavior_prob", outside, "expected above 0, at most 1, or NaN", source)
    unknown = ~table["split"].isin(schema.SPLITS)
    _refuse(table, "split", unknown, f"expected one of {schema.SPLITS}", source)


def _refuse(table: pd.DataFrame, column: str, bad: pd.Series, expected: str, source: str) -> None:
    if bad.any():
        row = int(np.argmax(bad.to_numpy()))
        value = table[column].iloc[row]
        raise InputError(f"{source}: column {column} holds {value} in row {row}; {expected}")


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
    with atomic_folder(path, marker=EPISODES_FILE) as folder:
        to_table(episodes).to_parquet(folder / EPISODES_FILE, index=False)
        write_json(folder / "scaler.json", (scaler or Scaler.fit(episodes)).to_dict())
        write_json(
            folder / "manifest.json",
            {
                "schema_version": schema.SCHEMA_VERSION,
                "step_hours": step_hours,
                "dose_edges": dose_edges_to_dict(dose_edges),
                "stays": episodes.num_stays,
                "rows": int(np.asarray(episodes.length).sum()),
                **(manifest or {}),
            },
        )
    return path


# JSON of any structure
def load_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a folder of episodes.

    Raises:
      InputError: the folder or its manifest is missing, or has another schema version.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"{path}: no such folder; make one with `sepsis-jax cohort synthetic --out {path}`"
        )
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


def load_episodes(path: str | Path, *, step_hours: float | None = None) -> Episodes:
    """Episodes from a folder that `save_episodes` wrote.

    Args:
      path: the folder.
      step_hours: length of a step that is needed, as of a world model; None for any.

    Raises:
      InputError: a file is missing, unreadable or of another schema version, a value is bad, or
        the steps have another length.
    """
    path = Path(path)
    found = load_manifest(path).get("step_hours", schema.STEP_HOURS)
    if step_hours is not None and found != step_hours:
        raise InputError(
            f"{path}: steps of {found:g} h, but the model was trained on {step_hours:g} h; "
            "build the cohort with the model's step_hours"
        )
    file = path / EPISODES_FILE
    if not file.exists():
        raise InputError(f"{file}: missing; rebuild the cohort")
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable Parquet file ({error}); rebuild it") from None
    return from_table(table, source=str(file))


def load_dose_edges(path: str | Path) -> schema.DoseEdges:
    """Edges of the dose levels of a folder of episodes."""
    return dose_edges_of(load_manifest(path), source=str(Path(path) / "manifest.json"))


def dose_edges_to_dict(edges: schema.DoseEdges) -> dict[str, list[float]]:
    """Dose edges as manifests hold them."""
    return {"vasopressor_mcg_kg_min": list(edges.vasopressor), "fluid_ml": list(edges.fluid)}


def dose_edges_of(manifest: Mapping[str, Any], *, source: str) -> schema.DoseEdges:
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
