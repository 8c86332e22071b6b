"""Recorded stays as data sets of other libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from policy.offline.export import write_d3rlpy, write_minari
from sepsis_jax.pipelines.splits import of_split
from sepsis_jax.progress import Progress, silent
from worldmodel.episode_files import load_episodes, load_scaler
from worldmodel.errors import InputError

WRITERS = {"d3rlpy": write_d3rlpy, "minari": write_minari}


def export_transitions(
    episodes_path: str | Path,
    out: str | Path,
    *,
    form: str,
    split: str,
    past: int,
    progress: Progress = silent,
) -> int:
    """Writes the transitions of a split.

    Args:
      episodes_path: folder of episodes.
      out: file (d3rlpy) or folder (minari) to write.
      form: one of `WRITERS`.
      split: "train", "validation", "test" or "all".
      past: rows that the observations look back on.
      progress: called with (phase, share done).

    Returns:
      Number of transitions.

    Raises:
      InputError: an unknown format or split, or something is in the way.
    """
    if form not in WRITERS:
        raise InputError(f"--format: got {form!r}, expected one of {', '.join(WRITERS)}")
    progress("reading", 0.0)
    episodes, _ = of_split(load_episodes(episodes_path), split)
    progress(form, 0.3)
    WRITERS[form](Path(out), episodes, load_scaler(episodes_path), past)
    progress("done", 1.0)
    return int(np.asarray(episodes.length).sum())
