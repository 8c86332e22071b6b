"""The page of one patient: what its template needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlencode

import jax
import numpy as np
import pandas as pd

from sepsis_jax.explore.address import GRIDS, HISTORIES, MOST_BESIDE, PatientAddress, plan_text
from sepsis_jax.explore.charts import (
    FAN_VALUES,
    HISTORY_VALUES,
    Chart,
    Styled,
    fan_charts,
    history_charts,
    outcome_charts,
    plan_styles,
)
from sepsis_jax.explore.explorer import Explorer, Futures
from sepsis_jax.explore.reproduce import patient_code
from sepsis_jax.ope.simulated import SUPPORTED
from sepsis_jax.report import words
from sepsis_jax.runs import Progress, silent
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.simulate.plans import CLINICIAN, Plan

DISAGREEMENT = 0.05  # of mortality, between members: more is a warning
PROJECTED = 0.1  # share of simulated values outside their range: more is a warning
SHADES = 10


class Cell(NamedTuple):
    """A treatment in the grid."""

    action: int
    text: str
    shade: int  # 0 to SHADES
    rare: bool  # hardly ever given by clinicians
    chosen: bool
    link: str
    label: str


class ShownPlan(NamedTuple):
    """An entry of the legend."""

    style: Styled
    words: str
    recorded: bool
    remove: str | None  # address without it


class Given(NamedTuple):
    """What a policy would give."""

    name: str
    dose: str
    probability: float  # percent
    second: str
    hold: str  # address with this treatment held


def patient_page(explorer: Explorer, address: PatientAddress) -> dict[str, object]:
    """What the template of a patient needs.

    Args:
      explorer: to ask.
      address: what is asked.

    Raises:
      InputError: no such stay or row.
    """
    futures = explorer.futures(address)
    stay: Episodes = jax.tree.map(np.asarray, explorer.one(address.stay))
    hours, horizon, step = explorer.hours, explorer.horizon, address.step
    row = explorer.row_of(address.stay)
    length = int(explorer.length[row])
    styles = plan_styles([plan.name for plan in futures.shown])
    charts = history_charts(stay, step, hours, address.history)
    main = futures.outcomes.iloc[0]
    said = words.plan(list(address.plan))
    ids = list(explorer.rows)
    return {
        "title": f"Patient {address.stay}, hour {step * hours:g}",
        "stay": address.stay, "step": step, "hour": step * hours, "hours": hours,
        "length": length, "horizon": horizon, "address": address, "samples": explorer.samples,
        "members": explorer.world_model.num_members,
        "facts": _facts(stay, step, hours),
        "before_stay": _stay_link(address, ids, row - 1),
        "after_stay": _stay_link(address, ids, row + 1),
        "before_step": address.link(step=step - 1) if step else None,
        "after_step": address.link(step=step + 1) if step + 1 < length else None,
        "histories": [(name, address.link(history=name), name == address.history)
                      for name in HISTORIES],
        "history": [_drawn(chart) for chart in charts],
        "history_table": _history_table(stay, address.history, hours),
        "grid": _grid(address, futures),
        "grids": [(name, GRID_TITLES[name], address.link(grid=name), name == address.grid)
                  for name in GRIDS],
        "grid_title": GRID_TITLES[address.grid], "levels": schema.LEVEL_NAMES,
        "edits": _edits(address, hours),
        "setting": "all 24 hours" if address.edit is None else _span(address, hours, address.edit),
        "plans": _legend(address, futures.shown, styles),
        "keep": _keep(address), "recorded": _recorded_link(address),
        "repeats": futures.repeats, "warnings": _warnings(futures, styles),
        "support_known": bool(futures.outcomes["support"].notna().any()),
        "fans": [_drawn(chart) for chart in fan_charts(futures, stay, step, hours)],
        "fan_table": _fan_table(futures, styles),
        "outcome_charts": [_drawn(chart) for chart in outcome_charts(futures, step, hours)],
        "outcome_table": _outcome_table(futures, styles, hours),
        "knows_truth": explorer.knows_truth, "truth_shown": futures.truth is not None,
        "truth_link": address.link(truth=not address.truth),
        "policies": _policies(explorer, address),
        "dialogues": _dialogues(explorer, address),
        "summary": f"Patient {address.stay}, hour {step * hours:g}. Plan A, {said}: predicted "
        f"death within 90 days {100 * main['mortality_mean']:.0f}%, expected total reward "
        f"{main['total_reward']:.1f}.",
        "code": patient_code(explorer, address),
    }  # fmt: skip


def warm(explorer: Explorer, progress: Progress = silent) -> None:
    """Compiles everything that pages of patients need.

    Args:
      explorer: to ask about its first stay.
      progress: called with (phase, share done).
    """
    progress("compiling the simulation", 0.0)
    stay = next(iter(explorer.rows))
    for plan in (0, 1):
        patient_page(explorer, PatientAddress(stay, 0, (plan,) * explorer.horizon, edit=0))
    progress("done", 1.0)


GRID_TITLES = {
    "mortality": "predicted death within 90 days, %", "reward": "expected total reward",
    "disagreement": "disagreement of the ensemble, SD of mortality, points",
    "support": "least probability of a step under clinicians, %",
}  # fmt: skip
_GRID_COLUMNS = {
    "mortality": ("mortality_mean", 100.0, 0), "reward": ("total_reward", 1.0, 1),
    "disagreement": ("disagreement", 100.0, 1), "support": ("support", 100.0, 1),
}  # fmt: skip


def _drawn(chart: Chart) -> dict[str, object]:
    figure = json.dumps(chart.figure, allow_nan=False, separators=(",", ":"))
    return chart._asdict() | {"figure": figure.replace("<", "\\u003c")}


def _stay_link(address: PatientAddress, ids: Sequence[int], row: int) -> str | None:
    return address.link(stay=ids[row], step=0) if 0 <= row < len(ids) else None


def _facts(stay: Episodes, step: int, hours: float) -> list[tuple[str, str]]:
    age, male, charlson = np.asarray(stay.static)[0].tolist()
    dynamic = np.asarray(stay.dynamic)[0, step]
    action = int(np.asarray(stay.action)[0, step])
    ended = "died by day 90" if bool(stay.died_90d[0]) else "alive at day 90"
    return [
        ("age", f"{age:.0f} years"), ("sex", "male" if male else "female"),
        ("Charlson index", f"{charlson:.0f}"),
        ("recorded", f"{int(stay.length[0]) * hours:g} h"),
        ("recorded outcome", ended),
        ("SOFA now", f"{float(stay.sofa[0, step]):.0f}"),
        ("MAP now", f"{dynamic[schema.INDEX['meanbp']]:.0f} mmHg"),
        ("lactate now", f"{dynamic[schema.INDEX['lactate']]:.1f} mmol/L"),
        ("ventilated", "yes" if bool(stay.ventilated[0, step]) else "no"),
        ("really given now", words.dose(action)),
    ]  # fmt: skip


def _value(name: str, value: float) -> str:
    digits = 0 if name == "sofa" else schema.FEATURES[schema.INDEX[name]].decimals
    return f"{value:.{digits}f}"


def _history_table(stay: Episodes, group: str, hours: float) -> dict[str, object]:
    """Recorded values by hour; imputed ones in brackets."""
    names = HISTORY_VALUES[group]
    rows = []
    for step in range(int(stay.length[0])):
        cells = [f"{step * hours:g}"]
        for name in names:
            if name == "sofa":
                cells.append(_value(name, float(stay.sofa[0, step])))
                continue
            at = schema.INDEX[name]
            text = _value(name, float(stay.dynamic[0, step, at]))
            known = at >= schema.NUM_MASKED or bool(stay.measured[0, step, at])
            cells.append(text if known else f"({text})")
        cells.append(words.dose(int(schema.action_index(int(stay.vasopressor[0, step]),
                                                        int(stay.fluid[0, step])))))  # fmt: skip
        rows.append(cells)
    return {"columns": ["hour", *(words.feature(name) for name in names), "given"], "rows": rows}


def _grid(address: PatientAddress, futures: Futures) -> list[tuple[str, list[Cell]]]:
    """Rows by vasopressor level, cells by fluid level."""
    column, scale, digits = _GRID_COLUMNS[address.grid]
    values = scale * futures.grid[column].to_numpy(np.float64)
    seen = values[np.isfinite(values)]
    low, high = (seen.min(), seen.max()) if len(seen) else (0.0, 1.0)
    shades = np.nan_to_num((values - low) / max(high - low, 1e-9) * SHADES).round().astype(int)
    chosen = _chosen_action(address)
    rows = []
    for vasopressor, level in enumerate(schema.LEVEL_NAMES):
        cells = []
        for fluid in range(schema.NUM_LEVELS):
            action = schema.action_index(vasopressor, fluid)
            plan = list(address.plan)
            for at in range(len(plan)) if address.edit is None else (address.edit,):
                plan[at] = action
            rare = bool(futures.grid["support"].iloc[action] < SUPPORTED)
            text = f"{values[action]:.{digits}f}" if np.isfinite(values[action]) else "-"
            label = f"{words.dose(action)}: {GRID_TITLES[address.grid]} {text}"
            label += "; hardly ever given by clinicians" if rare else ""
            cells.append(
                Cell(action, text, int(shades[action]), rare, action == chosen,
                     address.link(plan=plan), label)
            )  # fmt: skip
        rows.append((level, cells))
    return rows


def _chosen_action(address: PatientAddress) -> int | None:
    """The action in the steps that the grid sets; None where they differ."""
    if address.edit is not None:
        return address.plan[address.edit]
    return address.plan[0] if len(set(address.plan)) == 1 else None


def _span(address: PatientAddress, hours: float, at: int) -> str:
    begin = (address.step + at) * hours
    return f"hours {begin:g} to {begin + hours:g}"


def _edits(address: PatientAddress, hours: float) -> list[dict[str, object]]:
    everything = {
        "text": "All 24 h", "given": "", "link": address.edit_link(None),
        "here": address.edit is None,
    }  # fmt: skip
    return [
        everything,
        *(
            {"text": _span(address, hours, at), "given": words.dose(action),
             "link": address.edit_link(at), "here": address.edit == at}
            for at, action in enumerate(address.plan)
        ),
    ]  # fmt: skip


def _legend(
    address: PatientAddress, shown: Sequence[Plan], styles: Sequence[Styled]
) -> list[ShownPlan]:
    entries = []
    for k, (plan, style) in enumerate(zip(shown, styles, strict=True)):
        others = [text for j, text in enumerate(address.beside) if j != k - 1]
        text = words.plan(plan.actions.tolist())
        recorded = plan.name == CLINICIAN
        entries.append(ShownPlan(style, text, recorded, address.link(beside=others) if k else None))
    return entries


def _keep(address: PatientAddress) -> str | None:
    text = plan_text(address.plan)
    if text in address.beside or len(address.beside) >= MOST_BESIDE:
        return None
    return address.link(beside=(*address.beside, text))


def _recorded_link(address: PatientAddress) -> str | None:
    if CLINICIAN in address.beside or len(address.beside) >= MOST_BESIDE:
        return None
    return address.link(beside=(CLINICIAN, *address.beside))


def _warnings(futures: Futures, styles: Sequence[Styled]) -> list[str]:
    found = []
    for style, row in zip(styles, futures.outcomes.to_dict("records"), strict=True):
        if row["support"] < SUPPORTED:
            found.append(
                f"Plan {style.letter}: clinicians hardly ever treat so (least probability of a "
                f"step {100 * row['support']:.2g}%). The model extrapolates."
            )
        if row["disagreement"] > DISAGREEMENT:
            found.append(
                f"Plan {style.letter}: members of the ensemble disagree about death within 90 "
                f"days by {100 * row['disagreement']:.0f} percentage points (SD)."
            )
        if row["projected_share"] > PROJECTED:
            found.append(
                f"Plan {style.letter}: {100 * row['projected_share']:.1f}% of simulated values "
                "left their physiologic range and were moved back."
            )
    return found


def _fan_table(futures: Futures, styles: Sequence[Styled]) -> dict[str, object]:
    """Median and 90% of each value by plan and hour."""
    letters = dict(zip((plan.name for plan in futures.shown), styles, strict=True))
    found: dict[tuple[str, float], list[str]] = {}
    by_value = {name: own for name, own in futures.table.groupby("feature")}
    for name in FAN_VALUES:
        for row in by_value[name].to_dict("records"):
            median, low, high = (_value(name, row[column]) for column in ("q50", "q05", "q95"))
            cells = found.setdefault((row["plan"], row["hour"]), [])
            cells.append(f"{median} ({low} to {high})")
    rows = [[letters[plan].letter, f"{hour:g}", *cells] for (plan, hour), cells in found.items()]
    return {"columns": ["plan", "hour", *(words.feature(name) for name in FAN_VALUES)],
            "rows": rows}  # fmt: skip


def _outcome_table(futures: Futures, styles: Sequence[Styled], hours: float) -> dict[str, object]:
    """A row per quantity, a column per plan."""
    outcomes = futures.outcomes.to_dict("records")
    day = hours * len(futures.shown[0].actions)
    alive = ["not modelled"] * len(outcomes)
    if futures.survival is not None:
        alive = [f"{100 * share:.1f}" for share in futures.survival[:, -1]]
    by_quantity = {
        "death within 90 days, % (90% of futures)": [
            f"{100 * row['mortality_mean']:.1f} ({100 * row['mortality_q05']:.0f} to "
            f"{100 * row['mortality_q95']:.0f})"
            for row in outcomes
        ],
        "disagreement of the ensemble, SD, points": [
            _percent(row["disagreement"]) for row in outcomes
        ],
        "total reward (90% of futures)": [
            f"{row['total_reward']:.2f} ({row['reward_q05']:.1f} to {row['reward_q95']:.1f})"
            for row in outcomes
        ],
        f"alive after {day:g} h, %": alive,
        "steps with MAP below 65 mmHg, %": [_percent(row["map_below_65"]) for row in outcomes],
        "steps ventilated, %": [_percent(row["ventilation"]) for row in outcomes],
        "least probability of a step under clinicians, %": [
            _percent(row["support"], 2) for row in outcomes
        ],
    }
    if futures.truth is not None:
        truth = futures.truth.outcomes
        by_quantity |= {
            "in truth, by day 90": ["died" if died else "lived" for died in truth["true_died"]],
            "true total reward": [f"{reward:.1f}" for reward in truth["true_reward"]],
        }
    columns = ["", *(f"plan {style.letter}" for style in styles)]
    return {"columns": columns, "rows": [[name, *cells] for name, cells in by_quantity.items()]}


def _percent(share: float, digits: int = 1) -> str:
    return "not known" if pd.isna(share) else f"{100 * share:.{digits}f}"


def _policies(explorer: Explorer, address: PatientAddress) -> list[Given]:
    """The record, the model's clinician, and each policy in the chosen row."""
    step = address.step
    rows = []
    clinician = explorer.clinician_probs(address.stay, step)
    if clinician is not None:
        rows.append(("clinician, as the world model clones it", clinician))
    rows += [
        (words.policy(name), explorer.given(address.stay, name)[step]) for name in explorer.policies
    ]
    found = []
    for name, probs in rows:
        first, second = np.argsort(probs, kind="stable")[::-1][:2].tolist()
        also = f"{words.dose(second)} ({100 * probs[second]:.0f}%)" if probs[second] > 0.005 else ""
        held = (first,) * explorer.horizon
        found.append(
            Given(name, words.dose(first), 100 * float(probs[first]), also,
                  address.link(plan=held))
        )  # fmt: skip
    return found


def _dialogues(explorer: Explorer, address: PatientAddress) -> list[tuple[str, str]]:
    """Dialogues about the patient of this number, at the decision of this row or the last one."""
    found = []
    for name, run in explorer.runs.items():
        record = run.records.get(address.stay)
        if record is not None:
            steps = [decision["step"] for decision in record["decisions"]]
            at = max(sum(step <= address.step for step in steps) - 1, 0)
            pairs = {"run": name, "patient": address.stay, "decision": at}
            found.append((name, "/dialogue?" + urlencode(pairs)))
    return found
