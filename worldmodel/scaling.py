"""Scaling between physical units and z-scores, and the published statistics of the cohort."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from worldmodel import schema, struct
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import read_json

SCALER_FILE = "scaler_params_log.json"
FEATURE_FILE = "episode_feature_config.json"
REFERENCE_STATIC = ("age", "gender", "charlson_comorbidity_index")
Values = Array | np.ndarray
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

    def normalize(self, dynamic: Float[Values, "*batch 39"]) -> Float[Array, "*batch 39"]:
        """Physical units [..., 39] to z-scores."""
        return (_log_urine(dynamic) - self.mean) / self.std

    def denormalize(self, obs: Float[Values, "*batch 39"]) -> Float[Array, "*batch 39"]:
        """z-scores [..., 39] to physical units; urine is never below 0 mL."""
        values = jnp.asarray(obs) * self.std + self.mean
        urine = jnp.maximum(jnp.expm1(values[..., schema.URINE, None]), 0.0)
        return jnp.where(jnp.arange(schema.NUM_FEATURES) == schema.URINE, urine, values)

    def normalize_static(self, static: Float[Values, "*batch 3"]) -> Float[Array, "*batch 3"]:
        """Age, sex, Charlson [..., 3] to model inputs."""
        return (jnp.asarray(static) - self.static_mean) / self.static_std

    def denormalize_static(self, static: Float[Values, "*batch 3"]) -> Float[Array, "*batch 3"]:
        """Model inputs [..., 3] to age in years, sex, Charlson."""
        return jnp.asarray(static) * self.static_std + self.static_mean

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

    def to_dict(self) -> dict[str, object]:
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
    def from_dict(cls, value: Mapping[str, object], *, source: str = "scaler") -> Scaler:
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
    def _of(cls, *values: object, source: str = "scaler") -> Scaler:
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


def _log_urine(dynamic: Values) -> jax.Array:
    values = jnp.asarray(dynamic, jnp.float32)
    urine = values[..., schema.URINE]
    return values.at[..., schema.URINE].set(jnp.log1p(jnp.maximum(urine, 0.0)))


# name: mean, standard deviation, 0.5% and 99.5% quantiles (none for urine)
_TABLE: dict[str, tuple[float, float, float, float]] = {
    "heart_rate": (87.63241859875838, 17.854018181212453, 48.25, 138.5),
    "sysbp": (117.00084917529837, 18.897191081521246, 77.1687, 176.75),
    "diabp": (61.71211604183043, 12.433167678988557, 35.0, 103.0),
    "meanbp": (77.77905508306031, 13.047224634940417, 50.0, 125.0588),
    "resp_rate": (20.1083874702326, 4.994551652514852, 8.5, 35.75),
    "spo2": (96.9323424865785, 2.4447262713888906, 88.0, 100.0),
    "temp_c": (37.004738652339164, 0.3520927527146963, 34.35, 38.5333),
    "fio2": (47.54251588722977, 15.238749319328493, 28.0, 100.0),
    "gcs_eye": (2.9585200173435466, 1.183956250351805, 1.0, 4.0),
    "gcs_verbal": (2.6724478489184373, 1.8732538454246144, 1.0, 5.0),
    "gcs_motor": (4.921456215573863, 1.7359212707452165, 1.0, 6.0),
    "albumin": (2.8562979794058827, 0.3908918659438631, 1.6, 4.4),
    "alt": (95.6485474779596, 315.30661944823834, 6.0, 3173.26),
    "ast": (134.2517918988507, 436.05610823562296, 10.0, 4406.0),
    "base_excess": (3.842215477508702, 1.8717446934551394, 1.0, 15.0),
    "bicarbonate": (23.39012060187714, 4.741363217394868, 11.0, 40.0),
    "bilirubin_total": (1.602350487600766, 3.1032678815171724, 0.2, 27.8),
    "bun": (29.910247145541263, 22.421635198763415, 4.0, 132.0),
    "calcium_free": (1.1218807377485873, 0.06680950618105762, 0.87, 1.42),
    "calcium_total": (8.288618003460014, 0.7208756597032768, 6.2, 10.9),
    "chloride": (104.01141783494725, 6.588631566994344, 84.0, 124.0),
    "creatinine": (1.535498601426931, 1.3861925504814587, 0.3, 9.2),
    "glucose": (139.86915792798146, 52.71063270584691, 57.0, 396.0),
    "hemoglobin": (10.049050291018755, 1.9215328741914304, 6.3, 16.0),
    "hematocrit": (30.67543052189838, 5.687109586003055, 19.4, 48.6),
    "inr": (1.4740307120805207, 0.6566482555331691, 0.9, 5.9),
    "lactate": (1.8661672489950147, 1.158974607121898, 0.6, 9.3),
    "magnesium": (2.10342961501166, 0.35941909301970887, 1.2, 3.6),
    "paco2": (41.21867321867322, 8.874678901001689, 22.0, 83.0),
    "pao2": (105.67856626680157, 57.23306775005623, 25.0, 410.0),
    "ph": (7.384108619388544, 0.06525695547995634, 7.15, 7.54),
    "platelet": (199.2012761424526, 108.44725808156625, 21.0, 659.0),
    "potassium": (4.137748439898044, 0.5869404541394945, 2.8, 6.3),
    "pt": (16.13983074213206, 6.766119023451324, 10.2, 61.5),
    "ptt": (38.13805985704334, 19.320423357526618, 20.8, 150.0),
    "sodium": (138.73009908304027, 5.211307543585621, 121.0, 157.0),
    "total_co2": (25.260733996028115, 4.9484099495933975, 12.0, 45.0),
    "wbc": (10.177013875464203, 4.519514651295008, 2.2, 38.6),
    "output_4hourly": (4.658230505680173, 2.080993030000084, np.nan, np.nan),
}

MEAN = np.array([_TABLE[name][0] for name in schema.FEATURE_NAMES])  # [39]
STD = np.array([_TABLE[name][1] for name in schema.FEATURE_NAMES])  # [39]
CLIP_LOW = np.array([_TABLE[name][2] for name in schema.FEATURE_NAMES])  # [39], NaN for urine
CLIP_HIGH = np.array([_TABLE[name][3] for name in schema.FEATURE_NAMES])  # [39], NaN for urine
AGE_MEAN, AGE_STD = 63.76374839591224, 16.0962848031996  # years
CHARLSON_MEAN, CHARLSON_STD = 5.3004410916629, 2.956177849300068  # points


def published_scaler() -> Scaler:
    """The scaler of the published checkpoints."""
    return Scaler.from_dict(
        {
            "features": list(schema.FEATURE_NAMES),
            "mean": MEAN,
            "std": STD,
            "static_mean": (AGE_MEAN, 0.0, CHARLSON_MEAN),
            "static_std": (AGE_STD, 1.0, CHARLSON_STD),
        },
        source="published figures",
    )
