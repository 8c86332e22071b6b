"""Scaling between physical units and z-space.

Urine output is stored as log(1 + mL) before scaling; age and the Charlson index are scaled, sex
is left raw (SepsisAgent, arXiv 2605.14723). The reference scaler's two JSON files are read by
`Scaler.from_reference`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.files import read_json

if TYPE_CHECKING:
    from worldmodel.episodes import Episodes

SCALER_FILE = "scaler_params_log.json"
FEATURE_FILE = "episode_feature_config.json"
_MIN_STD = 1e-6


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
        urine = jnp.maximum(jnp.expm1(values[..., schema.URINE]), 0.0)
        return values.at[..., schema.URINE].set(urine)

    def normalize_static(self, static: jax.Array) -> jax.Array:
        """Age, sex, Charlson [..., 3] to model inputs."""
        return (static - self.static_mean) / self.static_std

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
        if tuple(dynamic.get("dyn_cols", ())) != schema.FEATURE_NAMES:
            raise InputError(f"{folder / SCALER_FILE}: dyn_cols differ from the schema's order")
        if not dynamic.get("urine_log_transform", False):
            raise InputError(f"{folder / SCALER_FILE}: urine_log_transform must be true")
        try:
            age_mean, charlson_mean = static["static_scaler_mean"]
            age_std, charlson_std = static["static_scaler_std"]
            return cls._of(
                dynamic["dyn_mean"],
                dynamic["dyn_std"],
                (age_mean, 0.0, charlson_mean),
                (age_std, 1.0, charlson_std),
            )
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
        if tuple(value.get("features", ())) != schema.FEATURE_NAMES:
            raise InputError(f"{source}: scaler features differ from the schema's order")
        try:
            return cls._of(*(value[name] for name in ("mean", "std", "static_mean", "static_std")))
        except KeyError as error:
            raise InputError(f"{source}: scaler field {error} is missing") from None

    @classmethod
    def _of(cls, mean: Any, std: Any, static_mean: Any, static_std: Any) -> Scaler:
        return cls(*(jnp.asarray(x, jnp.float32) for x in (mean, std, static_mean, static_std)))


def _safe_std(values: np.ndarray) -> np.ndarray:
    std = values.std(0)
    return np.where(std > _MIN_STD, std, 1.0)


def _log_urine(dynamic: jax.Array) -> jax.Array:
    dynamic = jnp.asarray(dynamic, jnp.float32)
    urine = dynamic[..., schema.URINE]
    return dynamic.at[..., schema.URINE].set(jnp.log1p(jnp.maximum(urine, 0.0)))
