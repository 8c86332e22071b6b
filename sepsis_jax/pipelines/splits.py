"""The stays that a job looks at."""

from __future__ import annotations

import numpy as np

from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError


def of_split(episodes: Episodes, split: str) -> tuple[Episodes, np.ndarray]:
    """The stays of a split ("all" for all of them) and where they were.

    Raises:
      InputError: an unknown split, or one with fewer than two stays.
    """
    if split == "all":
        return episodes, np.arange(episodes.num_stays)
    if split not in schema.SPLITS:
        raise InputError(f"split: got {split!r}, expected {', '.join(schema.SPLITS)} or all")
    chosen = np.flatnonzero(np.asarray(episodes.split) == schema.SPLITS.index(split))
    if len(chosen) < 2:
        raise InputError(f"split {split!r} has {len(chosen)} stays; evaluation needs at least 2")
    return episodes.select(chosen), chosen
