"""Figures: fan charts, effects, training curves, sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon

from sepsis_jax.report import words
from worldmodel import schema
from worldmodel.clinical.rules import LACTATE_LIMIT, MAP_TARGET

matplotlib.use("Agg")


# Okabe-Ito: distinguishable with colour blindness and in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PLAN_COLORS = dict(
    zip(("clinician", "nothing", "fluids", "vasopressor", "both"), COLORS, strict=False)
)
"""Of the plans that the demo and the reports simulate; other plans get colours in order."""
_MARKERS = "osD^vP*X"
LARGEST_REWARD = 30.0
"""Total reward that no stay can exceed by much; estimates beyond it are drawn at the edge."""
_DPI = 130
VALUE_PANELS = (
    ("meanbp", MAP_TARGET), ("lactate", LACTATE_LIMIT), ("sofa", None), ("output_4hourly", None),
)  # fmt: skip
"""Values of which futures are shown, with the limit that is drawn."""


def fan_chart(
    table: pd.DataFrame, outcomes: pd.DataFrame, past: pd.DataFrame, title: str, path: Path
) -> None:
    """Futures of one patient under several plans: medians, 50% bands, 90% bars, and mortality.

    Args:
      table: rows (plan, hour, feature) with q05, q25, q50, q75, q95.
      outcomes: rows per plan with mortality_q05, mortality_mean, mortality_q95.
      past: recorded rows: hour and one column per panel, up to the start and, where the
        record goes on, beyond it.
      title: of the figure.
      path: PNG to write.
    """
    figure, grid = plt.subplots(3, 2, figsize=(7.2, 8.6))
    axes, rest = grid.flat[:-1], grid.flat[-1]
    plans = list(dict.fromkeys(table["plan"]))
    start = table["hour"].min()
    colors = plan_colors(plans)
    for axis, (feature, limit) in zip(axes[:-1], VALUE_PANELS, strict=True):
        draw_bands(axis, table[table["feature"] == feature], colors, ground="white")
        before, after = past[past["hour"] <= start], past[past["hour"] >= start]
        axis.plot(before["hour"], before[feature], "o-", color="black", ms=3.5, lw=1)
        axis.plot(
            after["hour"], after[feature], "o:", color="black", ms=3, lw=0.8, mfc="white", zorder=4
        )
        axis.axvline(start, color="grey", lw=0.8, ls="--")
        if limit is not None:
            axis.axhline(limit, color="grey", lw=0.8, ls=":")
        shown = table[table["feature"] == feature]
        bottom = min(shown["q05"].min(), past[feature].min())
        last = shown[shown["hour"] == shown["hour"].max()]
        top = max(last["q95"].median(), shown["q75"].max(), past[feature].max())
        axis.set_ylim(bottom - 0.05 * (top - bottom), top + 0.1 * (top - bottom))
        axis.set(xlabel="hours since ICU admission", title=words.feature(feature))
    _mortality_panel(axes[-1], outcomes, colors)
    handles, labels = axes[0].get_legend_handles_labels()
    black = Line2D([], [], color="black", marker="o", ms=3.5, lw=1)
    rest.legend(
        [*handles, black], [*labels, "recorded"], loc="center", frameon=False, fontsize=11,
        title="line: median; band: 50% of futures;\nbar at the end: 90%",
    )  # fmt: skip
    rest.axis("off")
    figure.suptitle(title, x=0.02, ha="left", fontsize=10)
    figure.tight_layout()
    save(figure, path)


def plan_colors(plans: Sequence[str]) -> dict[str, str]:
    """One colour per plan, the same in every figure for plans that have a name of their own."""
    free = [color for name, color in PLAN_COLORS.items() if name not in plans] or list(COLORS)
    others = [plan for plan in plans if plan not in PLAN_COLORS]
    found = {plan: free[i % len(free)] for i, plan in enumerate(others)}
    return {plan: PLAN_COLORS.get(plan) or found[plan] for plan in plans}


_WIDEST = 3.2
_BAR_GAP = 0.05  # between bars, as a share of the hours simulated


def draw_bands(axis: Axes, rows: pd.DataFrame, colors: Mapping[str, str], *, ground: str) -> None:
    """The middle half of the futures as bands, medians above them on a halo, 90% as bars.

    The bars stand side by side behind the last hour, where ranges that overlap can be told apart.
    Later medians are narrower, so that those below show where they are the same.

    Args:
      axis: to draw in.
      rows: of one value: plan, hour, q05, q25, q50, q75, q95.
      colors: by plan.
      ground: colour of the halo.
    """
    hours = rows["hour"].max() - rows["hour"].min()
    for place, (plan, own) in enumerate(rows.groupby("plan", sort=False), start=1):
        color, last = colors[str(plan)], own.iloc[-1]
        axis.fill_between(own["hour"], own["q25"], own["q75"], color=color, alpha=0.18, lw=0)
        beside = last["hour"] + place * _BAR_GAP * hours
        axis.plot([beside] * 2, [last["q05"], last["q95"]], color=color, lw=2)
        axis.plot(beside, last["q50"], "_", color=color, ms=7, mew=2)
    width = _WIDEST
    for plan, own in rows.groupby("plan", sort=False):
        axis.plot(own["hour"], own["q50"], color=ground, lw=width + 1.2, zorder=2.5)
        axis.plot(
            own["hour"], own["q50"], color=colors[str(plan)], lw=width, zorder=2.6, label=plan
        )
        width = max(0.8 * width, 1.2)


def _mortality_panel(axis: Axes, outcomes: pd.DataFrame, colors: Mapping[str, str]) -> None:
    plans = list(colors)
    rows = outcomes.set_index("plan").loc[plans] * 100
    y = np.arange(len(plans))[::-1]
    for position, (plan, color) in zip(y, colors.items(), strict=True):
        row = rows.loc[plan]
        axis.plot([row["mortality_q05"], row["mortality_q95"]], [position] * 2, color=color, lw=3)
        axis.plot(row["mortality_mean"], position, "o", color=color, ms=8)
        axis.annotate(
            f"{row['mortality_mean']:.0f}%", (row["mortality_mean"], position), (0, 8),
            textcoords="offset points", ha="center",
        )  # fmt: skip
    axis.set(
        yticks=y, yticklabels=plans, xlim=(0, 100), ylim=(-0.6, len(plans) - 0.4),
        xlabel="percent, mean and 90% of futures", title="predicted 90-day mortality",
    )  # fmt: skip


_UNITS = {"mortality": "share", "reward": "total reward", "sofa": "points"}


def effects_figure(table: pd.DataFrame, path: Path) -> None:
    """Learned against true means of the 25 treatments, one panel per quantity.

    Args:
      table: rows per action with vasopressor, fluid and `<feature>_true` / `_learned`.
      path: PNG to write.
    """
    names = [column.removesuffix("_true") for column in table if column.endswith("_true")]
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(5.2 * columns, 4.6 * lines), squeeze=False)
    axes = grid.ravel()
    for axis in axes[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes, names, strict=False):
        draw_effect(axis, table, name, dot=30)
    axes[0].legend(fontsize=8, frameon=False, title="larger dot: more vasopressor")
    figure.tight_layout()
    save(figure, path)


def draw_effect(axis: Axes, table: pd.DataFrame, name: str, *, dot: float) -> None:
    """Learned against true mean of a quantity, a dot per treatment.

    Args:
      axis: to draw in.
      table: as for `effects_figure`.
      name: of the quantity.
      dot: area of a dot without vasopressor.
    """
    true, learned = table[f"{name}_true"], table[f"{name}_learned"]
    for fluid in range(schema.NUM_LEVELS):
        rows = table["fluid"] == fluid
        axis.scatter(
            true[rows], learned[rows], s=dot * (1 + 0.7 * table["vasopressor"][rows]),
            color=COLORS[fluid], alpha=0.8, label=f"fluid {schema.LEVEL_NAMES[fluid]}",
        )  # fmt: skip
    limits = [min(true.min(), learned.min()), max(true.max(), learned.max())]
    axis.plot(limits, limits, color="grey", lw=0.8, ls="--")
    unit = _UNITS.get(name) or schema.FEATURES[schema.INDEX[name]].unit
    axis.set(xlabel=f"true, {unit}", ylabel=f"learned, {unit}", title=words.effect(name))


def accuracy_figure(
    scores: pd.DataFrame, estimators: Sequence[str], title: str, path: Path
) -> None:
    """RMSE and interval coverage of estimators, by sample size and by policy distance.

    Args:
      scores: rows (size, distance, estimator) with rmse and coverage, of one world.
      estimators: the ones to draw.
      title: of the figure.
      path: PNG to write.
    """
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex="col")
    # The middle distance over sizes, the largest size over distances.
    distances = sorted(scores["distance"].unique())
    middle, largest = distances[len(distances) // 2], scores["size"].max()
    panels = (
        ("size", scores[scores["distance"] == middle], f"distance {middle:g}"),
        ("distance", scores[scores["size"] == largest], f"{largest} stays"),
    )
    for column, (axis_name, rows, heading) in enumerate(panels):
        for i, name in enumerate(estimators):
            line = rows[rows["estimator"] == name].sort_values(axis_name)
            style = {"color": COLORS[i % len(COLORS)], "ls": "-" if i < len(COLORS) else "--"}
            axes[0, column].plot(line[axis_name], line["rmse"], "o", label=name, **style)
            axes[1, column].plot(line[axis_name], line["coverage"], "o", **style)
        axes[0, column].set(title=heading, ylabel="RMSE", xscale="log", yscale="log")
        axes[1, column].axhline(0.95, color="grey", lw=0.8, ls=":")
        axes[1, column].set(xlabel=axis_name, ylabel="coverage of 95% intervals", ylim=(0, 1))
    axes[0, 0].legend(fontsize=8, ncols=2, frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, and closes it."""
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


