"""Charts of the pages, as Plotly reads them, in colours that the page's theme decides.

A colour is what `report.svg.css` gives, with "@ALPHA" after it where it is translucent; the
page's script puts the theme's own in its place. Plans have letters beside their colours, so that
nothing hangs on colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from sepsis_jax.explore.explorer import Futures
from sepsis_jax.report import words
from sepsis_jax.report.figures import COLORS, VALUE_PANELS, plan_colors
from sepsis_jax.report.svg import INK, LINE, NOTE, css
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.episodes import Episodes

LETTERS = "ABCD"
DASHES = ("solid", "dash", "dashdot", "longdash")
LIMITS = {name: limit for name, limit in VALUE_PANELS if limit is not None}
FAN_VALUES = ("meanbp", "lactate", "sofa", "output_4hourly", "heart_rate", "creatinine")
HISTORY_VALUES = {
    "overview": (
        "meanbp", "heart_rate", "resp_rate", "spo2", "lactate", "creatinine", "output_4hourly",
        "sofa",
    ),
    "vitals": tuple(one.name for one in schema.FEATURES if one.group == "vital"),
    "labs": tuple(one.name for one in schema.FEATURES if one.group == "lab"),
}  # fmt: skip
_INK, _NOTE, _LINE = css(INK), css(NOTE), css(LINE)
_LATE = 1.3  # where day 90 stands, in lengths of the plan
_SOON = 5  # recorded rows before the start that fans show


class Chart(NamedTuple):
    """A chart of a page.

    Attributes:
      name: unique on the page; the place keeps its drawing when the page changes.
      title: above it.
      label: for those who do not see it.
      figure: of Plotly: data and layout.
      picks_time: a click on it chooses the row.
    """

    name: str
    title: str
    label: str
    figure: JsonDict
    picks_time: bool = False


class Styled(NamedTuple):
    """How a plan is told apart: its letter, and its place among `report.figures.COLORS`."""

    letter: str
    color: int
    dash: str

    @property
    def css(self) -> str:
        """The colour as charts have it."""
        return css(COLORS[self.color])


def plan_styles(names: Sequence[str]) -> list[Styled]:
    """A letter, colour and dashes for each plan; "clinician" has the reports' colour."""
    colors = plan_colors(names)
    return [
        Styled(letter, COLORS.index(colors[name]), dash)
        for name, letter, dash in zip(names, LETTERS, DASHES, strict=False)
    ]


def _layout(x: JsonDict | None = None, y: JsonDict | None = None, **more: object) -> JsonDict:
    axis = {
        "zeroline": False, "gridcolor": _LINE, "linecolor": _NOTE, "fixedrange": True,
        "automargin": True, "ticks": "outside", "tickcolor": _NOTE, "ticklen": 3,
    }  # fmt: skip
    return {
        "xaxis": axis | {"showgrid": False} | (x or {}),
        "yaxis": axis | {"nticks": 5} | (y or {}),
        "margin": {"l": 8, "r": 10, "t": 8, "b": 8}, "showlegend": False, "hovermode": "closest",
        "shapes": [], "dragmode": False, **more,
    }  # fmt: skip


def _rule(axis: str, value: float, dash: str, color: str = _NOTE) -> JsonDict:
    """A line across the chart, at a value of one axis."""
    other = "y" if axis == "x" else "x"
    return {
        "type": "line", f"{other}ref": "paper", f"{other}0": 0, f"{other}1": 1,
        f"{axis}0": value, f"{axis}1": value, "line": {"width": 1, "dash": dash, "color": color},
        "layer": "below",
    }  # fmt: skip


