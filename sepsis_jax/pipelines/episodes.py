"""Folders of episodes: made by the synthetic world, reduced to a split, exported."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from policy.offline.data import MINARI_DATA, check_d3rlpy_file, write_d3rlpy, write_minari
from sepsis_jax.runs import JsonDict, Progress, provenance, silent
from worldmodel import schema
from worldmodel.episode_files import EPISODES_FILE, load_episodes, load_scaler, save_episodes
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import check_replaceable
from worldmodel.synthetic import Params, generate
from worldmodel.synthetic.generate import require_patients

SOURCE = "synthetic"


def make_synthetic_cohort(
    out: str | Path,
    *,
    patients: int,
    confounding: float = 0.0,
    seed: int = 0,
    progress: Progress = silent,
) -> JsonDict:
    """Generates patients and writes them as a folder of episodes.

    Args:
      out: folder to write.
      patients: number of stays.
      confounding: dial of unobserved confounding, 0 for none.
      seed: of the world; the same seed is the same world.
      progress: called with (phase, share done).

    Returns:
      A summary: stays, steps and mortality.

    Raises:
      InputError: fewer than 10 patients, or a negative dial.
    """
    if patients < 10:
        raise InputError(f"patients: got {patients}, expected at least 10 to fill three splits")
    if not 0 <= confounding < math.inf:
        raise InputError(f"confounding: got {confounding}, expected 0 or more")
    require_patients(patients)
    check_replaceable(Path(out), EPISODES_FILE)
    progress("simulating", 0.0)
    params = Params()
    params = replace(params, clinician=replace(params.clinician, confounding=confounding))
    episodes, _ = generate(jax.random.key(seed), patients, params=params, keep_latent=False)
    progress("writing", 0.7)
    length = np.asarray(episodes.length)
    summary = {
        "stays": episodes.num_stays,
        "steps": int(length.sum()),
        "mean_steps": float(length.mean()),
        "mortality_90d": float(np.asarray(episodes.died_90d).mean()),
        "in_hospital_mortality": float(np.asarray(episodes.died_in_hospital).mean()),
    }
    save_episodes(
        episodes,
        out,
        manifest={
            "source": SOURCE,
            "summary": summary,
            "options": {"patients": patients, "confounding": confounding, "seed": seed},
            **provenance(),
        },
    )
    return summary


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


WRITERS = {"d3rlpy": write_d3rlpy, "minari": write_minari}


def taken(episodes: Episodes) -> np.ndarray:
    """[N, T, 25] one-hot actions that were taken."""
    one_hot: np.ndarray = np.eye(schema.NUM_ACTIONS, dtype=np.float32)[np.asarray(episodes.action)]
    return one_hot


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
      past: earlier rows in each observation.
      progress: called with (phase, share done).

    Returns:
      Number of transitions.

    Raises:
      InputError: an unknown format or split, or something is in the way.
    """
    if form not in WRITERS:
        raise InputError(f"format: got {form!r}, expected one of {', '.join(WRITERS)}")
    out = Path(out)
    if form == "minari":
        check_replaceable(out, MINARI_DATA)
    else:
        check_d3rlpy_file(out)
    progress("reading", 0.0)
    episodes, _ = of_split(load_episodes(episodes_path), split)
    progress(form, 0.3)
    WRITERS[form](out, episodes, load_scaler(episodes_path), past)
    progress("done", 1.0)
    return int(np.asarray(episodes.length).sum())
