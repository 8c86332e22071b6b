"""Folders of episodes: of the synthetic world or one's own table, reduced to a split, exported."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from policy.offline.data import MINARI_DATA, check_d3rlpy_file, write_d3rlpy, write_minari
from sepsis_jax.cohort.own_table import OwnCohort, OwnTableOptions, own_cohort
from sepsis_jax.runs import JsonDict, Progress, plain, provenance, silent
from worldmodel import schema
from worldmodel.episode_files import EPISODES_FILE, load_episodes, load_scaler, save_episodes
from worldmodel.episodes import Episodes, to_table
from worldmodel.errors import InputError
from worldmodel.files import (
    atomic_file,
    check_replaceable,
    check_table_name,
    digest_file,
    read_table,
)
from worldmodel.synthetic import Params, generate
from worldmodel.synthetic.generate import require_patients

SOURCE = "synthetic"
TEMPLATE_PATIENTS = 10


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


def write_template(out: Path) -> int:
    """Writes the table of ten synthetic patients, with every column; the number of its rows.

    Raises:
      InputError: neither .csv nor .parquet, or something is there already.
    """
    check_table_name(out)
    if out.exists():
        raise InputError(f"{out}: exists; choose another name")
    table = to_table(generate(jax.random.key(0), TEMPLATE_PATIENTS, keep_latent=False)[0])
    with atomic_file(out) as temporary:
        write = table.to_csv if out.suffix == ".csv" else table.to_parquet
        write(temporary, index=False)
    return len(table)


def make_own_cohort(
    path: Path, out: Path, options: OwnTableOptions | None = None, progress: Progress = silent
) -> OwnCohort:
    """Makes a folder of episodes from a table.

    Args:
      path: a .parquet or .csv file, as `own_cohort` takes it.
      out: folder to write, atomically.
      options: settings.
      progress: called with (phase, share done).

    Returns:
      The episodes and how they came about, which the manifest says too.

    Raises:
      InputError: the file is unreadable, or something else is in the way.
      TableError: the table is refused.
    """
    options = options or OwnTableOptions()
    check_replaceable(out, EPISODES_FILE)
    progress("reading", 0.0)
    table = read_table(path)
    progress("checking and filling", 0.2)
    made = own_cohort(table, options, source=str(path))
    progress("writing", 0.8)
    manifest = {
        "source": "own table",
        "table": {"file": path.name, "rows": len(table), "sha256": digest_file(path)},
        "options": plain(options),
        "derived": made.derived,
        "counts": made.counts,
        "notes": made.notes,
        **provenance(),
    }
    save_episodes(
        made.episodes, out, dose_edges=made.edges, step_hours=options.step_hours, manifest=manifest
    )
    return made


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


def taken(episodes: Episodes) -> np.ndarray:
    """[N, T, 25] one-hot actions that were taken."""
    one_hot: np.ndarray = np.eye(schema.NUM_ACTIONS, dtype=np.float32)[np.asarray(episodes.action)]
    return one_hot


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
