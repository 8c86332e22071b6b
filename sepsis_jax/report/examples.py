"""Parts of a report that show single patients, and where everything comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from policy.agent.dialogue import COMPLETED
from policy.agent.records import Record
from policy.agent.transcript import entries
from sepsis_jax.pipelines.example_futures import ExampleFutures
from sepsis_jax.report.html import Dialogue, Section, Table
from sepsis_jax.report.panels import fan_panels
from sepsis_jax.runs import JsonDict


def futures_section(examples: Sequence[ExampleFutures], folder: Path) -> Section:
    """Fan charts of a few patients, and what each plan comes to.

    Args:
      examples: at least one.
      folder: of pictures, to write into.
    """
    known = examples[0].truth is not None
    pictures = [
        fan_panels(
            one.table, one.past, one.truth, one.outcomes, f"Stay {one.stay_id}, {one.reason}",
            folder / f"stay_{one.stay_id}",
        )
        for one in examples
    ]  # fmt: skip
    hours = examples[0].table["hour"]
    given = dict(zip(examples[0].outcomes["plan"], examples[0].outcomes["given"], strict=True))
    text = (
        f"What the world model says of {len(examples)} patients of the evaluated split under the "
        f"same plans from hour {hours.min():g} to hour {hours.max():g}. Every plan meets the same "
        "random numbers.",
        "Plans: " + "; ".join(f"{plan}: {what}" for plan, what in given.items()) + ".",
        "The patients are synthetic, so the world can play each of them again under every plan "
        "with the same random numbers: that is the truth beside the model's word. It is one "
        "course per plan, not a mean: a patient may die under the better plan."
        if known
        else "What would truly have happened is not known: these are claims of the model, and "
        "bands hold its uncertainty only where clinicians have treated such patients so.",
    )
    return Section("Futures of single patients", text, pictures, (_outcomes(examples, known),))


def _outcomes(examples: Sequence[ExampleFutures], known: bool) -> Table:
    data = pd.concat(
        [one.outcomes.assign(stay=one.stay_id, patient=one.reason) for one in examples],
        ignore_index=True,
    )
    columns = ["plan", "patient", "predicted mortality, % (90% of futures)"]
    columns += ["in truth, by day 90"] if known else []
    columns += ["predicted total reward"] + (["true total reward"] if known else [])
    columns += ["steps with MAP below 65 mmHg, %", "steps ventilated, %"]
    supported = "support" in data
    columns += ["least probability of a step under the clinician, %"] if supported else []
    rows: list[tuple[object, ...]] = []
    for row in data.to_dict("records"):
        low, mean, high = (100 * row[f"mortality_{end}"] for end in ("q05", "mean", "q95"))
        cells = [row["plan"], f"stay {row['stay']}, {row['patient']}"]
        cells.append(f"{mean:.0f} ({low:.0f} to {high:.0f})")
        cells += [("died" if row["true_died"] else "lived")] if known else []
        cells.append(f"{row['total_reward']:.1f}")
        cells += [f"{row['true_reward']:.1f}"] if known else []
        cells += [f"{100 * row['map_below_65']:.0f}", f"{100 * row['ventilation']:.0f}"]
        cells += [f"{100 * row['support']:.1f}"] if supported else []
        rows.append(tuple(cells))
    return Table("Outcomes by plan", columns, rows, "example_outcomes", data)


SHOWN_DIALOGUES = 2  # of each run


def dialogue_section(runs: Mapping[str, Sequence[Record]]) -> Section:
    """A few dialogues of language models.

    Args:
      runs: last attempts at stays by the name of a policy; at least one is completed.
    """
    found = [
        _dialogue(name, record)
        for name, records in runs.items()
        for record in [one for one in records if one["status"] == COMPLETED][:SHOWN_DIALOGUES]
    ]
    text = "What the language model was told, asked and prescribed; open one to read it."
    return Section("Example dialogues", (text,), dialogues=found)


def _dialogue(name: str, record: Record) -> Dialogue:
    decisions = len(record["decisions"])
    invalid = sum(record["invalid"].values())
    return Dialogue(
        f"{name}: patient {record['patient']}, {decisions} decisions",
        f"Simulated, not a real patient's care. {decisions} decisions, {record['tool_calls']} "
        f"calls answered, {invalid} refused.",
        [(entry.speaker, entry.text) for entry in entries(record)],
    )


_FACTS = {
    "command": "command", "revision": "revision of the software", "python": "Python",
    "machine": "processor", "versions": "versions", "episodes": "recorded stays",
    "policies": "policies", "model": "world model", "behavior": "clinician's probabilities",
    "treated": "runs over synthetic patients", "stages": "stages of training",
    "stays": "stays evaluated", "split": "split", "samples": "futures per stay and member",
    "patients": "fresh synthetic patients", "seed": "seed", "ope": "off-policy evaluation",
    "sha256": "SHA-256", "manifest_sha256": "SHA-256 of its manifest", "path": "folder",
    "cohort": "cohort made by", "audit": "audit",
}  # fmt: skip


_MANY = 60  # rows that are not unfolded at once


def provenance_section(facts: JsonDict) -> Section:
    """Where the figures come from: the manifest, in words."""
    rows = [(words, _said(value)) for words, value in _flat(facts)]
    text = "The same command on the same files with the same versions writes the same bytes."
    table = Table("", ("what", "value"), rows, "provenance", folded=len(rows) > _MANY)
    return Section("Where it comes from", (text,), tables=(table,))


def _flat(facts: Mapping[str, object], before: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in facts.items():
        words = before + _FACTS.get(name, name.replace("_", " "))
        if isinstance(value, Mapping):
            found += _flat(value, f"{words}: ")
        elif value not in (None, "", [], ()):
            found.append((words, value))
    return found


def _said(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return value if isinstance(value, str) else json.dumps(value)
