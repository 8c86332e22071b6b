"""The figure of a sweep: 5 x 5 maps of the actions, and a row of dots for all other plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from sepsis_jax.report.figures import COLORS, _save
from worldmodel import schema

_LEVELS = range(schema.NUM_LEVELS)
_MAPS = {
    "constant": "held throughout,\nless no treatment",
    "deviation": "in the first step only,\nless no treatment in it",
}
_DOT_COLORS = {"sequence": COLORS[0], "clinician": "black", "policy": COLORS[1]}
_RARE = 0.5  # share of starts; where an action has support in fewer, its cell is marked
_CORNER = ((0.47, 0.47), (0.2, 0.47), (0.47, 0.2))


class _Measure(NamedTuple):
    column: str
    title: str
    scale: float = 1.0


_MEASURES = (
    _Measure("meanbp_mean", "MAP, mmHg"),
    _Measure("lactate_mean", "lactate, mmol/L"),
    _Measure("sofa_mean", "SOFA, points"),
    _Measure("mortality_mean", "90-day mortality, %", 100.0),
    _Measure("reward_mean", "total reward"),
)


def sweep_figure(summary: pd.DataFrame, title: str, path: Path) -> None:
    """Draws what each plan comes to on average over the starts.

    Constant actions and one-step deviations become maps, vasopressor by fluid level, of the
    difference to no treatment; other plans and policies become dots.

    Args:
      summary: a row per plan, as `sepsis_jax.pipelines.sweep_summary.summarise` gives it.
      title: of the figure.
      path: PNG to write.
    """
    measures = [measure for measure in _MEASURES if measure.column in summary]
    kinds = [kind for kind in _MAPS if (summary["kind"] == kind).any()]
    others = summary[~summary["kind"].isin(list(_MAPS))]
    dots = 0.32 * len(others) + 0.9
    heights = [3.0] * len(kinds) + ([dots] if len(others) else [])
    figure, axes = plt.subplots(
        len(heights), len(measures), figsize=(3.1 * len(measures) + 0.8, sum(heights) + 0.7),
        height_ratios=heights, squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, kind in zip(axes, kinds, strict=False):
        rows = summary[summary["kind"] == kind]
        for axis, measure in zip(row, measures, strict=True):
            _map(axis, rows, measure)
        row[0].set_ylabel(f"{_MAPS[kind]}\n\nvasopressor level", fontsize=9)
    if len(others):
        for axis, measure in zip(axes[-1], measures, strict=True):
            _dots(axis, others, summary, measure)
        axes[-1][0].set_yticks(range(len(others)), others["plan"][::-1])
    notes = ["red: more, blue: less"] if kinds else []
    if kinds and summary["supported"].notna().any():
        notes += ["marked corner: in most starts clinicians hardly ever begin so"]
    if len(others) and "constant" in kinds:
        notes += ["dashed: no treatment"]
    lines = [title, "; ".join(notes)] if notes else [title]
    figure.suptitle("\n".join(lines), fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def _map(axis: Any, rows: pd.DataFrame, measure: _Measure) -> None:
    shape = (schema.NUM_LEVELS, schema.NUM_LEVELS)
    values = measure.scale * rows[measure.column].to_numpy().reshape(shape)
    values = values - values[0, 0]
    supported = rows["supported"].to_numpy().reshape(shape)
    largest = max(float(np.abs(values).max()), 1e-9)
    colors = plt.get_cmap("RdBu_r")
    norm = matplotlib.colors.Normalize(-1.2 * largest, 1.2 * largest)
    axis.imshow(values, origin="lower", cmap=colors, norm=norm)
    digits = int(np.clip(1 - np.floor(np.log10(largest)), 0, 3))
    for (vasopressor, fluid), value in np.ndenumerate(values):
        dark = np.dot(colors(norm(value))[:3], (0.299, 0.587, 0.114)) < 0.5
        text = f"{value:+.{digits}f}" if round(value, digits) else "0"
        ink = "white" if dark else "black"
        if supported[vasopressor, fluid] < _RARE:
            corner = [(fluid + dx, vasopressor + dy) for dx, dy in _CORNER]
            axis.add_patch(plt.Polygon(corner, color=ink, lw=0, alpha=0.55))
        axis.text(fluid, vasopressor, text, ha="center", va="center", fontsize=8, color=ink)
    axis.set(xticks=_LEVELS, yticks=_LEVELS, xlabel="fluid level")
    axis.set_title(measure.title, fontsize=10)
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)


def _dots(axis: Any, others: pd.DataFrame, summary: pd.DataFrame, measure: _Measure) -> None:
    values = measure.scale * others[measure.column].to_numpy()[::-1]
    colors = [_DOT_COLORS[kind] for kind in others["kind"][::-1]]
    places = np.arange(len(values))
    untreated = summary.loc[summary["plan"] == "constant 0,0", measure.column]
    if len(untreated):
        axis.axvline(measure.scale * untreated.iloc[0], color="grey", lw=0.9, ls="--")
    axis.hlines(places, 0, 1, transform=axis.get_yaxis_transform(), color="0.92", lw=0.8, zorder=0)
    axis.scatter(values, places, c=colors, s=42)
    for value, place in zip(values, places, strict=True):
        axis.annotate(f"{value:.3g}", (value, place), (0, 6), textcoords="offset points",
                      ha="center", fontsize=7.5)  # fmt: skip
    axis.set(yticks=[], ylim=(-0.7, len(values) - 0.3), xlabel=measure.title)
    axis.margins(x=0.18)
    axis.spines[["top", "right", "left"]].set_visible(False)
