"""The figure of two cohorts that are compared, and what moved most in words."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from sepsis_jax.report.figures import COLORS, save
from sepsis_jax.report.policies import plain
from worldmodel import schema

_SHOWN = 25  # quantities
_KINDS = ("value", "measured", "treatment", "patient", "outcome")


class Separation(Protocol):
    """How well a classifier tells two cohorts apart."""

    @property
    def auroc(self) -> float:
        """Area under the ROC curve."""

    @property
    def low(self) -> float:
        """Lower end of its interval."""

    @property
    def high(self) -> float:
        """Upper end of its interval."""


def drift_figure(
    quantities: pd.DataFrame, actions: pd.DataFrame, separation: Separation, path: Path
) -> None:
    """The largest differences with intervals, and where treatments differ.

    Args:
      quantities: rows (kind, name, smd, smd_low, smd_high, moved), the largest first.
      actions: rows (vasopressor, fluid, difference, moved).
      separation: of all quantities together.
      path: PNG to write.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 6.5), width_ratios=(1.2, 1), layout="constrained"
    )
    rows = quantities[np.isfinite(quantities["smd"])].head(_SHOWN).iloc[::-1]
    for place, (_, row) in enumerate(rows.iterrows()):
        color = COLORS[_KINDS.index(row["kind"])] if row["moved"] else "grey"
        left.plot([row["smd_low"], row["smd_high"]], [place, place], color=color, lw=2)
        left.plot(row["smd"], place, "o", color=color, ms=4)
    named = [
        f"{name}, measured" if kind == "measured" else name
        for kind, name in zip(rows["kind"], rows["name"], strict=True)
    ]
    left.set_yticks(range(len(rows)), named, fontsize=8)
    left.axvline(0, color="black", lw=0.8)
    left.set(xlabel="B less A, standard deviations (95% interval; grey: not moved)")
    levels = schema.NUM_LEVELS
    change = 100 * actions["difference"].to_numpy().reshape(levels, levels)
    moved = actions["moved"].to_numpy().reshape(levels, levels)
    reach = max(1.0, float(np.abs(change).max()))
    image = right.imshow(change, origin="lower", cmap="RdBu_r", vmin=-reach, vmax=reach)
    for (vasopressor, fluid), value in np.ndenumerate(change):
        star = "*" if moved[vasopressor, fluid] else ""
        dark = abs(value) > 0.6 * reach
        right.text(fluid, vasopressor, f"{value:+.1f}{star}", ha="center", va="center",
                   fontsize=9, color="white" if dark else "black")  # fmt: skip
    right.set(xlabel="fluid level", ylabel="vasopressor level", title="treatments (* moved)")
    figure.colorbar(image, ax=right, shrink=0.7, label="B less A, percentage points of steps")
    figure.suptitle(
        "What tells B from A: AUROC "
        f"{separation.auroc:.2f} [{separation.low:.2f}, {separation.high:.2f}] (0.5: alike)"
    )
    save(figure, path)


def drift_words(
    quantities: pd.DataFrame, actions: pd.DataFrame, separation: Separation, most: int = 5
) -> list[str]:
    """What moved most, in sentences.

    Args:
      quantities: rows (kind, name, mean and share_known of either, smd, moved), the largest first.
      actions: rows (moved).
      separation: of all quantities together.
      most: quantities that get a sentence.
    """
    low, high = separation.low, separation.high
    told = "cannot be told apart" if low <= 0.5 else "can be told apart"
    words = [
        f"Stays of A and B {told}: AUROC {separation.auroc:.2f} [{low:.2f}, {high:.2f}] "
        "(0.5: alike)."
    ]
    moved = quantities[quantities["moved"]]
    words.append(
        f"{len(moved)} of {len(quantities)} quantities and {int(actions['moved'].sum())} of "
        f"{len(actions)} treatments moved."
    )
    for row in plain(moved.head(most)):
        what = "share of steps measured" if row["kind"] == "measured" else "mean"
        words.append(
            f"{row['name']}: {what} {row['mean_a']:.4g} in A, {row['mean_b']:.4g} in B"
            + ("" if row["smd"] is None else f" ({row['smd']:+.2f} standard deviations)")
            + "."
        )
    lost = quantities[(quantities["share_known_a"] > 0) != (quantities["share_known_b"] > 0)]
    if len(lost):
        words.append(f"In one of the cohorts only: {', '.join(lost['name'])}.")
    return words
