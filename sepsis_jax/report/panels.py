"""Small figures of a report, each legible on a telephone and in light and dark.

Every function writes SVG panels into a folder and returns the picture that a section shows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from sepsis_jax.report import words
from sepsis_jax.report.figures import (
    COLORS,
    LARGEST_REWARD,
    VALUE_PANELS,
    draw_bands,
    draw_effect,
    plan_colors,
)
from sepsis_jax.report.html import Key, Picture
from sepsis_jax.report.svg import INK, LINE, NOTE, PAGE, css, save_svg, themed
from worldmodel import schema

_SIZE = (3.5, 2.7)  # inches: 336 pixels wide
_WIDE = (4.4, 3.0)


def _axis(size: tuple[float, float]) -> tuple[Figure, Axes]:
    return plt.subplots(figsize=size, layout="constrained")


def _line(color: str, style: str = "solid") -> str:
    return f"height:0;border-top:3px {style} {css(color)}"


def _ring(color: str) -> str:
    return f"width:.75rem;border-radius:50%;border:2px solid {css(color)}"


_DIAMOND = f"width:.62rem;height:.62rem;transform:rotate(45deg);background:{css(INK)}"


_WRAPPED = 17  # letters of a policy's name beside a panel
_ESTIMATES = ("wis", "dr", "wpdis")


def forest(policies: pd.DataFrame, folder: Path) -> Picture | None:
    """Estimates of each policy with 95% intervals, and the truth beside them; a panel each.

    Args:
      policies: of `pipelines.evaluation.policy_table`.
      folder: to write into.
    """
    names = [name for name in _ESTIMATES if name in policies and policies[name].notna().any()]
    known = "true" in policies and policies["true"].notna().any()
    if not names:
        return None
    values = policies[[*names, *(["true"] if known else [])]].to_numpy(float)
    possible = values[np.abs(values) <= LARGEST_REWARD]
    low, high = (
        (possible.min(), possible.max()) if len(possible) else (-LARGEST_REWARD, LARGEST_REWARD)
    )
    margin = 0.35 * (high - low) + 1.0
    limits = float(low - margin), float(high + margin)
    panels = [(folder / f"value_{name}.svg", f"{words.column(name)} by policy") for name in names]
    places = range(len(policies))[::-1]
    labels = [textwrap.fill(words.policy(policy), _WRAPPED) for policy in policies["policy"]]
    height = max(0.42, 0.15 * max(label.count("\n") + 1 for label in labels))
    for name, (path, _) in zip(names, panels, strict=True):
        with themed():
            figure, axis = _axis((_SIZE[0], height * len(policies) + 0.95))
            for place, (_, row) in zip(places, policies.iterrows(), strict=True):
                trusted = bool(row.get("trust") or False)
                if known:
                    _interval(axis, row, "true", place - 0.17, limits, full=True)
                _interval(axis, row, name, place + 0.17, limits, full=trusted)
            axis.set_yticks(places, labels)
            axis.set(xlim=limits, ylim=(-0.6, len(policies) - 0.4),
                     xlabel="total reward of a stay", title=words.column(name))  # fmt: skip
            axis.grid(axis="x")
            axis.spines["left"].set_visible(False)
            axis.tick_params(axis="y", length=0)
        save_svg(figure, path)
    legend = [
        Key("estimate and 95% interval", f"{_ring(COLORS[0])};background:{css(COLORS[0])}"),
        Key("estimate that the records cannot carry", _ring(COLORS[0])),
    ]
    if known:
        legend.append(Key("true value in the synthetic world", _DIAMOND))
    return Picture(
        "Value of each policy by estimator. An interval that runs out of the panel is cut off; a "
        "triangle at its edge is an estimate beyond it.",
        panels, legend,
    )  # fmt: skip


def _interval(
    axis: Axes, row: pd.Series, name: str, place: float, limits: tuple[float, float], *, full: bool
) -> None:
    if pd.isna(row[name]):
        return
    color, marker = (INK, "D") if name == "true" else (COLORS[0], "o")
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if pd.notna(low) and pd.notna(high):
        axis.hlines(place, low, high, color=color, lw=1.6)
    if not limits[0] < value < limits[1]:
        at, marker = (limits[0], "<") if value < limits[0] else (limits[1], ">")
        inwards = (7, "left") if marker == "<" else (-7, "right")
        axis.annotate(words.number(value, 0), (at, place), (inwards[0], 4),
                      textcoords="offset points", ha=inwards[1], fontsize=7.5)  # fmt: skip
        value = at
    axis.plot(value, place, marker, ms=5.5, mfc=color if full else PAGE, mec=color, mew=1.3,
              zorder=3, clip_on=False)  # fmt: skip


def calibration(bins: pd.DataFrame, folder: Path) -> Picture:
    """Predicted against observed mortality, a panel per moment.

    Args:
      bins: of `pipelines.world_model_table.calibration_table`.
      folder: to write into.
    """
    panels = []
    models = list(dict.fromkeys(bins["who"]))
    styles = dict(zip(models, zip(COLORS, "os^", strict=False), strict=False))
    for when, rows in bins.groupby("when", sort=False):
        path = folder / f"calibration_{when}.svg"
        with themed():
            figure, axis = _axis((_SIZE[0], 3.2))
            axis.plot([0, 100], [0, 100], color=NOTE, lw=0.9, ls="--")
            for who, own in rows.groupby("who", sort=False):
                color, marker = styles[str(who)]
                ends = own[["observed_low", "observed_high"]].to_numpy()
                axis.vlines(own["predicted"], ends[:, 0], ends[:, 1], color=color, lw=1, alpha=0.6)
                axis.plot(own["predicted"], own["observed"], marker=marker, color=color, ms=4.5,
                          lw=1.4)  # fmt: skip
            title = {"last": "last row of each stay", "every": "every row"}[str(when)]
            axis.set(xlim=(-2, 102), ylim=(-2, 102), title=title, aspect="equal",
                     xlabel="predicted mortality, %", ylabel="observed mortality, %")  # fmt: skip
            axis.grid(color=LINE)
        save_svg(figure, path)
        panels.append((path, f"Calibration of predicted mortality, {title}"))
    legend = [Key(who, _line(styles[who][0])) for who in models]
    legend.append(Key("perfect calibration", _line(NOTE, "dashed")))
    return Picture(
        "Death within 90 days: predicted against observed, stays in ten groups of equal size by "
        "predicted risk; bars are 95% intervals over stays.",
        panels, legend,
    )  # fmt: skip


def sample_sizes(
    by_step: Mapping[str, Sequence[float]], stays: int, needed: float, folder: Path
) -> Picture:
    """Effective sample size of the cumulative weights by step of the stay.

    Args:
      by_step: by policy, a size per step.
      stays: that are weighted.
      needed: size below which no estimate is trusted.
      folder: to write into.
    """
    path = folder / "sample_sizes.svg"
    styles = policy_styles(list(by_step))
    with themed():
        figure, axis = _axis(_WIDE)
        for name, sizes in by_step.items():
            color, dashes = styles[name]
            steps = np.arange(1, len(sizes) + 1)
            axis.plot(steps, np.maximum(sizes, 1e-9), color=color, ls=dashes, lw=1.8)
        axis.axhline(needed, color=NOTE, lw=1.0, ls=":")
        axis.set(yscale="log", ylim=(0.8, stays * 1.35), xlabel="steps since admission",
                 ylabel="effective sample size, stays")  # fmt: skip
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(color=LINE)
    save_svg(figure, path)
    legend = [
        Key(words.policy(name), _line(color, _CSS_DASHES[dashes]))
        for name, (color, dashes) in styles.items()
    ]
    legend.append(Key(f"least size that is trusted, {needed:.0f}", _line(NOTE, "dotted")))
    return Picture(
        f"How many of {stays:,} stays are left in effect when the weights of so many steps are "
        "multiplied (Kong's effective sample size). A line that leaves the panel has none left.",
        ((path, "Effective sample size by step, one line per policy"),), legend,
    )  # fmt: skip


_DASHES = ("-", "--", ":")
_CSS_DASHES = {"-": "solid", "--": "dashed", ":": "dotted"}


def policy_styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and dashes of each policy: the clinician in ink, the others in order."""
    others = [name for name in names if name != "clinician"]
    found = {name: (INK, "-") for name in names if name == "clinician"}
    return found | {
        name: (COLORS[i % len(COLORS)], _DASHES[i // len(COLORS) % len(_DASHES)])
        for i, name in enumerate(others)
    }


_MAP_COLOR, _DARKEST = COLORS[0], 0.8
_LEVELS = tuple(name.replace("Very High", "Very\nhigh") for name in schema.LEVEL_NAMES)


def heat_maps(shares: Mapping[str, np.ndarray], folder: Path) -> Picture:
    """Shares of the 25 pairs of doses, a panel per policy, one scale for all.

    Args:
      shares: [5, 5] percent, vasopressor by fluid level, by policy (`policies.action_shares`).
      folder: to write into.
    """
    largest = max(float(share.max()) for share in shares.values())

    def shade(value: float) -> float:  # the square root keeps small shares visible
        return _DARKEST * float(np.sqrt(max(value, 0.0) / largest))

    panels = []
    for number, (name, share) in enumerate(shares.items()):
        path = folder / f"actions_{number}.svg"
        with themed():
            figure, axis = _axis((_SIZE[0], 3.1))
            for (vasopressor, fluid), value in np.ndenumerate(share):
                corner = (fluid - 0.48, vasopressor - 0.48)
                axis.add_patch(Rectangle(corner, 0.96, 0.96, lw=0, color=LINE, alpha=0.25))
                axis.add_patch(
                    Rectangle(corner, 0.96, 0.96, lw=0, color=_MAP_COLOR, alpha=shade(value))
                )
                text = "<0.1" if 0 < value < 0.05 else f"{value:.1f}" if value else "0"
                axis.text(fluid, vasopressor, text, ha="center", va="center", fontsize=8.5)
            axis.set(xlim=(-0.5, 4.5), ylim=(-0.5, 4.5), xlabel="fluid", ylabel="vasopressor",
                     title=words.policy(name))  # fmt: skip
            axis.set_xticks(range(schema.NUM_LEVELS), _LEVELS)
            axis.set_yticks(range(schema.NUM_LEVELS), _LEVELS)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        save_svg(figure, path)
        panels.append((path, f"Share of each pair of doses, {words.policy(name)}"))
    marks = [mark for mark in (1.0, 5.0, 20.0, 50.0, 100.0) if mark < largest] + [largest]
    legend = [
        Key(f"{mark:.3g}%", f"background:{css(_MAP_COLOR)};opacity:{shade(mark):.2f}")
        for mark in marks
    ]
    return Picture(
        "Percent of decisions in recorded states that fall on each pair of doses; each map adds "
        "up to 100. The same shade is the same share in all maps.",
        panels, legend,
    )  # fmt: skip


def fan_panels(
    futures: pd.DataFrame,
    past: pd.DataFrame,
    truth: pd.DataFrame | None,
    outcomes: pd.DataFrame,
    who: str,
    folder: Path,
) -> Picture:
    """Futures of one patient under several plans, a panel per value and one of mortality.

    Args:
      futures: of `pipelines.world_model.trajectory_table`.
      past: recorded rows up to the start: hour and a column per value.
      truth: rows (plan, hour) with a column per value, what truly happens; None if not known.
      outcomes: of `pipelines.example_futures.ExampleFutures`.
      who: the patient, in words.
      folder: to write into.
    """
    plans = list(dict.fromkeys(futures["plan"]))
    colors = plan_colors(plans)
    panels = []
    for name, limit in VALUE_PANELS:
        path = folder / f"{name}.svg"
        with themed():
            figure, axis = _axis(_SIZE)
            own = futures[futures["feature"] == name]
            draw_bands(axis, own, colors, ground=PAGE)
            axis.plot(past["hour"], past[name], "o-", color=INK, ms=3, lw=1.1, zorder=4)
            courses = {} if truth is None else dict(list(truth.groupby("plan", sort=False)))
            for size, (plan, rows) in zip((9, 7.5, 6, 4.5, 3), courses.items(), strict=False):
                color = colors[str(plan)]
                axis.plot(rows["hour"], rows[name], ls=(0, (1, 1.6)), color=color, lw=1.4, zorder=5)
                axis.plot(rows["hour"].iloc[-1], rows[name].iloc[-1], "o", ms=size, mfc="none",
                          mec=color, mew=1.4, zorder=6)  # fmt: skip
            if limit is not None:
                axis.axhline(limit, color=NOTE, lw=0.8, ls=":")
            seen = [past[name], own["q25"], own["q75"], own["q95"].quantile([0.5])]
            seen += [] if truth is None else [truth[name]]
            every = np.concatenate([np.asarray(part, float) for part in seen])
            bottom, top = np.nanmin([*every, own["q05"].quantile(0.3)]), np.nanmax(every)
            axis.set_ylim(bottom - 0.05 * (top - bottom), top + 0.08 * (top - bottom))
            axis.set(xlabel="hours since ICU admission", title=words.feature(name))
        save_svg(figure, path)
        panels.append((path, f"{who}: {words.feature(name)} under each plan"))
    panels.append((_mortality(outcomes, colors, folder), f"{who}: mortality under each plan"))
    legend = [Key(plan, _line(colors[plan])) for plan in plans]
    legend.append(Key("recorded before", _line(INK)))
    if truth is not None:
        legend.append(Key("what truly happens, up to the ring", _line(NOTE, "dotted")))
    return Picture(
        f"{who}. Lines are medians of the simulated futures, bands their middle 50%, "
        "bars behind the end their 90%; dotted grey: the usual limit. Mortality: mean and 90% of "
        "the futures.",
        panels, legend,
    )  # fmt: skip


def _mortality(outcomes: pd.DataFrame, colors: Mapping[str, str], folder: Path) -> Path:
    path = folder / "mortality.svg"
    places = np.arange(len(outcomes))[::-1]
    known = "true_died" in outcomes
    with themed():
        figure, axis = _axis(_SIZE)
        for place, row in zip(places, outcomes.to_dict("records"), strict=True):
            low, mean, high = (100 * row[f"mortality_{end}"] for end in ("q05", "mean", "q95"))
            axis.hlines(place, low, high, color=colors[row["plan"]], lw=2.5)
            axis.plot(mean, place, "o", color=colors[row["plan"]], ms=7)
            axis.annotate(f"{mean:.0f}%", (mean, place), (0, 6), textcoords="offset points",
                          ha="center", fontsize=8)  # fmt: skip
            if known:
                axis.text(103, place, "died" if row["true_died"] else "lived", va="center")
        axis.set_yticks(places, list(outcomes["plan"]))
        axis.set(
            xlim=(0, 100),
            ylim=(-0.5, len(outcomes) - 0.4),
            xlabel="percent",
            title="predicted 90-day mortality" + ("; right: the truth" if known else ""),
        )
        axis.grid(axis="x", color=LINE)
        axis.tick_params(axis="y", length=0)
    save_svg(figure, path)
    return path


def training_panels(history: Mapping[str, Sequence[Mapping[str, float]]], folder: Path) -> Picture:
    """Training and validation loss by epoch, a panel per model.

    Args:
      history: of `worldmodel.models.training`, by model.
      folder: to write into.
    """
    kinds = ("training", "validation")
    panels = []
    for name, records in history.items():
        path = folder / f"training_{name}.svg"
        with themed():
            figure, axis = _axis(_SIZE)
            epochs = [record["epoch"] for record in records]
            for color, key in zip(COLORS, ("train_loss", "validation_loss"), strict=False):
                axis.plot(epochs, [record[key] for record in records], "o-", ms=3, color=color)
            axis.set(title=f"{name} model", xlabel="epoch", ylabel="loss")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(color=LINE)
        save_svg(figure, path)
        panels.append((path, f"Loss of the {name} model by epoch"))
    legend = [Key(kind, _line(color)) for kind, color in zip(kinds, COLORS, strict=False)]
    return Picture("How training went: loss by epoch.", panels, legend)


def effect_panels(table: pd.DataFrame, folder: Path) -> Picture:
    """Learned against true means of the 25 treatments, a panel per quantity.

    Args:
      table: of `pipelines.futures.futures_table`.
      folder: to write into.
    """
    names = [column.removesuffix("_true") for column in table if column.endswith("_true")]
    panels = []
    for name in names:
        path = folder / f"effect_{name}.svg"
        with themed():
            figure, axis = _axis((_SIZE[0], 3.0))
            draw_effect(axis, table, name, dot=14)
            axis.grid(color=LINE)
        save_svg(figure, path)
        panels.append((path, f"{words.effect(name)}, learned against true"))
    legend = [
        Key(f"fluid {level.lower()}", f"width:.75rem;border-radius:50%;background:{css(color)}")
        for level, color in zip(schema.LEVEL_NAMES, COLORS, strict=False)
    ]
    return Picture(
        "Each dot is one of the 25 treatments, larger with more vasopressor; on the dashed line "
        "the model is right. Values other than death and reward are changes against no treatment.",
        panels, legend,
    )  # fmt: skip
