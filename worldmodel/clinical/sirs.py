"""SIRS criteria (Bone et al., Chest 1992)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from worldmodel import schema


def score(dynamic: jax.Array) -> jax.Array:
    """Criteria met, 0 to 4: temperature, heart rate, respiration, white cells.

    Args:
      dynamic: [..., 39] physical units.

    Returns:
      [...] int32.
    """

    def feature(name: str) -> jax.Array:
        return dynamic[..., schema.INDEX[name]]

    criteria = (
        (feature("temp_c") < 36) | (feature("temp_c") > 38),
        feature("heart_rate") > 90,
        (feature("resp_rate") > 20) | (feature("paco2") < 32),
        (feature("wbc") < 4) | (feature("wbc") > 12),
    )
    return sum((met.astype(jnp.int32) for met in criteria), jnp.int32(0))
