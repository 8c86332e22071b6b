"""Filling the gaps between measurements.

A value is held for the feature's hold time (schema), then gives way to the training split's
median, which also fills rows before the first measurement. `carry_forever` keeps the last
value instead, as the reference system's small standard deviations suggest it did.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from worldmodel import schema


@dataclass(frozen=True)
class ImputationCounts:
    """How the entries of a table came about.

    Attributes:
      measured, held, filled: entries recorded in the step, carried forward, set to the median.
    """

    measured: int
    held: int
    filled: int


def hold_steps(step_hours: float) -> np.ndarray:
    """[39] steps for which a measurement may stand in for a missing one, at least 1."""
    steps: np.ndarray = np.maximum(np.ceil(schema.HOLD_HOURS / step_hours), 1)
    return steps


def impute(
    values: Float[np.ndarray, "N T F"],
    length: Int[np.ndarray, " N"],
    medians: Float[np.ndarray, " F"],
    *,
    step_hours: float = schema.STEP_HOURS,
    carry_forever: bool = False,
    past: int = 0,
) -> tuple[Float[np.ndarray, "N S F"], ImputationCounts]:
    """Fills missing values by sample-and-hold, then by medians.

    A measurement always fills the step it was recorded in and at least the next one.

    Args:
      values: [N, past + T, 39] physical units, NaN where nothing was recorded.
      length: [N] steps per stay, without `past`; later rows come back as zero.
      medians: [39] physical units.
      step_hours: length of a step in hours.
      carry_forever: hold values without limit.
      past: rows before the first one of the stay; their values are held, and not returned.

    Returns:
      Filled values [N, T, 39] and the counts of how they came about.
    """
    num_steps = values.shape[1]
    hold = hold_steps(step_hours)
    if carry_forever:
        hold = np.full_like(hold, np.inf)
    step = np.arange(num_steps)[None, :, None]
    measured = np.isfinite(values)
    last = np.maximum.accumulate(np.where(measured, step, -1), axis=1)
    held = np.take_along_axis(values, np.maximum(last, 0), axis=1)
    usable = (last >= 0) & (step - last <= hold)
    step_of_stay = np.arange(num_steps) - past
    valid = ((step_of_stay >= 0) & (step_of_stay < length[:, None]))[..., None]
    filled = np.where(valid, np.where(usable, held, medians), 0.0).astype(np.float32)[:, past:]
    counts = ImputationCounts(
        measured=int((measured & valid).sum()),
        held=int((usable & ~measured & valid).sum()),
        filled=int((~usable & valid).sum()),
    )
    return filled, counts


def training_medians(
    values: Float[np.ndarray, "N T F"],
    train: Bool[np.ndarray, " N"],
    fallback: Float[np.ndarray, " F"],
) -> Float[np.ndarray, " F"]:
    """Median of each feature's recorded values in the training stays.

    Args:
      values: [N, T, 39] physical units, NaN where nothing was recorded.
      train: [N] bool.
      fallback: [39] used for features that the training stays never record.
    """
    rows = values[train].reshape(-1, values.shape[-1])
    recorded = np.isfinite(rows).any(0)
    out = np.array(fallback, np.float64)
    out[recorded] = np.nanmedian(rows[:, recorded], axis=0)
    return out