def history_charts(episodes: Episodes, step: int, step_hours: float, group: str) -> list[Chart]:
    """Recorded values of one stay, imputed ones hollow, and its treatments.

    Args:
      episodes: the one stay, with NumPy leaves.
      step: row that is marked.
      step_hours: length of a step.
      group: of `HISTORY_VALUES`.
    """
    length = int(episodes.length[0])
    hours = (step_hours * np.arange(length)).tolist()
    dynamic = np.asarray(episodes.dynamic)[0, :length]
    measured = np.asarray(episodes.measured)[0, :length]
    x = {"range": [-0.6 * step_hours, step_hours * (length - 0.2)], "nticks": 6}
    charts = []
    for name in HISTORY_VALUES[group]:
        if name == "sofa":
            values, known = np.asarray(episodes.sofa)[0, :length], np.ones(length, bool)
        else:
            at = schema.INDEX[name]
            values = dynamic[:, at]
            known = measured[:, at] if at < schema.NUM_MASKED else np.ones(length, bool)
        text = ["measured" if one else "imputed" for one in known]
        layout = _layout(x, height=150)
        layout["shapes"] = [_rule("x", step * step_hours, "dash")]
        layout["shapes"] += [_rule("y", LIMITS[name], "dot")] if name in LIMITS else []
        trace = {
            "type": "scatter", "mode": "lines+markers", "x": hours, "y": _rounded(values),
            "text": text, "hovertemplate": "hour %{x}: %{y} (%{text})<extra></extra>",
            "line": {"color": _INK, "width": 1.4},
            "marker": {
                "size": 6, "color": _INK, "line": {"color": _INK, "width": 1.2},
                "symbol": ["circle" if one else "circle-open" for one in known],
            },
        }  # fmt: skip
        charts.append(
            Chart(
                f"history-{name}", words.feature(name),
                f"{words.feature(name)} by hour, {int(known.sum())} of {length} rows measured; "
                "the numbers are in the table below",
                {"data": [trace], "layout": layout}, picks_time=True,
            )
        )  # fmt: skip
    doses = (
        ("vasopressor", "vasopressor dose, mcg/kg/min", episodes.vasopressor_dose, COLORS[1]),
        ("fluid", "fluid, mL per step", episodes.fluid_dose, COLORS[0]),
    )
    for name, title, amounts, color in doses:
        layout = _layout(x, {"rangemode": "tozero"}, height=150, bargap=0.15)
        layout["shapes"] = [_rule("x", step * step_hours, "dash")]
        trace = {
            "type": "bar", "x": hours, "y": _rounded(np.asarray(amounts)[0, :length]),
            "offset": 0, "width": 0.85 * step_hours, "marker": {"color": css(color)},
            "hovertemplate": f"from hour %{{x}}, {step_hours:g} h: %{{y}}<extra></extra>",
        }  # fmt: skip
        charts.append(
            Chart(f"history-{name}", title, f"{title}, by hour; the numbers are in the table below",
                  {"data": [trace], "layout": layout}, picks_time=True)
        )  # fmt: skip
    return charts


def fan_charts(futures: Futures, episodes: Episodes, step: int, step_hours: float) -> list[Chart]:
    """Medians, middle 50% and 90% of the futures, beside the record and the truth.

    Args:
      futures: what is shown.
      episodes: the one stay, with NumPy leaves.
      step: row that the plans start from.
      step_hours: length of a step.
    """
    names = [plan.name for plan in futures.shown]
    styles = dict(zip(names, plan_styles(names), strict=True))
    charts = []
    for name in FAN_VALUES:
        rows = futures.table[futures.table["feature"] == name]
        traces: list[JsonDict] = []
        lines: list[JsonDict] = []
        for plan, own in rows.groupby("plan", sort=False):
            bands, line = _fan(own, styles[str(plan)])
            traces += bands
            lines.append(line)
        traces += [*lines, *_recorded(episodes, name, step, step_hours)]
        if futures.truth is not None:
            traces += _true_lines(futures.truth.rows, name, styles)
        limits = _fan_range(rows, traces)
        ends = [line["y"][-1] for line in lines]
        traces += _letters(list(styles.values()), lines[0]["x"][-1], ends, limits)
        layout = _layout({"nticks": 7}, {"range": limits}, height=250)
        layout["shapes"] = [_rule("x", step * step_hours, "dash")]
        layout["shapes"] += [_rule("y", LIMITS[name], "dot")] if name in LIMITS else []
        charts.append(
            Chart(
                f"fan-{name}", words.feature(name),
                f"Futures of {words.feature(name)} under {len(names)} plans; the numbers are in "
                "the table below",
                {"data": traces, "layout": layout},
            )
        )  # fmt: skip
    return charts


