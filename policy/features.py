"""What learned policies see: the state, and how it has been changing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from worldmodel import schema
from worldmodel.features import NUM_STATE_FEATURES, state_features
from worldmodel.scaling import Scaler
from worldmodel.view import View


def decision_features(view: View, scaler: Scaler) -> jax.Array:
    """[..., D] `state_features`, with the changes and treatments of `View.past`.

    For each earlier row: z-scored change of the measurements since, and both levels; zero where
    there was no such row.

    Args:
      view: leaves [..., ...], with `past` rows H (or none).
      scaler: of measurements and static features.
    """
    blocks = [state_features(view, scaler)]
    if view.past is not None:
        past = view.past
        z = scaler.normalize(past.dynamic)
        valid = past.valid[..., :-1, None]
        change = jnp.where(valid, jnp.clip(z[..., -1:, :] - z[..., :-1, :], -5.0, 5.0), 0.0)
        levels = jnp.stack([past.vasopressor, past.fluid], -1)[..., :-1, :]
        levels = jnp.where(valid, levels / (schema.NUM_LEVELS - 1), 0.0)
        rows = jnp.concatenate([change, levels, valid.astype(jnp.float32)], -1)
        blocks.append(rows.reshape(*rows.shape[:-2], -1))
    return jnp.concatenate(blocks, -1)


def feature_width(past: int) -> int:
    """D of `decision_features` with so many rows of `View.past`."""
    return NUM_STATE_FEATURES + max(past - 1, 0) * (schema.NUM_FEATURES + 3)
