"""Addresses of pages: everything that a page shows is in its query, and can be shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlencode

import numpy as np

from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.simulate.plans import CLINICIAN, parse_sequence

ALL_STEPS = "all"
MOST_BESIDE = 3  # plans beside the chosen one
GRIDS = ("mortality", "reward", "disagreement", "support")
"""What the cells of the grid of treatments may show."""
HISTORIES = ("overview", "vitals", "labs")
"""Groups of recorded values."""


@dataclass(frozen=True)
class PatientAddress:
    """What the page of a patient shows.

    Attributes:
      stay: stay_id.
      step: row from which the plans are followed.
      plan: [H] joint actions of the chosen plan.
      edit: step of the plan that the grid sets, from 0; None sets all.
      beside: up to `MOST_BESIDE` further plans, as text of `plan_text` or "clinician".
      grid: what the cells show, of `GRIDS`.
      history: which recorded values are drawn, of `HISTORIES`.
      truth: draw what truly happens to a synthetic patient.
    """

    stay: int
    step: int
    plan: tuple[int, ...]
    edit: int | None = None
    beside: tuple[str, ...] = (CLINICIAN,)
    grid: str = GRIDS[0]
    history: str = HISTORIES[0]
    truth: bool = True

    def link(
        self,
        *,
        stay: int | None = None,
        step: int | None = None,
        plan: Sequence[int] | None = None,
        beside: Sequence[str] | None = None,
        grid: str | None = None,
        history: str | None = None,
        truth: bool | None = None,
    ) -> str:
        """The address with some of it changed."""
        changes = {
            "stay": stay, "step": step, "plan": None if plan is None else tuple(plan),
            "beside": None if beside is None else tuple(beside), "grid": grid,
            "history": history, "truth": truth,
        }  # fmt: skip
        kept = {name: value for name, value in changes.items() if value is not None}
        return _written(replace(self, **kept))  # type: ignore[arg-type]

    def edit_link(self, edit: int | None) -> str:
        """The address with another step to set; None for all."""
        return _written(replace(self, edit=edit))


def _written(address: PatientAddress) -> str:
    pairs: list[tuple[str, object]] = [
        ("stay", address.stay), ("step", address.step), ("plan", plan_text(address.plan)),
        ("edit", ALL_STEPS if address.edit is None else address.edit),
        *(("with", text) for text in address.beside or ("",)),
        ("grid", address.grid), ("history", address.history), ("truth", int(address.truth)),
    ]  # fmt: skip
    return "/patient?" + urlencode(pairs, safe=",;")


def plan_text(actions: Sequence[int] | np.ndarray) -> str:
    """A plan as `parse_sequence` reads it: "V,F;V,F", the last pair goes on."""
    pairs = ["{},{}".format(*schema.action_levels(int(action))) for action in actions]
    while len(pairs) > 1 and pairs[-1] == pairs[-2]:
        pairs.pop()
    return ";".join(pairs)


def read_plan(text: str, horizon: int) -> tuple[int, ...]:
    """Joint actions [H] of a plan's text.

    Raises:
      InputError: the text is malformed.
    """
    return tuple(int(action) for action in parse_sequence(text, horizon=horizon).actions)


def read_patient_address(query: Mapping[str, Sequence[str]], *, horizon: int) -> PatientAddress:
    """What the query of an address asks for; what it leaves out is as `PatientAddress` has it.

    Args:
      query: values by name.
      horizon: steps H of plans.

    Raises:
      InputError: a number, plan or choice is malformed.
    """

    def last(name: str, default: str) -> str:
        return (query.get(name) or [default])[-1]

    beside = [text for text in query.get("with", (CLINICIAN,)) if text]
    plans = [
        text if text == CLINICIAN else plan_text(read_plan(text, horizon))
        for text in dict.fromkeys(beside)
    ]
    if len(plans) > MOST_BESIDE:
        raise InputError(f"with: {len(plans)} plans; at most {MOST_BESIDE} stand beside another")
    edit = last("edit", ALL_STEPS)
    return PatientAddress(
        stay=number("stay", last("stay", "")),
        step=number("step", last("step", "0")),
        plan=read_plan(last("plan", "0,0"), horizon),
        edit=None if edit == ALL_STEPS else number("edit", edit, most=horizon - 1),
        beside=tuple(plans),
        grid=_choice("grid", last("grid", GRIDS[0]), GRIDS),
        history=_choice("history", last("history", HISTORIES[0]), HISTORIES),
        truth=_choice("truth", last("truth", "1"), ("0", "1")) == "1",
    )


def number(name: str, text: str, *, most: int = 2**63 - 1) -> int:
    """A whole number of an address, 0 or more.

    Raises:
      InputError: it is none, or too large.
    """
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) > most:
        limit = f", at most {most}" if most < 2**31 else ""
        raise InputError(f"{name}: got {text!r}, expected a whole number{limit}")
    return int(text)


def _choice(name: str, text: str, allowed: Sequence[str]) -> str:
    if text not in allowed:
        raise InputError(f"{name}: got {text!r}, expected one of {', '.join(allowed)}")
    return text
