"""Figures of language models in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from sepsis_jax.report.figures import COLORS, _save

_PANELS = (
    ("value", "mean total reward"),
    ("adherence", "guideline adherence, %"),
    ("valid", "valid calls, %"),
)


def reward_figure(courses: Mapping[str, pd.DataFrame], before: float, path: Path) -> None:
    """How reinforcement learning went, over the tokens that were drawn.

    Args:
      courses: metrics by iteration of each run; columns `played_*`, and `held_out_*` where a
        run was judged meanwhile.
      before: value of the model that they started from.
      path: PNG to write.
    """
    figure, axes = plt.subplots(
        1, len(_PANELS), figsize=(4.2 * len(_PANELS), 3.6), layout="constrained"
    )
    for (name, label), axis in zip(_PANELS, axes, strict=True):
        for (run, course), color in zip(courses.items(), COLORS, strict=False):
            tokens = course["played_completion_tokens"].cumsum() / 1e6
            axis.plot(tokens, course[f"played_{name}"], color=color, alpha=0.35, lw=1)
            smooth = course[f"played_{name}"].ewm(halflife=3).mean()
            axis.plot(tokens, smooth, color=color, lw=2, label=run)
            judged = f"held_out_{name}"
            if judged in course:
                kept = course[judged].notna()
                axis.plot(tokens[kept], course[judged][kept], "o", color=color, ms=5)
        axis.set_xlabel("million tokens drawn")
        axis.set_ylabel(label)
    axes[0].axhline(before, color="black", lw=1, ls="--", label="before")
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)
