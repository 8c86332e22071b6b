"""Keeping simulated patients physiologically possible, and counting how often that was needed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from worldmodel import schema
from worldmodel.scaling import Scaler

_SYSBP, _DIABP, _MEANBP = (schema.INDEX[name] for name in ("sysbp", "diabp", "meanbp"))


def project(obs: jax.Array, scaler: Scaler) -> tuple[jax.Array, jax.Array]:
    """Moves each feature into its physiologic range and orders the blood pressures.

    Args:
      obs: [..., 39] z-scores.
      scaler: of these z-scores.

    Returns:
      The projected z-scores and the number of entries that moved, [...] int32.
    """
    low = scaler.normalize(jnp.asarray(schema.LOW))
    high = scaler.normalize(jnp.asarray(schema.HIGH))
    projected = jnp.clip(obs, low, high)
    meanbp = projected[..., _MEANBP, None] * scaler.std[_MEANBP] + scaler.mean[_MEANBP]
    limit = (meanbp - scaler.mean) / scaler.std
    feature = jnp.arange(schema.NUM_FEATURES)
    projected = jnp.where(feature == _SYSBP, jnp.maximum(projected, limit), projected)
    projected = jnp.where(feature == _DIABP, jnp.minimum(projected, limit), projected)
    return projected, (projected != obs).sum(-1).astype(jnp.int32)