def _fan_range(rows: pd.DataFrame, traces: Sequence[JsonDict]) -> list[float]:
    """Holds all lines and middle halves; the far ends of wide bands may leave the chart."""
    seen = [np.asarray(one["y"], float) for one in traces if one.get("fill") is None]
    ends = np.array([rows["q95"].median(), rows["q05"].quantile(0.3)])
    seen += [rows["q25"].to_numpy(), rows["q75"].to_numpy(), ends]
    every = np.concatenate(seen)
    return _with_margins(float(every.min()), float(every.max()), 0.08)


_APART = 0.075  # of the height of a chart, between letters


def _letters(
    styles: Sequence[Styled], x: float, ends: Sequence[float], limits: Sequence[float]
) -> list[JsonDict]:
    """The letters of plans right of the ends of their lines, moved apart where these are close."""
    least = _APART * (limits[1] - limits[0])
    order = np.argsort(ends, kind="stable")
    places = np.asarray(ends, float)[order]
    for k in range(1, len(places)):
        places[k] = max(places[k], places[k - 1] + least)
    places -= max(0.0, float((places - np.asarray(ends)[order]).mean()))
    return [
        {
            "type": "scatter", "mode": "text", "x": [x], "y": [round(float(place), 4)],
            "text": [f"<b>{styles[k].letter}</b>"], "textposition": "middle right",
            "textfont": {"color": styles[k].css}, "cliponaxis": False, "hoverinfo": "skip",
        }
        for place, k in zip(places, order.tolist(), strict=True)
    ]  # fmt: skip


def _with_margins(low: float, high: float, share: float) -> list[float]:
    margin = share * (high - low) or 1.0
    return [round(low - margin, 4), round(high + margin, 4)]


def _fan(own: pd.DataFrame, style: Styled) -> tuple[list[JsonDict], JsonDict]:
    """Both bands of a plan, and its median."""
    hours = own["hour"].tolist()
    bands = []
    for low, high, alpha in (("q05", "q95", 0.08), ("q25", "q75", 0.18)):
        around = [*own[high].tolist(), *own[low].tolist()[::-1]]
        bands.append(
            {
                "type": "scatter", "mode": "lines", "x": [*hours, *hours[::-1]],
                "y": _rounded(around), "fill": "toself", "fillcolor": f"{style.css}@{alpha}",
                "line": {"width": 0, "color": style.css}, "hoverinfo": "skip",
            }
        )  # fmt: skip
    line = {
        "type": "scatter", "mode": "lines", "x": hours, "y": _rounded(own["q50"]),
        "line": {"color": style.css, "width": 2.6, "dash": style.dash},
        "customdata": np.round(own[["q25", "q75", "q05", "q95"]].to_numpy(float), 2).tolist(),
        "hovertemplate": f"{style.letter}, hour %{{x}}: median %{{y}}<br>half in "
        "%{customdata[0]} to %{customdata[1]}<br>90% in %{customdata[2]} to %{customdata[3]}"
        "<extra></extra>",
    }  # fmt: skip
    return bands, line


