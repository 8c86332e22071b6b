"""What fitted values see of a state and of an action."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.scaling import Scaler

_LARGEST = 5.0  # z-scores beyond are outliers that a linear model should not chase
_STEPS = 20.0  # unit of time


def state_features(episodes: Episodes, scaler: Scaler | None = None) -> jax.Array:
    """[N, T, 49] features of what was known before the treatment; 0 after the end.

    A constant, z-scored measurements and static features, ventilation, SOFA, the levels of the
    step before, and time.

    Args:
      episodes: the stays.
      scaler: fitted on `episodes` when not given.
    """
    scaler = scaler or Scaler.fit(episodes, split=None)
    shape = (episodes.num_stays, episodes.num_steps)
    static = jnp.broadcast_to(
        scaler.normalize_static(episodes.static)[:, None], (*shape, schema.NUM_STATIC)
    )
    time = jnp.broadcast_to(jnp.arange(shape[1]) / _STEPS, shape)
    top = schema.NUM_LEVELS - 1
    rest = [
        episodes.ventilated.astype(jnp.float32),
        episodes.sofa / 10.0,
        _before(episodes.vasopressor) / top,
        _before(episodes.fluid) / top,
        time,
        time**2,
    ]
    blocks = [
        jnp.ones((*shape, 1)),
        jnp.clip(scaler.normalize(episodes.dynamic), -_LARGEST, _LARGEST),
        jnp.clip(static, -_LARGEST, _LARGEST),
        jnp.stack(rest, -1),
    ]
    return jnp.where(episodes.valid[..., None], jnp.concatenate(blocks, -1), 0.0)


_KEY_COLUMNS = (
    0,
    *(1 + schema.INDEX[name] for name in ("meanbp", "lactate", "creatinine", "output_4hourly")),
    *range(1 + schema.NUM_FEATURES, 1 + schema.NUM_FEATURES + schema.NUM_STATIC + 6),
)


def key_features(episodes: Episodes, scaler: Scaler | None = None) -> jax.Array:
    """[N, T, 14] the few of `state_features` that matter most, for small samples."""
    return state_features(episodes, scaler)[..., np.array(_KEY_COLUMNS)]


def _before(levels: jax.Array) -> jax.Array:
    return jnp.pad(levels[:, :-1], ((0, 0), (1, 0)))


def dose_basis() -> np.ndarray:
    """[25, 6] for linear values: 1, v, f, v^2, f^2, v f with levels scaled to [0, 1]."""
    v, f = (level / (schema.NUM_LEVELS - 1) for level in schema.action_levels(np.arange(25)))
    return np.stack([np.ones(25), v, f, v**2, f**2, v * f], -1).astype(np.float32)


def action_basis(actions: int) -> np.ndarray:
    """The dose basis for 25 actions, otherwise one indicator per action."""
    if actions == schema.NUM_ACTIONS:
        return dose_basis()
    return np.eye(actions, dtype=np.float32)
