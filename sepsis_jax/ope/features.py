"""What fitted values see of a state and of an action."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import features, schema
from worldmodel.episodes import Episodes
from worldmodel.scaling import Scaler
from worldmodel.view import views


def state_features(episodes: Episodes, scaler: Scaler | None = None) -> jax.Array:
    """[N, T, 49] `worldmodel.features.state_features` of every recorded row; 0 after the end.

    Args:
      episodes: the stays.
      scaler: fitted on `episodes` when not given.
    """
    scaler = scaler or Scaler.fit(episodes, split=None)
    return jnp.where(episodes.valid[..., None], features.state_features(views(episodes), scaler), 0)


_KEY_COLUMNS = (
    0,
    *(1 + schema.INDEX[name] for name in ("meanbp", "lactate", "creatinine", "output_4hourly")),
    *range(1 + schema.NUM_FEATURES, 1 + schema.NUM_FEATURES + schema.NUM_STATIC + 6),
)


def key_features(episodes: Episodes, scaler: Scaler | None = None) -> jax.Array:
    """[N, T, 14] the few of `state_features` that matter most, for small samples."""
    return state_features(episodes, scaler)[..., np.array(_KEY_COLUMNS)]


def dose_basis() -> np.ndarray:
    """[25, 6] for linear values: 1, v, f, v^2, f^2, v f with levels scaled to [0, 1]."""
    v, f = (level / (schema.NUM_LEVELS - 1) for level in schema.action_levels(np.arange(25)))
    return np.stack([np.ones(25), v, f, v**2, f**2, v * f], -1).astype(np.float32)


def action_basis(actions: int) -> np.ndarray:
    """The dose basis for 25 actions, otherwise one indicator per action."""
    if actions == schema.NUM_ACTIONS:
        return dose_basis()
    return np.eye(actions, dtype=np.float32)