def _recorded(episodes: Episodes, name: str, step: int, step_hours: float) -> list[JsonDict]:
    """The record up to the start, and what it goes on with, hollow."""
    length = int(episodes.length[0])
    source = episodes.sofa if name == "sofa" else episodes.dynamic[..., schema.INDEX[name]]
    values = np.asarray(source)[0]
    last = min(length, step + round(24.0 / step_hours) + 1)
    parts = (
        (max(0, step - _SOON), step + 1, "solid", "circle"),
        (step, last, "dot", "circle-open"),
    )
    return [
        {
            "type": "scatter", "mode": "lines+markers",
            "x": (step_hours * np.arange(first, end)).tolist(), "y": _rounded(values[first:end]),
            "line": {"color": _INK, "width": 1.2, "dash": dash},
            "marker": {"color": _INK, "size": 5, "symbol": symbol},
            "hovertemplate": "recorded, hour %{x}: %{y}<extra></extra>",
        }
        for first, end, dash, symbol in parts
        if end - first > 0
    ]  # fmt: skip


def _true_lines(rows: pd.DataFrame, name: str, styles: Mapping[str, Styled]) -> list[JsonDict]:
    traces = []
    for plan, own in rows.groupby("plan", sort=False):
        style = styles[str(plan)]
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers", "x": own["hour"].tolist(),
                "y": _rounded(own[name]),
                "line": {"color": style.css, "width": 1.4, "dash": "dot"},
                "marker": {
                    "color": style.css, "symbol": "diamond-open",
                    "size": [5] * (len(own) - 1) + [11],
                },
                "hovertemplate": f"truth under {style.letter}, hour %{{x}}: %{{y}}<extra></extra>",
            }
        )  # fmt: skip
    return traces


def outcome_charts(futures: Futures, step: int, step_hours: float) -> list[Chart]:
    """Survival, death within 90 days by member of the ensemble, and total reward.

    Args:
      futures: what is shown.
      step: row that the plans start from.
      step_hours: length of a step.
    """
    styles = plan_styles([plan.name for plan in futures.shown])
    outcomes = futures.outcomes.to_dict("records")
    died = None if futures.truth is None else futures.truth.outcomes["true_died"].tolist()
    known = None if futures.truth is None else futures.truth.outcomes["true_reward"].tolist()
    return [
        _survival_chart(futures, styles, died, step, step_hours),
        _interval_chart(
            "mortality", "death within 90 days, %", styles,
            [[100 * row[f"mortality_{end}"] for end in ("q05", "mean", "q95")] for row in outcomes],
            None if died is None else [100.0 * one for one in died],
            (100 * futures.by_member).tolist(),
        ),
        _interval_chart(
            "reward", "expected total reward", styles,
            [[row["reward_q05"], row["total_reward"], row["reward_q95"]] for row in outcomes],
            known,
        ),
    ]  # fmt: skip


