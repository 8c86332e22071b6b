"""An agent's dialogue, decision by decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast
from urllib.parse import urlencode

from policy.agent.records import Record
from policy.agent.transcript import entries
from sepsis_jax.explore.address import number
from sepsis_jax.explore.explorer import Explorer
from sepsis_jax.explore.reproduce import dialogue_code
from sepsis_jax.report import words
from worldmodel import schema
from worldmodel.errors import InputError


def turns_of(record: Record) -> list[tuple[int, int]]:
    """Turns [first, last) of each decision, and of what follows the last one in a failed stay."""
    found, first = [], 0
    for decision in record["decisions"]:
        found.append((first, decision["turn"] + 1))
        first = decision["turn"] + 1
    if first < len(record["turns"]):
        found.append((first, len(record["turns"])))
    return found


def dialogue_page(explorer: Explorer, query: Mapping[str, Sequence[str]]) -> dict[str, object]:
    """What the template of a dialogue needs.

    Args:
      explorer: whose runs are read.
      query: of the address: run, patient and decision, the last two from the first one on.

    Raises:
      InputError: no such run, patient or decision.
    """
    name = (query.get("run") or [next(iter(explorer.runs), "")])[-1]
    if name not in explorer.runs:
        known = ", ".join(explorer.runs) or "none; name one with --run"
        raise InputError(f"run {name!r}: not among the runs that were given ({known})")
    run = explorer.runs[name]
    if not run.records:
        raise InputError(f"run {name!r}: holds no stay yet")
    patient = number("patient", (query.get("patient") or [str(next(iter(run.records)))])[-1])
    if patient not in run.records:
        raise InputError(f"patient {patient}: not in the run {name!r}")
    record = run.records[patient]
    parts = turns_of(record)
    most = max(len(parts) - 1, 0)
    at = number("decision", (query.get("decision") or ["0"])[-1], most=most)
    first, last = parts[at] if parts else (0, 0)
    decision = record["decisions"][at] if at < len(record["decisions"]) else None
    closes = at == most
    shown = cast(
        "Record",
        {**record, "turns": record["turns"][first:last],
         "closing": record["closing"] if closes else ""},
    )  # fmt: skip

    def link(number_of_decision: int, of_patient: int = patient) -> str:
        pairs = {"run": name, "patient": of_patient, "decision": number_of_decision}
        return "/dialogue?" + urlencode(pairs)

    return {
        "title": f"Dialogue about patient {patient}, run {name}",
        "run": name, "runs": list(explorer.runs), "patient": patient,
        "patients": [(number_, link(0, number_)) for number_ in run.records],
        "status": record["failure"] or record["outcome"] or record["status"],
        "total_reward": record["total_reward"],
        "decisions": [
            {"link": link(k), "here": k == at, "text": _heading(record, k, explorer.hours)}
            for k in range(len(parts))
        ],
        "at": at, "count": len(parts),
        "before": link(at - 1) if at else None, "after": link(at + 1) if at < most else None,
        "decision": decision,
        "given": None if decision is None else words.dose(int(decision["action"])),
        "levels": None if decision is None else schema.action_levels(int(decision["action"])),
        "hour": None if decision is None else decision["step"] * explorer.hours,
        "entries": list(entries(shown)),
        "stay": _stay_link(explorer, patient, 0 if decision is None else decision["step"]),
        "code": dialogue_code(run.folder, patient, first, last, closes=closes),
    }  # fmt: skip


def _heading(record: Record, part: int, hours: float) -> str:
    if part >= len(record["decisions"]):
        return "end of the stay"
    decision = record["decisions"][part]
    return f"hour {decision['step'] * hours:g}: {words.dose(int(decision['action']))}"


def _stay_link(explorer: Explorer, patient: int, step: int) -> str | None:
    """The recorded stay of that number, where there is such a row."""
    row = explorer.rows.get(patient)
    if row is None or step >= explorer.length[row]:
        return None
    return f"/patient?stay={patient}&step={step}"
