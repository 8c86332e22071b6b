"""Slow variables: temperature and laboratory values that approach a driven level.

    x' = x + rate * (set-point + W d - x) + noise,   d = (inflammation, liver, kidney, dilution)

Skewed variables live on the log scale (`patients.LOG_SLOW`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from worldmodel.synthetic.noise import SLOW_NAMES, Noise
from worldmodel.synthetic.patients import LOG_SLOW, Traits

if TYPE_CHECKING:
    from worldmodel.synthetic.body import Latent

# name: rate per step, stationary SD of the noise, then the change of the level at full
# inflammation, liver injury and kidney injury and per litre of oedema and excess volume.
_TABLE: dict[str, tuple[float, float, float, float, float, float]] = {
    "temp_c": (0.45, 0.28, 0.75, -0.3, 0.0, 0.0),  # fever; shock cools
    "albumin": (0.06, 0.10, -0.45, -0.3, 0.0, -0.09),  # negative acute phase, dilution
    "alt": (0.12, 0.25, 0.20, 3.6, 0.0, 0.0),  # shock liver
    "ast": (0.16, 0.25, 0.30, 3.8, 0.0, 0.0),
    "bilirubin_total": (0.06, 0.15, 0.35, 2.2, 0.0, 0.0),
    "bun": (0.09, 0.10, 0.25, 0.0, 1.25, 0.0),
    "calcium_free": (0.25, 0.035, -0.06, 0.0, 0.0, -0.006),
    "calcium_total": (0.20, 0.25, -0.35, 0.0, 0.0, -0.10),
    "chloride": (0.20, 1.6, 0.0, 0.0, -1.0, 0.75),  # chloride-rich fluid
    "creatinine": (0.14, 0.08, 0.05, 0.0, 1.75, 0.0),
    "glucose": (0.35, 0.18, 0.22, 0.0, 0.0, 0.0),  # stress hyperglycaemia
    "hemoglobin": (0.15, 0.40, -0.5, 0.0, -0.5, -0.28),  # dilution
    "inr": (0.12, 0.07, 0.15, 1.3, 0.0, 0.02),
    "magnesium": (0.20, 0.14, 0.0, 0.0, 0.25, 0.0),
    "platelet": (0.10, 0.09, -0.45, -0.9, 0.0, -0.03),  # consumption
    "potassium": (0.30, 0.26, 0.05, 0.0, 0.75, 0.0),
    "ptt": (0.18, 0.14, 0.20, 0.9, 0.0, 0.01),
    "sodium": (0.15, 1.2, 0.0, 0.0, 0.0, 0.10),
    "wbc": (0.20, 0.10, 0.55, 0.0, 0.0, 0.0),
}
_IS_LOG = np.array([name in LOG_SLOW for name in SLOW_NAMES])


def _column(index: int) -> np.ndarray:
    return np.array([_TABLE[name][index] for name in SLOW_NAMES], np.float32)


@struct.dataclass
class SlowParams:
    """[19] tables, in units of the variable or its log."""

    rate: jax.Array = struct.field(default_factory=lambda: _column(0))
    spread: jax.Array = struct.field(default_factory=lambda: _column(1))
    inflammation: jax.Array = struct.field(default_factory=lambda: _column(2))
    liver: jax.Array = struct.field(default_factory=lambda: _column(3))
    kidney: jax.Array = struct.field(default_factory=lambda: _column(4))
    dilution: jax.Array = struct.field(default_factory=lambda: _column(5))
    acute_dilution: float = 0.35  # share of the dilution felt within the step, per litre given


def _level(latent: Latent, traits: Traits, params: SlowParams) -> jax.Array:
    diluted = 0.6 * latent.edema + jnp.maximum(latent.volume, -1.0)
    return (
        traits.setpoint
        + params.inflammation * latent.inflammation
        + params.liver * latent.liver
        + params.kidney * latent.kidney
        + params.dilution * diluted
    )


def start_slow(latent: Latent, traits: Traits, noise: Noise, params: SlowParams) -> jax.Array:
    """[19] values at admission."""
    return _level(latent, traits, params) + params.spread * noise.slow


def advance_slow(
    latent: Latent, litres: jax.Array, traits: Traits, noise: Noise, params: SlowParams
) -> jax.Array:
    """[19] values 4 hours later, after `litres` of fluid."""
    level = _level(latent, traits, params)
    innovation = params.spread * jnp.sqrt(params.rate * (2.0 - params.rate)) * noise.slow
    fresh = params.dilution * params.acute_dilution * litres
    return latent.slow + params.rate * (level - latent.slow) + fresh + innovation


def slow_values(slow: jax.Array) -> dict[str, jax.Array]:
    """Values in schema units by name."""
    values = jnp.where(_IS_LOG, jnp.exp(jnp.where(_IS_LOG, slow, 0.0)), slow)
    return {name: values[i] for i, name in enumerate(SLOW_NAMES)}
