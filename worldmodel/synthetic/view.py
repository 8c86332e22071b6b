"""What a decision maker at the bedside sees: the contract between the world and policies."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import struct


@struct.dataclass
class History:
    """The last H rows, newest last; rows before admission are zero."""

    dynamic: jax.Array  # [H, 39] as in View
    measured: jax.Array  # [H, 38] bool
    vasopressor: jax.Array  # [H] int32, level given in the row; 0 in the newest, still open
    fluid: jax.Array  # [H] int32
    valid: jax.Array  # [H] bool


@struct.dataclass
class View:
    """One row of one patient, as the episodes hold it, with what was given before."""

    dynamic: jax.Array  # [39] physical units, gaps filled
    measured: jax.Array  # [38] bool
    static: jax.Array  # [3] age in years, 1 = male, Charlson index
    ventilated: jax.Array  # [] bool
    sofa: jax.Array  # [] float32
    urine_24h: jax.Array  # [] mL
    vasopressor: jax.Array  # [] int32 level given in the step before; 0 at admission
    fluid: jax.Array  # [] int32
    step: jax.Array  # [] int32 steps since admission
    history: History | None = None  # with `Config.history` rows


# (key, view) -> [25] probabilities, for one patient; the world maps it over patients.
Policy = Callable[[jax.Array, View], jax.Array]
