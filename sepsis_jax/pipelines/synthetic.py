"""A cohort of the synthetic world, as a folder of episodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sepsis_jax.progress import Progress, silent
from sepsis_jax.provenance import provenance
from worldmodel.episode_files import save_episodes
from worldmodel.errors import InputError
from worldmodel.synthetic import Params, generate

SOURCE = "synthetic"


def make_synthetic_cohort(
    out: str | Path,
    *,
    patients: int,
    confounding: float = 0.0,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
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
    if confounding < 0:
        raise InputError(f"confounding: got {confounding}, expected 0 or more")
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
