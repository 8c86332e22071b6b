"""Tables, figures and the page of a comparison of policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from sepsis_jax.report.figures import COLORS, save
from sepsis_jax.report.html import Picture, Section, Table, write_page
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.files import write_json

COLUMNS = ("policy", "value", "less clinician", "less offline", "gap", "mortality", "adherence",
           "unsafe", "under", "over")  # fmt: skip
SHORT = 8  # columns that fit a terminal
_RATES = ("g1", "g2", "dose_jump", "abrupt_stop", "early_fluid_missed", "fluid_overload",
          "vasopressor_at_high_map")  # fmt: skip


def write_comparison(
    folder: Path, table: pd.DataFrame, shares: dict[str, np.ndarray], manifest: JsonDict
) -> None:
    """Writes everything but the policies into a folder."""
    table.to_csv(folder / "comparison.csv", index=False)
    write_json(folder / "comparison.json", {"rows": plain(table), **table.attrs})
    write_json(folder / "manifest.json", manifest)
    where = (
        f"{manifest['patients']} fresh synthetic patients, true value"
        if manifest["truth"]
        else f"{manifest['patients']} test stays in the world model, {manifest['horizon']} steps"
    )
    text = _text(manifest)
    (folder / "comparison.md").write_text(f"{where}\n\n{markdown(table)}\n\n{' '.join(text)}\n")
    files = [folder / f"{name}.png" for name in ("comparison", "actions", "difference")]
    pictures = [
        Picture.of(files[0], "Values with 95% intervals; value against rules"),
        Picture.of(files[1], "Share of decisions by pair of doses"),
        Picture.of(files[2], "Share of decisions, policy less clinician"),
    ]
    comparison_figure(table, where, files[0])
    action_heat_map(shares, "What is given", files[1])
    others = {name: share for name, share in shares.items() if name != "clinician"}
    difference_heat_map(others, shares["clinician"], "Policy less clinician", files[2])
    rates = Table("Broken rules, % of prescriptions", ("policy", *_RATES), [
        (row["policy"], *(row[name] for name in _RATES)) for row in plain(table)
    ])  # fmt: skip
    write_page(
        folder / "report.html", "Policies compared",
        [Section(where, text, pictures[:1], (Table("", COLUMNS, cells(table)), rates)),
         Section("What is given", (), pictures[1:])],
    )  # fmt: skip


def _text(manifest: JsonDict) -> tuple[str, ...]:
    if manifest["truth"]:
        start = (
            "Every policy treats the same patients with the same random numbers, so differences "
            "are paired. "
            "Rules are judged on what the policy gave in the stays it made."
        )
    else:
        start = (
            "Values are those of the world model and share its errors; the clinician's row is what "
            "the records show, and `less clinician` is the difference from the cloned clinician in "
            "the model. Rules are judged on prescriptions in recorded states."
        )
    rest = (
        "± is half a 95% interval over patients: it holds neither the choice of seeds nor that "
        "of the best offline method on the same patients. Adherence alone proves nothing: the "
        "highest dose of everything adheres. `less offline` is the difference from "
        f"{manifest['best_offline']}, the best offline method; `under` and `over` add up to "
        "`unsafe`; all after `less offline` are percent."
    )
    if manifest["best"]:
        rest += (
            f" `gap` is the share of the way from the {manifest['baseline']} to "
            f"{manifest['best']}, the best policy found with access to the truth."
        )
    return (start, rest)


def plain(table: pd.DataFrame) -> list[JsonDict]:
    """Rows with None for what is undefined."""
    return [
        {name: None if value != value else value for name, value in row.items()}
        for row in table.astype(object).to_dict("records")
    ]


def cells(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """Rows of `COLUMNS` as text."""
    return [
        (
            row["policy"],
            _ranged(row, "value", "high"),
            _ranged(row, "less_clinician", "less_clinician_high"),
            _ranged(row, "less_best_offline", "less_best_offline_high"),
            _number(row["gap_closed"], 0),
            _number(row["mortality"]),
            _number(row["adherence"]),
            *(_number(row[name]) for name in ("unsafe", "underdosing", "overdosing")),
        )
        for row in plain(table)
    ]


def markdown(table: pd.DataFrame) -> str:
    """The table for documents."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells(table))])


def _ranged(row: JsonDict, name: str, high: str) -> str:
    return "-" if row[name] is None else f"{row[name]:.2f} ± {row[high] - row[name]:.2f}"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


matplotlib.use("Agg")


_PANEL = 3.3  # inches
_COLUMNS = 4
_LEVELS = tuple(name.replace("Very High", "Very\nhigh") for name in schema.LEVEL_NAMES)
KIND_COLORS = {
    "clinician": "black", "bracket": "grey", "rules": COLORS[2], "clone": COLORS[3],
    "offline": COLORS[4], "planner": COLORS[1], "with the truth": COLORS[0],
}  # fmt: skip
_TICKS = (0, 1, 2, 5, 10, 20, 50, 100)


