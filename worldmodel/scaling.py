"""Scaling between physical units and z-space.

Urine output is stored as log(1 + mL) before scaling; age and the Charlson index are scaled, sex
is left raw (SepsisAgent, arXiv 2605.14723). The reference scaler's two JSON files are read by
`Scaler.from_reference`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import read_json

SCALER_FILE = "scaler_params_log.json"
FEATURE_FILE = "episode_feature_config.json"
REFERENCE_STATIC = ("age", "gender", "charlson_comorbidity_index")
_MIN_STD = 1e-6
_WIDTHS = {
    "mean": schema.NUM_FEATURES,
    "std": schema.NUM_FEATURES,
    "static_mean": schema.NUM_STATIC,
    "static_std": schema.NUM_STATIC,
}


@struct.dataclass
class Scaler:
    """Means and standard deviations, of the log for urine."""

    mean: jax.Array  # [39]
    std: jax.Array  # [39]
    static_mean: jax.Array  # [3], 0 for sex
    static_std: jax.Array  # [3], 1 for sex

    def normalize(self, dynamic: jax.Array) -> jax.Array:
        """Physical units [..., 39] to z-scores."""
        return (_log_urine(dynamic) - self.mean) / self.std

    def denormalize(self, obs: jax.Array) -> jax.Array:
        """z-scores [..., 39] to physical units; urine is never below 0 mL."""
        values = obs * self.std + self.mean
        urine = jnp.maximum(jnp.expm1(values[..., schema.URINE, None]), 0.0)
        return jnp.where(jnp.arange(schema.NUM_FEATURES) == schema.URINE, urine, values)

    def normalize_static(self, static: jax.Array) -> jax.Array:
        """Age, sex, Charlson [..., 3] to model inputs."""
        return (static - self.static_mean) / self.static_std

    def denormalize_static(self, static: jax.Array) -> jax.Array:
        """Model inputs [..., 3] to age in years, sex, Charlson."""
        return static * self.static_std + self.static_mean

    @classmethod
    def fit(cls, episodes: Episodes, split: str | None = "train") -> Scaler:
        """Fits on the recorded rows of one split (all rows with `split=None`).

        Features that never vary get a standard deviation of 1.

        Raises:
          InputError: the split is empty.
        """
        if split is not None:
            episodes = episodes.of_split(split)
        if not episodes.num_stays:
            raise InputError(f"the {split} split holds no stays; nothing to fit a scaler on")
        rows = np.asarray(episodes.dynamic)[np.asarray(episodes.valid)].astype(np.float64)
        rows[:, schema.URINE] = np.log1p(rows[:, schema.URINE])
        static = np.asarray(episodes.static, np.float64)
        static_mean, static_std = static.mean(0), _safe_std(static)
        static_mean[1], static_std[1] = 0.0, 1.0
        return cls._of(rows.mean(0), _safe_std(rows), static_mean, static_std)

    @classmethod
    def from_reference(cls, folder: str | Path) -> Scaler:
        """Reads `scaler_params_log.json` and `episode_feature_config.json` from a folder.

        Raises:
          InputError: a file is missing or its feature order differs from the schema's.
        """
        folder = Path(folder)
        dynamic, static = read_json(folder / SCALER_FILE), read_json(folder / FEATURE_FILE)
        for file, value in ((SCALER_FILE, dynamic), (FEATURE_FILE, static)):
            if not isinstance(value, dict):
                raise InputError(f"{folder / file}: not a mapping of fields")
        if tuple(dynamic.get("dyn_cols", ())) != schema.FEATURE_NAMES:
            raise InputError(f"{folder / SCALER_FILE}: dyn_cols differ from the schema's order")
        if not dynamic.get("urine_log_transform", False):
            raise InputError(f"{folder / SCALER_FILE}: urine_log_transform must be true")
        if tuple(static.get("static_cols", REFERENCE_STATIC)) != REFERENCE_STATIC:
            raise InputError(f"{folder / FEATURE_FILE}: static_cols must be {REFERENCE_STATIC}")
        try:
            age_mean, charlson_mean = static["static_scaler_mean"]
            age_std, charlson_std = static["static_scaler_std"]
            return cls._of(
                dynamic["dyn_mean"],
                dynamic["dyn_std"],
                (age_mean, 0.0, charlson_mean),
                (age_std, 1.0, charlson_std),
                source=str(folder),
            )
        except InputError:
            raise
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{folder}: scaler field missing or malformed ({error})") from None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, with the feature names it belongs to."""
        return {
            "features": list(schema.FEATURE_NAMES),
            "static": list(schema.STATIC_NAMES),
            **{
                name: np.asarray(getattr(self, name), np.float64).tolist()
                for name in ("mean", "std", "static_mean", "static_std")
            },
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, source: str = "scaler") -> Scaler:
        """Inverse of `to_dict`.

        Raises:
          InputError: a field is missing or the feature order differs from the schema's.
        """
        if not isinstance(value, dict) or tuple(value.get("features", ())) != schema.FEATURE_NAMES:
            raise InputError(f"{source}: scaler features differ from the schema's order")
        try:
            return cls._of(*(value[name] for name in _WIDTHS), source=source)
        except KeyError as error:
            raise InputError(f"{source}: scaler field {error} is missing") from None

    @classmethod
    def _of(cls, *values: Any, source: str = "scaler") -> Scaler:
        arrays = {}
        for (name, width), value in zip(_WIDTHS.items(), values, strict=True):
            try:
                array = np.asarray(value, np.float32)
            except (TypeError, ValueError):
                raise InputError(f"{source}: scaler field {name} is not numeric") from None
            if array.shape != (width,):
                raise InputError(
                    f"{source}: scaler field {name} has shape {array.shape}, expected {(width,)}"
                )
            if not np.isfinite(array).all() or (name.endswith("std") and (array <= 0).any()):
                raise InputError(
                    f"{source}: scaler field {name} holds NaN, infinite or useless values"
                )
            arrays[name] = jnp.asarray(array)
        return cls(**arrays)


def _safe_std(values: np.ndarray) -> np.ndarray:
    std = values.std(0)
    return np.where(std > _MIN_STD, std, 1.0)


def _log_urine(dynamic: jax.Array) -> jax.Array:
    dynamic = jnp.asarray(dynamic, jnp.float32)
    urine = dynamic[..., schema.URINE]
    return dynamic.at[..., schema.URINE].set(jnp.log1p(jnp.maximum(urine, 0.0)))
