"""What learned values and policies see of a state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import schema
from worldmodel.scaling import Scaler
from worldmodel.view import View

_LARGEST = 5.0  # z-scores beyond are outliers that a small model should not chase
_STEPS = 20.0  # unit of time
_TOP_LEVEL = schema.NUM_LEVELS - 1
_EXTRA = 6
_LARGEST_SOFA = 24.0

NUM_STATE_FEATURES = 1 + schema.NUM_FEATURES + schema.NUM_STATIC + _EXTRA  # 49


def state_features(view: View, scaler: Scaler) -> jax.Array:
    """[..., 49] features of what is known before the treatment.

    A constant, z-scored measurements and static features, ventilation, SOFA, the levels of the
    step before, and time.

    Args:
      view: leaves [..., ...].
      scaler: of measurements and static features.
    """
    time = view.step / _STEPS
    extra = [
        view.ventilated.astype(jnp.float32),
        view.sofa / 10.0,
        view.vasopressor / _TOP_LEVEL,
        view.fluid / _TOP_LEVEL,
        time,
        time**2,
    ]
    blocks = [
        jnp.ones((*view.step.shape, 1)),
        jnp.clip(scaler.normalize(view.dynamic), -_LARGEST, _LARGEST),
        jnp.clip(scaler.normalize_static(view.static), -_LARGEST, _LARGEST),
        jnp.stack(extra, -1),
    ]
    return jnp.concatenate(blocks, -1)


def state_feature_bounds(last_step: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds [49] of `state_features` in rows up to `last_step`."""
    time = last_step / _STEPS
    scores = schema.NUM_FEATURES + schema.NUM_STATIC
    low = [0.0, *[-_LARGEST] * scores, *[0.0] * _EXTRA]
    high = [1.0, *[_LARGEST] * scores, 1.0, _LARGEST_SOFA / 10.0, 1.0, 1.0, time, time**2]
    return np.asarray(low, np.float32), np.asarray(high, np.float32)
