"""Recorded or simulated ICU stays as one PyTree of arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import struct

from worldmodel import schema


def identities(numbers: npt.ArrayLike) -> jax.Array | np.ndarray:
    """Numbers of stays or patients [N], every digit kept.

    JAX has no integers of 64 bits by default: numbers that fit are int32, others stay NumPy's
    int64 for all of the array. Random streams take the lower 32 bits.
    """
    found = np.asarray(numbers, np.int64)
    narrow = found.astype(np.int32)
    return jnp.asarray(narrow) if np.array_equal(narrow, found) else found


@struct.dataclass
class Episodes:
    """N stays padded to T steps; rows at or after `length` are zero.

    Row t holds what is known when step t begins, before its treatment is chosen, and the
    treatment given during step t; the transition (row t, treatment t) -> row t + 1 is what the
    State Model learns. No event after that moment changes the row (`schema`, contract of time).
    """

    dynamic: jax.Array  # [N, T, 39] float32, physical units, missing values imputed
    measured: jax.Array  # [N, T, 38] bool, recorded since the row before
    static: jax.Array  # [N, 3] float32: age in years, 1 = male, Charlson index
    vasopressor: jax.Array  # [N, T] int32 level 0-4
    fluid: jax.Array  # [N, T] int32 level 0-4
    vasopressor_dose: jax.Array  # [N, T] float32, norepinephrine equivalents, mcg/kg/min
    fluid_dose: jax.Array  # [N, T] float32, mL per step, tonicity-corrected
    ventilated: jax.Array  # [N, T] bool, invasive ventilation
    sofa: jax.Array  # [N, T] float32, SOFA with the vasopressor of the step before
    urine_24h: jax.Array  # [N, T] float32, mL in the 24 h before
    behavior_prob: jax.Array  # [N, T] float32, clinician's probability of the action; NaN unknown
    length: jax.Array  # [N] int32 number of steps
    died_90d: jax.Array  # [N] bool, death within 90 days
    died_in_hospital: jax.Array  # [N] bool
    stay_id: jax.Array | np.ndarray  # [N] int32, or NumPy int64 (`identities`)
    subject_id: jax.Array | np.ndarray  # [N] int32, or NumPy int64 (`identities`)
    split: jax.Array  # [N] int32, index into schema.SPLITS

    @property
    def num_stays(self) -> int:
        """Number of stays N."""
        return self.length.shape[0]

    @property
    def num_steps(self) -> int:
        """Padded number of steps T."""
        return self.vasopressor.shape[1]

    @property
    def valid(self) -> jax.Array:
        """[N, T] bool: True on recorded steps."""
        return jnp.arange(self.num_steps) < self.length[:, None]

    @property
    def action(self) -> jax.Array:
        """[N, T] int32 joint action 0-24."""
        result: jax.Array = schema.action_index(self.vasopressor, self.fluid)
        return result

    def select(self, index: np.ndarray | jax.Array | slice) -> Episodes:
        """The stays picked by an index array or boolean mask [N]."""
        result: Episodes = jax.tree.map(lambda leaf: leaf[index], self)
        return result

    def of_split(self, name: str) -> Episodes:
        """The stays of one split: "train", "validation" or "test"."""
        return self.select(np.asarray(self.split) == schema.SPLITS.index(name))
