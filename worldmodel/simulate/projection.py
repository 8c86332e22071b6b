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
    meanbp = projected[..., _MEANBP] * scaler.std[_MEANBP] + scaler.mean[_MEANBP]
    for index, bound in ((_SYSBP, jnp.maximum), (_DIABP, jnp.minimum)):
        limit = (meanbp - scaler.mean[index]) / scaler.std[index]
        projected = projected.at[..., index].set(bound(projected[..., index], limit))
    return projected, (projected != obs).sum(-1).astype(jnp.int32)