def _survival_chart(
    futures: Futures, styles: Sequence[Styled], died: list[bool] | None, step: int,
    step_hours: float,
) -> Chart:  # fmt: skip
    steps = len(futures.shown[0].actions)
    begin, length = step * step_hours, steps * step_hours
    late = begin + _LATE * length
    hours = (begin + step_hours * np.arange(steps + 1)).tolist()
    traces = []
    for k, style in enumerate(styles):
        alive = 100 * (1 - futures.outcomes["mortality_mean"].iloc[k])
        course = [100.0] if futures.survival is None else (100 * futures.survival[k]).tolist()
        line = {"color": style.css, "width": 2.4, "dash": style.dash, "shape": "hv"}
        hover = f"{style.letter}, %{{text}}: %{{y:.1f}}% alive<extra></extra>"
        traces.append(
            {
                "type": "scatter", "mode": "lines", "x": hours[: len(course)],
                "y": _rounded(course), "line": line, "hovertemplate": hover,
                "text": [f"hour {hour:g}" for hour in hours[: len(course)]],
            }
        )  # fmt: skip
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers",
                "x": [hours[len(course) - 1], late], "y": _rounded([course[-1], alive]),
                "line": {"color": style.css, "width": 1, "dash": "dot"},
                "marker": {"color": style.css, "size": [0, 8]},
                "hovertemplate": f"{style.letter}, day 90: %{{y:.1f}}% alive<extra></extra>",
                "cliponaxis": False,
            }
        )  # fmt: skip
        if died is not None:
            traces.append(
                {
                    "type": "scatter", "mode": "markers", "x": [late + 0.02 * k * length],
                    "y": [0.0 if died[k] else 100.0], "cliponaxis": False,
                    "marker": {"color": style.css, "size": 11, "symbol": "diamond-open"},
                    "hovertemplate": f"truth under {style.letter}: "
                    f"{'died' if died[k] else 'lived'}<extra></extra>",
                }
            )  # fmt: skip
    ticks = hours[:: max(1, steps // 3)]
    limits = _with_margins(min(min(one["y"]) for one in traces), 100.0, 0.08)
    alive_late = [100 * (1 - one) for one in futures.outcomes["mortality_mean"]]
    traces += _letters(styles, late + 0.03 * length, alive_late, limits)
    layout = _layout(
        {"tickvals": [*ticks, late], "ticktext": [*(f"{hour:g}" for hour in ticks), "day 90"],
         "range": [begin - 0.03 * length, late + 0.14 * length]},
        {"range": limits}, height=250,
    )  # fmt: skip
    layout["shapes"] = [_rule("x", begin + 1.06 * length, "dot")]
    label = "Share alive by hour and at day 90 under each plan; the numbers are in the table below"
    title = "survival, % (hours, then day 90)"
    return Chart("survival", title, label, {"data": traces, "layout": layout})


def _interval_chart(
    name: str, title: str, styles: Sequence[Styled], values: Sequence[Sequence[float]],
    truth: Sequence[float] | None, members: Sequence[Sequence[float]] | None = None,
) -> Chart:  # fmt: skip
    """A row per plan: mean, 90% of the futures, members' means as ticks, the truth."""
    traces: list[JsonDict] = []
    places = list(range(len(styles)))[::-1]
    for k, (style, place) in enumerate(zip(styles, places, strict=True)):
        low, mean, high = (round(float(value), 2) for value in values[k])
        common = {"type": "scatter", "cliponaxis": False}
        traces.append(
            common | {"mode": "lines", "x": [low, high], "y": [place, place], "hoverinfo": "skip",
                      "line": {"color": style.css, "width": 3}}
        )  # fmt: skip
        if members is not None:
            traces.append(
                common | {"mode": "markers", "x": _rounded(members[k]),
                          "y": [place] * len(members[k]),
                          "marker": {"color": style.css, "symbol": "line-ns-open", "size": 15},
                          "hovertemplate": "one member: %{x}<extra></extra>"}
            )  # fmt: skip
        traces.append(
            common | {"mode": "markers+text", "x": [mean], "y": [place], "text": [f"{mean:.3g}"],
                      "textposition": "top center",
                      "marker": {"color": style.css, "size": 11},
                      "hovertemplate": f"{style.letter}: mean {mean:g}, 90% of the futures "
                      f"{low:g} to {high:g}<extra></extra>"}
        )  # fmt: skip
        if truth is not None:
            traces.append(
                common | {"mode": "markers", "x": [round(float(truth[k]), 2)], "y": [place],
                          "marker": {"color": style.css, "symbol": "diamond-open", "size": 12,
                                     "line": {"width": 2}},
                          "hovertemplate": f"truth under {style.letter}: %{{x}}<extra></extra>"}
            )  # fmt: skip
    every = [float(one) for trace in traces for one in trace["x"]]
    layout = _layout(
        {"showgrid": True, "range": _with_margins(min(every), max(every), 0.12)},
        {"tickvals": places, "ticktext": [style.letter for style in styles], "showgrid": False,
         "range": [-0.6, len(styles) - 0.3], "ticks": ""},
        height=250,
    )  # fmt: skip
    label = f"{title} under each plan; the numbers are in the table below"
    return Chart(name, title, label, {"data": traces, "layout": layout})


def _rounded(values: Sequence[float] | np.ndarray | pd.Series) -> list[float]:
    found: list[float] = np.round(np.asarray(values, np.float64), 3).tolist()
    return found
