"""A sweep in one table and one picture: each plan on average over the starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from sepsis_jax.pipelines.sweep_folder import SweepFolder
from sepsis_jax.pipelines.sweep_request import Sweep
from sepsis_jax.report.sweep_figure import sweep_figure
from worldmodel.files import atomic_file

_AVERAGED = (
    "sofa_mean", "sofa_change", "mortality_mean", "mortality_disagreement", "reward_mean",
    "reward_disagreement", "map_below_65", "map_ever_below_65", "lactate_clearance",
    "lactate_cleared_20", "ventilation", "vasopressor_level", "fluid_level", "projected_share",
    "support", "supported",
)  # fmt: skip
REFERENCE = "constant 0,0"


def summarise(folder: SweepFolder, sweep: Sweep) -> pd.DataFrame:
    """One row per plan: mean over the starts of each column, block by block; NaN where null.

    Args:
      folder: with every block.
      sweep: what was asked for.
    """
    wanted = [f"{name}_mean" for name in sweep.options.features] + list(_AVERAGED)
    if "lactate" not in sweep.options.features:
        wanted = [name for name in wanted if not name.startswith("lactate")]
    sums = np.zeros((len(sweep.names), len(wanted)))
    counts = np.zeros_like(sums)
    for block, table in folder.read(wanted):
        plans = list(sweep.grid.sections[block.section].plans)
        values = table.to_pandas().to_numpy(np.float64).reshape(block.size, len(plans), -1)
        sums[plans] += np.nansum(values, 0)
        counts[plans] += np.isfinite(values).sum(0)
    with np.errstate(invalid="ignore"):
        means = sums / counts
    summary = pd.DataFrame(means, columns=wanted)
    summary.insert(0, "plan", sweep.names)
    summary.insert(1, "kind", sweep.kinds)
    summary.insert(2, "starts", len(sweep.grid.starts.stay))
    return summary


def write_summary(path: Path, summary: pd.DataFrame, sweep: Sweep) -> None:
    """Writes summary.csv and sweep.png."""
    with atomic_file(path / "summary.csv") as temporary:
        summary.to_csv(temporary, index=False)
    options = sweep.options
    hours = options.horizon * sweep.world_model.step_hours
    groups = sweep.manifest["groups"]
    title = (
        f"after {hours:g} h: mean over {groups['starts']:,} starts of {groups['stays']:,} stays, "
        f"{options.samples} futures each.  Not for clinical use."
    )
    with atomic_file(path / "sweep.png") as temporary:
        sweep_figure(summary, title, temporary)
