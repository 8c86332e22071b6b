"""Vasopressor and fluid doses per step, and their levels."""

from __future__ import annotations

import numpy as np

from sepsis_jax.cohort.measurements import empty_steps
from sepsis_jax.cohort.workspace import Workspace
from worldmodel import schema

QUARTILES = (0.25, 0.5, 0.75)


def bin_doses(work: Workspace) -> tuple[np.ndarray, np.ndarray]:
    """Doses of each step.

    Returns:
      [N, T] norepinephrine equivalents, mcg/kg/min, and [N, T] tonicity-corrected mL per step;
      0 where nothing was given.
    """
    work.run("treatments")
    vasopressor, fluid = empty_steps(work), empty_steps(work)
    column = "largest" if work.options.vasopressor_dose == "max" else "weighted"
    found = work.execute(f"SELECT row, step, {column} AS dose FROM vasopressor_steps").fetchnumpy()
    vasopressor[found["row"], found["step"]] = found["dose"]
    found = work.execute("SELECT row, step, volume FROM fluid_steps").fetchnumpy()
    fluid[found["row"], found["step"]] = found["volume"]
    return np.nan_to_num(vasopressor), np.nan_to_num(fluid)


def fit_dose_edges(
    vasopressor: np.ndarray, fluid: np.ndarray, train: np.ndarray
) -> tuple[schema.DoseEdges, list[str]]:
    """Quartiles of the training stays' non-zero doses.

    Args:
      vasopressor, fluid: [N, T] doses.
      train: [N] bool.

    Returns:
      The edges, and the names of the drugs whose edges are the published defaults because the
      training stays never received them.
    """
    defaulted = []

    def edges(name: str, dose: np.ndarray) -> tuple[float, float, float]:
        given = dose[train]
        given = given[given > 0]
        if not given.size:
            defaulted.append(name)
            return getattr(schema.DEFAULT_DOSE_EDGES, name)
        first, second, third = (float(edge) for edge in np.quantile(given, QUARTILES))
        return first, second, third

    fitted = schema.DoseEdges(
        vasopressor=edges("vasopressor", vasopressor), fluid=edges("fluid", fluid)
    )
    return fitted, defaulted