matplotlib.use("Agg")


_REWARD_PANELS = (
    ("value", "mean total reward"),
    ("adherence", "guideline adherence, %"),
    ("valid", "valid calls, %"),
)


def forest_figure(estimates: pd.DataFrame, title: str, path: Path) -> None:
    """Every policy's value by each estimator with its interval; hollow where not trusted.

    The dashed line is the mean return of the records.

    Args:
      estimates: of `sepsis_jax.ope.evaluate`: policy, estimator, estimate, low, high, trust;
        those of a handful of estimators.
      title: of the figure.
      path: PNG to write.
    """
    policies = list(dict.fromkeys(estimates["policy"]))
    recorded = estimates.loc[estimates["estimator"] == "on_policy", "estimate"]
    estimates = estimates[estimates["estimator"] != "on_policy"]
    kinds = list(dict.fromkeys(estimates["estimator"]))
    height = 1.4 + len(policies) * (0.3 + 0.16 * len(kinds))
    figure, axis = plt.subplots(figsize=(7.2, height))
    found = estimates[np.isfinite(estimates["estimate"])]
    seen = found.loc[found["estimate"].abs() <= LARGEST_REWARD, "estimate"]
    low, high = (seen.min(), seen.max()) if len(seen) else (-LARGEST_REWARD, LARGEST_REWARD)
    margin = 0.15 * (high - low) + 0.5
    limits = (low - margin, high + margin)
    for row in found.to_dict("records"):
        color = COLORS[kinds.index(row["estimator"]) % len(COLORS)]
        marker = _MARKERS[kinds.index(row["estimator"]) % len(_MARKERS)]
        share = (kinds.index(row["estimator"]) + 0.5) / len(kinds) - 0.5
        place = -policies.index(row["policy"]) - 0.75 * share
        axis.plot([row["low"], row["high"]], [place] * 2, color=color, lw=1.6)
        axis.plot(
            np.clip(row["estimate"], *limits), place, marker, color=color, ms=6,
            mfc=color if row["trust"] else "white", clip_on=False, zorder=3,
        )  # fmt: skip
    if len(recorded):
        axis.axvline(recorded.iloc[0], color="grey", lw=0.9, ls="--")
    for name in range(len(policies) - 1):
        axis.axhline(-name - 0.5, color="0.85", lw=0.8)
    axis.set(
        xlim=limits, ylim=(0.5 - len(policies), 0.5), xlabel="value (expected return of a stay)",
        yticks=-np.arange(len(policies)), yticklabels=policies,
    )  # fmt: skip
    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], marker=_MARKERS[i % len(_MARKERS)],
                   label=kind)
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    hollow = Line2D([], [], color="grey", marker="o", mfc="white", ls="", label="not trusted")
    figure.legend(handles=[*handles, hollow], loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, x=0.02, ha="left", fontsize=10)
    figure.set_layout_engine("constrained")
    save(figure, path)


