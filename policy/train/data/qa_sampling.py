"""Where in recorded stays a question may be asked, and which answer the record gives.

A place is a stay and a step. Values are asked for only where they were measured in both rows, and
a vasopressor only where the whole window is on record, for either answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from policy.train.data.qa_prompts import ASKED, short_state
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError

OPTIONS: dict[str, tuple[str, ...]] = {
    "next_state": (),
    "trend": ("falls", "steady", "rises"),
    "effect": ("1", "2"),
    "mortality": ("no", "yes"),
    "vasopressor": ("no", "yes"),
}
"""Kinds of questions and, where there is a choice, their answers; a label is an index."""

WINDOW = 6
"""Steps in which a vasopressor counts, all of which must be in the record."""


class Candidates(NamedTuple):
    """Places to ask at."""

    stay: np.ndarray  # [M] row of the episodes
    step: np.ndarray  # [M]
    label: np.ndarray  # [M] index of the answer; 0 where it is free
    feature: np.ndarray  # [M] index into `ASKED`, of a trend; 0 otherwise
    donor: np.ndarray  # [M, 2] stay and step whose change makes the other state of an effect

    def take(self, index: np.ndarray) -> Candidates:
        return Candidates(*(leaf[index] for leaf in self))


@dataclass(frozen=True)
class Records:
    """Episodes in NumPy, and what of the asked features changed; [N, T, ...]."""

    episodes: Any
    value: np.ndarray  # [N, T, F] of `ASKED`
    known: np.ndarray  # [N, T, F] measured in this row and in the next
    valid: np.ndarray  # [N, T]

    @classmethod
    def of(cls, episodes: Episodes) -> Records:
        held: Any = jax.tree.map(np.asarray, episodes)
        steps = np.arange(held.dynamic.shape[1])
        valid = steps < held.length[:, None]
        after = steps < held.length[:, None] - 1
        columns = [schema.INDEX[asked.name] for asked in ASKED]
        always = np.ones((*valid.shape, 1), bool)  # urine output has no mask
        measured = np.concatenate([held.measured, always], -1)[..., columns]
        known = measured & np.roll(measured, -1, axis=1) & after[..., None]
        return cls(held, held.dynamic[..., columns], known, valid)

    def next(self, stay: Any, step: Any) -> np.ndarray:
        return self.value[stay, step + 1]


def draw_candidates(
    records: Records, kind: str, count: int, draw: np.random.Generator, *, balanced: bool
) -> Candidates:
    """Places to ask a kind of question at, in random order.

    Args:
      records: where to look.
      kind: of `OPTIONS`.
      count: at most.
      draw: of the order, and of the other states of effects.
      balanced: equally many places of each answer.

    Raises:
      InputError: there is no such place or, to be balanced, none of some answer.
    """
    cases = _FINDERS[kind](records, draw)
    _require_answers(kind, cases, balanced)
    return _drawn(cases, len(OPTIONS[kind]) if balanced else 0, count, draw)


def states_after(records: Records, here: Any, donor: Any) -> tuple[str, str]:
    """The state that followed, and the one that would have with the donor's change."""
    both = np.flatnonzero(records.known[here] & records.known[donor])
    true = records.next(*here)
    other = records.value[here] + records.next(*donor) - records.value[donor]
    return short_state(true, both), short_state(other, both)


def _cases(where: np.ndarray, label: np.ndarray | int = 0) -> Candidates:
    """All places [N, T] or [N, T, F] that are true."""
    stay, step, *rest = np.nonzero(where)
    none = np.zeros(len(stay), np.int64)
    labels = np.broadcast_to(label, where.shape)[where].astype(np.int64)
    return Candidates(stay, step, labels, rest[0] if rest else none, np.stack([none, none], -1))


def _next_states(records: Records, draw: np.random.Generator) -> Candidates:
    return _cases(records.known.sum(-1) >= 2)


def _trends(records: Records, draw: np.random.Generator) -> Candidates:
    change = np.roll(records.value, -1, axis=1) - records.value
    steady = np.array([asked.steady for asked in ASKED])
    return _cases(records.known, 1 + np.sign(change) * (np.abs(change) >= steady))


def _effects(records: Records, draw: np.random.Generator) -> Candidates:
    cases = _next_states(records, draw)
    cases = cases.take(draw.permutation(len(cases.stay)))
    action = records.episodes.vasopressor, records.episodes.fluid
    kept, donors = [], []
    for place in range(len(cases.stay)):
        here = cases.stay[place], cases.step[place]
        for other in draw.integers(len(cases.stay), size=8):
            there = cases.stay[other], cases.step[other]
            same = all(levels[here] == levels[there] for levels in action)
            if (
                here[0] != there[0]
                and not same
                and len(set(states_after(records, here, there))) == 2
            ):
                kept.append(place)
                donors.append(there)
                break
    cases = cases.take(np.array(kept, np.int64))
    label = draw.permutation(np.arange(len(kept)) % 2)
    return cases._replace(label=label, donor=np.array(donors, np.int64).reshape(-1, 2))


def _deaths(records: Records, draw: np.random.Generator) -> Candidates:
    died = records.episodes.died_in_hospital[:, None].astype(np.int64)
    return _cases(records.valid, died)


def _vasopressors(records: Records, draw: np.random.Generator) -> Candidates:
    given = (records.episodes.vasopressor > 0) & records.valid
    steps = given.shape[1]
    before = np.pad(given, ((0, 0), (1, 0)))[:, :steps]
    ahead = np.pad(given, ((0, 0), (0, WINDOW)))
    soon = np.any([ahead[:, k : k + steps] for k in range(WINDOW)], axis=0)
    whole = np.arange(steps) + WINDOW <= records.episodes.length[:, None]
    return _cases(whole & ~before, soon.astype(np.int64))


_FINDERS = {
    "next_state": _next_states,
    "trend": _trends,
    "effect": _effects,
    "mortality": _deaths,
    "vasopressor": _vasopressors,
}


def _require_answers(kind: str, cases: Candidates, balanced: bool) -> None:
    if not len(cases.stay):
        raise InputError(f"episodes: hold no question of the kind {kind}")
    missing = set(range(len(OPTIONS[kind]))) - set(cases.label.tolist())
    if balanced and missing:
        answers = ", ".join(OPTIONS[kind][label] for label in sorted(missing))
        raise InputError(
            f"episodes: hold no question of the kind {kind} with the answer {answers}; leave the "
            "kind out, or set balanced to false"
        )


def _drawn(cases: Candidates, options: int, count: int, draw: np.random.Generator) -> Candidates:
    """At most `count` cases in random order, with equally many of each answer if options > 0."""
    order = draw.permutation(len(cases.stay))
    if options > 1:
        by_label = [order[cases.label[order] == label] for label in range(options)]
        each = min(count // options, *map(len, by_label))
        order = draw.permutation(np.concatenate([part[:each] for part in by_label]))
    return cases.take(order[:count])