def action_shares(probs: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[5, 5] shares of the actions in percent, vasopressor by fluid level.

    Args:
      probs: [N, T, 25] probabilities of a policy, or one-hot actions taken.
      valid: [N, T] bool.

    Raises:
      InputError: no row is valid.
    """
    rows = np.asarray(probs)[np.asarray(valid)]
    if not len(rows):
        raise InputError("action shares: no recorded row to average over")
    shares: np.ndarray = 100.0 * rows.mean(0).reshape(schema.NUM_LEVELS, schema.NUM_LEVELS)
    return shares


def action_heat_map(shares: Mapping[str, np.ndarray], title: str, path: Path) -> None:
    """How often each policy gives each pair of doses, side by side on one scale.

    Args:
      shares: [5, 5] percent by name of the policy (`action_shares`).
      title: of the figure.
      path: PNG to write.
    """
    largest = max(float(share.max()) for share in shares.values())
    # Shares are skewed: the square root keeps small ones visible.
    norm = matplotlib.colors.PowerNorm(0.5, 0.0, largest)
    ticks = [tick for tick in _TICKS if tick <= largest]
    _panels(
        shares, title, path, cmap="Blues", norm=norm, ticks=ticks, label="share of decisions, %",
        text=lambda value: "<0.1" if 0 < value < 0.05 else f"{value:.1f}" if value else "0",
    )  # fmt: skip


def difference_heat_map(
    shares: Mapping[str, np.ndarray], clinician: np.ndarray, title: str, path: Path
) -> None:
    """Where policies give more (red) or less (blue) of a pair of doses than the clinician.

    Args:
      shares: [5, 5] percent by name of the policy.
      clinician: [5, 5] percent.
      title: of the figure.
      path: PNG to write.
    """
    differences = {name: share - clinician for name, share in shares.items()}
    largest = max(1.0, *(float(np.abs(change).max()) for change in differences.values()))
    norm = matplotlib.colors.SymLogNorm(1.0, 1.0, -largest, largest)
    ticks = [sign * tick for sign in (-1, 1) for tick in _TICKS if tick <= largest]
    _panels(
        differences, title, path, cmap="RdBu_r", norm=norm, ticks=sorted({*ticks}),
        label="policy less clinician, percentage points",
        text=lambda value: "0" if abs(value) < 0.05 else f"{value:+.1f}",
    )  # fmt: skip


def _panels(
    values: Mapping[str, np.ndarray], title: str, path: Path, *, norm: Normalize,
    ticks: Sequence[float], label: str, text: Callable[[float], str], cmap: str,
) -> None:  # fmt: skip
    columns = min(len(values), _COLUMNS)
    rows = -(-len(values) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(_PANEL * columns + 1.2, _PANEL * rows + 0.9), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    colors = plt.get_cmap(cmap)
    for axis, (name, value) in zip(axes.flat, values.items(), strict=False):
        axis.imshow(value, origin="lower", cmap=colors, norm=norm)
        for (vasopressor, fluid), number in np.ndenumerate(value):
            dark = np.dot(colors(norm(number))[:3], (0.299, 0.587, 0.114)) < 0.5
            axis.text(fluid, vasopressor, text(number), ha="center", va="center", fontsize=8,
                      color="white" if dark else "black")  # fmt: skip
        axis.set_title(name, fontsize=10)
        levels = range(schema.NUM_LEVELS)
        axis.set_xticks(levels, _LEVELS, fontsize=8)
        axis.set_yticks(levels, _LEVELS, fontsize=8)
        axis.set_xticks(np.arange(0.5, schema.NUM_LEVELS - 1), minor=True)
        axis.set_yticks(np.arange(0.5, schema.NUM_LEVELS - 1), minor=True)
        axis.grid(which="minor", color="white", lw=1.2)
        axis.tick_params(which="both", length=0)
        axis.spines[:].set_visible(False)
    for axis in list(axes.flat)[len(values) :]:
        axis.set_visible(False)
    figure.supxlabel("fluid", fontsize=10)
    figure.supylabel("vasopressor", fontsize=10)
    figure.suptitle(title, fontsize=11)
    scale = matplotlib.cm.ScalarMappable(norm, colors)
    bar = figure.colorbar(scale, ax=axes, shrink=0.85, pad=0.02, ticks=ticks, format="%g")
    bar.minorticks_off()
    bar.set_label(label)
    bar.outline.set_visible(False)
    save(figure, path)


def reliability_figure(
    curves: Mapping[str, pd.DataFrame], errors: Mapping[str, float], title: str, path: Path
) -> None:
    """Predicted against observed frequency of actions, with the expected calibration error.

    Args:
      curves: bins with predicted, observed and count by name (`policy.clinician_models.judge`).
      errors: expected calibration error by the same names.
      title: of the figure.
      path: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(5.4, 5.0), layout="constrained")
    least, most = 1.0, 0.0
    for i, (name, bins) in enumerate(curves.items()):
        predicted, observed = bins["predicted"], bins["observed"]
        shown = (predicted > 0) & (observed > 0)
        spread = 1.96 * np.sqrt(observed * (1 - observed) / bins["count"])
        axis.errorbar(
            predicted[shown], observed[shown], yerr=spread[shown], fmt="o-", ms=4.5, lw=1.4,
            elinewidth=1, capsize=2, color=COLORS[i % len(COLORS)],
            label=f"{name}, ECE {100 * errors[name]:.2f}%",
        )  # fmt: skip
        least = min(least, *predicted[shown], *observed[shown])
        most = max(most, *predicted[shown], *observed[shown])
    limits = (least / 1.6, min(most * 1.6, 1.0))
    axis.plot(limits, limits, color="grey", lw=0.9, ls="--", zorder=0)
    axis.set(
        xscale="log", yscale="log", xlim=limits, ylim=limits, aspect="equal",
        xlabel="predicted probability of an action", ylabel="observed frequency",
    )  # fmt: skip
    axis.set_title(title, fontsize=11)
    axis.legend(frameon=False, loc="upper left", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def course_figure(course: pd.DataFrame, title: str, path: Path) -> None:
    """The course of a training: losses of all seeds in one panel, other measures in one each.

    Args:
      course: `update` and columns of numbers; those that begin with "seed" share a panel.
      title: of the figure.
      path: PNG to write.
    """
    seeds = [name for name in course if name.startswith("seed")]
    panels = [("loss", seeds)] if seeds else []
    panels += [
        (name.replace("_", " "), [name]) for name in course if name not in ("update", *seeds)
    ]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.2 + 3.6 * len(panels), 3.3), squeeze=False, layout="constrained"
    )
    for axis, (label, names) in zip(axes.flat, panels, strict=True):
        for i, name in enumerate(names):
            axis.plot(course["update"], course[name], "o-", ms=3, lw=1.4, label=name,
                      color=COLORS[i % len(COLORS)])  # fmt: skip
        axis.set(xlabel="update", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def comparison_figure(table: pd.DataFrame, title: str, path: Path) -> None:
    """Values with 95% intervals, and what they cost: value against adherence and unsafe doses.

    Args:
      table: rows with policy, kind, value, low, high, adherence, unsafe; brackets are in the
        first panel alone, since they would flatten the others.
      title: of the figure.
      path: PNG to write.
    """
    rows, color = table.sort_values("value"), KIND_COLORS
    figure, (left, *scatters) = plt.subplots(
        1, 3, figsize=(16, 0.34 * len(rows) + 2.4), width_ratios=(1.15, 1, 1), layout="constrained"
    )
    for place, row in enumerate(rows.itertuples()):
        left.plot([row.low, row.high], [place] * 2, color=color[row.kind], lw=2.5)
        left.plot(row.value, place, "o", color=color[row.kind], ms=7)
        left.annotate(f"{row.value:.2f}", (row.high, place), (6, 0), va="center", fontsize=9,
                      textcoords="offset points")  # fmt: skip
    left.set_yticks(range(len(rows)), rows["policy"])
    left.set(xlabel="value: mean total reward, 95% interval")
    left.margins(x=0.12)
    near = rows[rows["kind"] != "bracket"]
    for axis, rate in zip(scatters, ("adherence", "unsafe"), strict=True):
        axis.scatter(near[rate], near["value"], s=46, c=near["kind"].map(color))
        _label_points(axis, near[rate], near["value"], near["policy"])
        axis.set(xlabel=f"{rate}, % of prescriptions", ylabel="value")
        axis.margins(x=0.25, y=0.12)
    for axis in (left, *scatters):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _label_points(axis: Axes, x: pd.Series, y: pd.Series, names: pd.Series) -> None:
    """Names beside points, from below upwards, each pushed up where it would meet another."""
    height = 0.055 * (y.max() - y.min() or 1.0)
    width = 0.3 * (x.max() - x.min() or 1.0)
    placed: list[tuple[float, float]] = []
    for at, value, name in sorted(zip(x, y, names, strict=True), key=lambda point: point[1]):
        spot = value
        while any(abs(at - a) < width and abs(spot - b) < height for a, b in placed):
            spot += height / 4
        placed.append((at, spot))
        axis.annotate(f"  {name}", (at, value), (at, spot), fontsize=9, va="center")