def reward_figure(courses: Mapping[str, pd.DataFrame], before: float, path: Path) -> None:
    """How reinforcement learning went, over the tokens that were drawn.

    Args:
      courses: metrics by iteration of each run; columns `played_*`, and `held_out_*` where a
        run was judged meanwhile.
      before: value of the model that they started from.
      path: PNG to write.
    """
    figure, axes = plt.subplots(
        1, len(_REWARD_PANELS), figsize=(4.2 * len(_REWARD_PANELS), 3.6), layout="constrained"
    )
    for (name, label), axis in zip(_REWARD_PANELS, axes, strict=True):
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
    save(figure, path)


matplotlib.use("Agg")


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
      summary: a row per plan, as `sepsis_jax.pipelines.sweep_folder.summarise` gives it.
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
    save(figure, path)


def _map(axis: Axes, rows: pd.DataFrame, measure: _Measure) -> None:
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
            axis.add_patch(Polygon(corner, color=ink, lw=0, alpha=0.55))
        axis.text(fluid, vasopressor, text, ha="center", va="center", fontsize=8, color=ink)
    axis.set(xticks=_LEVELS, yticks=_LEVELS, xlabel="fluid level")
    axis.set_title(measure.title, fontsize=10)
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)


def _dots(axis: Axes, others: pd.DataFrame, summary: pd.DataFrame, measure: _Measure) -> None:
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
