"""Questions about recorded stays, sampled with the answers that the records give.

A candidate is a stay and a step. Values are asked for only where they were measured in both rows,
and a vasopressor only where the whole window was recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from policy.agent.prompts import OWN_SETS, Chart, Treatment
from policy.serving.backend import Message
from policy.serving.tokens import ChatTokens
from policy.train.data.packing import Dialogue
from policy.train.data.qa_prompts import ASKED, QAPrompts, short_state
from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.envs.base import Info, Timestep
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.observation import Observation

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
    """M steps of stays at which a question can be asked."""

    stay: np.ndarray  # [M] row of the episodes
    step: np.ndarray  # [M]
    label: np.ndarray  # [M] index of the answer; 0 where it is free
    feature: np.ndarray  # [M] index into `ASKED`, of a trend; 0 otherwise
    donor: np.ndarray  # [M, 2] stay and step whose change makes the other state of an effect

    def take(self, index: np.ndarray) -> Candidates:
        """The candidates at some indices."""
        return Candidates(*(leaf[index] for leaf in self))


@dataclass(frozen=True)
class Records:
    """Episodes as NumPy arrays [N, T, ...], with the features that are asked about."""

    episodes: Any  # `Episodes` with leaves of NumPy
    value: np.ndarray  # [N, T, F] of `ASKED`
    known: np.ndarray  # [N, T, F] measured in this row and in the next
    valid: np.ndarray  # [N, T]

    @classmethod
    def of(cls, episodes: Episodes) -> Records:
        """Records of episodes."""
        arrays: Any = jax.tree.map(np.asarray, episodes)
        steps = np.arange(arrays.dynamic.shape[1])
        valid = steps < arrays.length[:, None]
        after = steps < arrays.length[:, None] - 1
        columns = [schema.INDEX[asked.name] for asked in ASKED]
        always = np.ones((*valid.shape, 1), bool)  # urine output has no mask
        measured = np.concatenate([arrays.measured, always], -1)[..., columns]
        known = measured & np.roll(measured, -1, axis=1) & after[..., None]
        return cls(arrays, arrays.dynamic[..., columns], known, valid)

    def next(self, stay: int | np.ndarray, step: int | np.ndarray) -> np.ndarray:
        """[..., F] values one step later."""
        result: np.ndarray = self.value[stay, step + 1]
        return result


def draw_candidates(
    records: Records, kind: str, count: int, draw: np.random.Generator, *, balanced: bool
) -> Candidates:
    """Candidates for a kind of question, in random order.

    Args:
      records: where to look.
      kind: of `OPTIONS`.
      count: at most.
      draw: of the order, and of the other states of effects.
      balanced: equally many places of each answer.

    Raises:
      InputError: there is no such place or, to be balanced, none of some answer.
    """
    candidates = _FINDERS[kind](records, draw)
    _require_answers(kind, candidates, balanced)
    return _drawn(candidates, len(OPTIONS[kind]) if balanced else 0, count, draw)


def states_after(
    records: Records, here: tuple[int, int], donor: tuple[int, int]
) -> tuple[str, str]:
    """The state that followed, and the one that would have with the donor's change."""
    both = np.flatnonzero(records.known[here] & records.known[donor])
    true = records.next(*here)
    other = records.value[here] + records.next(*donor) - records.value[donor]
    return short_state(true, both), short_state(other, both)


def _candidates(where: np.ndarray, label: np.ndarray | int = 0) -> Candidates:
    """All places [N, T] or [N, T, F] that are true."""
    stay, step, *rest = np.nonzero(where)
    none = np.zeros(len(stay), np.int64)
    labels = np.broadcast_to(label, where.shape)[where].astype(np.int64)
    return Candidates(stay, step, labels, rest[0] if rest else none, np.stack([none, none], -1))


def _next_states(records: Records, draw: np.random.Generator) -> Candidates:
    return _candidates(records.known.sum(-1) >= 2)


def _trends(records: Records, draw: np.random.Generator) -> Candidates:
    change = np.roll(records.value, -1, axis=1) - records.value
    steady = np.array([asked.steady for asked in ASKED])
    return _candidates(records.known, 1 + np.sign(change) * (np.abs(change) >= steady))


def _effects(records: Records, draw: np.random.Generator) -> Candidates:
    candidates = _next_states(records, draw)
    candidates = candidates.take(draw.permutation(len(candidates.stay)))
    action = records.episodes.vasopressor, records.episodes.fluid
    kept, donors = [], []
    for place in range(len(candidates.stay)):
        here = candidates.stay[place], candidates.step[place]
        for other in draw.integers(len(candidates.stay), size=8):
            there = candidates.stay[other], candidates.step[other]
            same = all(levels[here] == levels[there] for levels in action)
            if (
                here[0] != there[0]
                and not same
                and len(set(states_after(records, here, there))) == 2
            ):
                kept.append(place)
                donors.append(there)
                break
    candidates = candidates.take(np.array(kept, np.int64))
    label = draw.permutation(np.arange(len(kept)) % 2)
    return candidates._replace(label=label, donor=np.array(donors, np.int64).reshape(-1, 2))


def _deaths(records: Records, draw: np.random.Generator) -> Candidates:
    died = records.episodes.died_in_hospital[:, None].astype(np.int64)
    return _candidates(records.valid, died)


def _vasopressors(records: Records, draw: np.random.Generator) -> Candidates:
    given = (records.episodes.vasopressor > 0) & records.valid
    steps = given.shape[1]
    before = np.pad(given, ((0, 0), (1, 0)))[:, :steps]
    ahead = np.pad(given, ((0, 0), (0, WINDOW)))
    soon = np.any([ahead[:, k : k + steps] for k in range(WINDOW)], axis=0)
    whole = np.arange(steps) + WINDOW <= records.episodes.length[:, None]
    return _candidates(whole & ~before, soon.astype(np.int64))


_FINDERS = {
    "next_state": _next_states,
    "trend": _trends,
    "effect": _effects,
    "mortality": _deaths,
    "vasopressor": _vasopressors,
}


def _require_answers(kind: str, candidates: Candidates, balanced: bool) -> None:
    if not len(candidates.stay):
        raise InputError(f"episodes: hold no question of the kind {kind}")
    missing = set(range(len(OPTIONS[kind]))) - set(candidates.label.tolist())
    if balanced and missing:
        answers = ", ".join(OPTIONS[kind][label] for label in sorted(missing))
        raise InputError(
            f"episodes: hold no question of the kind {kind} with the answer {answers}; leave the "
            "kind out, or set balanced to false"
        )


def _drawn(
    candidates: Candidates, options: int, count: int, draw: np.random.Generator
) -> Candidates:
    """At most `count` candidates in random order, balanced over the answers if options > 0."""
    order = draw.permutation(len(candidates.stay))
    if options > 1:
        by_label = [order[candidates.label[order] == label] for label in range(options)]
        each = min(count // options, *map(len, by_label))
        order = draw.permutation(np.concatenate([part[:each] for part in by_label]))
    return candidates.take(order[:count])


@dataclass(frozen=True)
class QuestionConfig:
    """Settings of questions.

    Attributes:
      kinds: of `OPTIONS`.
      count: questions per kind, at most; fewer where the records hold fewer.
      balanced: ask equally often for every answer; otherwise answers are as frequent as in
        the records, as estimates of calibration and precision need them.
      charts: how the patient is shown, a set of the agent's templates: "full" or "compact".
    """

    kinds: tuple[str, ...] = tuple(OPTIONS)
    count: int = 1000
    balanced: bool = True
    charts: str = "full"

    def __post_init__(self) -> None:
        known = ", ".join(OPTIONS)
        require(self, f"some of {known}", lambda x: x and set(x) <= set(OPTIONS), "kinds")
        require(self, "at least 1", lambda n: n >= 1, "count")
        require(self, f"one of {', '.join(OWN_SETS)}", OWN_SETS.__contains__, "charts")


@dataclass(frozen=True)
class Question:
    """A question about one patient at the beginning of a step."""

    kind: str
    messages: tuple[Message, ...]  # system and user
    answer: str
    options: tuple[str, ...]  # answers to choose from; none where the answer is free
    stay: int  # stay_id
    step: int

    @property
    def label(self) -> int:
        """The index of the answer in the options; -1 where it is free."""
        return self.options.index(self.answer) if self.options else -1


def ask(episodes: Episodes, config: QuestionConfig, *, seed: int) -> list[Question]:
    """Questions about recorded stays, kind by kind, in an order of their own.

    Args:
      episodes: the stays, of one split.
      config: settings.
      seed: equal seeds, equal questions; each kind's are independent of the other kinds.

    Raises:
      InputError: the records hold no question of some kind or, to be balanced, no example of an
        answer.
    """
    records = Records.of(episodes)
    qa_prompts = QAPrompts(config.charts, hours=schema.STEP_HOURS, window=WINDOW)
    found: list[Question] = []
    for number, kind in enumerate(OPTIONS):
        if kind in config.kinds:
            draw = np.random.default_rng([seed, number])
            candidates = draw_candidates(
                records, kind, config.count, draw, balanced=config.balanced
            )
            found += _written(kind, records, candidates, qa_prompts)
    return found


def as_dialogue(question: Question, tokens: ChatTokens) -> Dialogue:
    """A question as a training sequence: the answer and its end token are learned."""
    prompt = tokens.first(question.messages, ())
    answer_ids = [*tokens.encode(question.answer), tokens.end_id]
    own = np.arange(len(prompt) + len(answer_ids)) >= len(prompt)
    return Dialogue(np.array([*prompt, *answer_ids], np.int32), own)


def _written(
    kind: str, records: Records, candidates: Candidates, qa_prompts: QAPrompts
) -> Iterator[Question]:
    """Stay by stay, so that each chart is written once, and then in the order of the candidates."""
    found: list[Question | None] = [None] * len(candidates.stay)
    order = np.lexsort((candidates.step, candidates.stay))
    for stay, places in groupby(order, key=lambda place: int(candidates.stay[place])):
        chart, step = Chart.of(_timestep(records.episodes, stay, 0)), 0
        for place in places:
            while step < candidates.step[place]:
                action = schema.action_index(
                    records.episodes.vasopressor[stay, step], records.episodes.fluid[stay, step]
                )
                step += 1
                chart.add(int(action), _timestep(records.episodes, stay, step))
            found[place] = _one(kind, records, candidates.take(place), chart, qa_prompts)
    return (question for question in found if question is not None)


def _one(
    kind: str, records: Records, candidate: Candidates, chart: Chart, qa_prompts: QAPrompts
) -> Question:
    here = int(candidate.stay), int(candidate.step)
    episodes, options = records.episodes, OPTIONS[kind]
    context: dict[str, object] = {}
    answer = options[int(candidate.label)] if options else ""
    if kind in ("next_state", "trend", "effect"):
        context["given"] = Treatment(int(episodes.vasopressor[here]), int(episodes.fluid[here]))
    if kind == "next_state":
        known = np.flatnonzero(records.known[here])
        context["features"] = [ASKED[i] for i in known]
        answer = short_state(records.next(*here), known)
    if kind == "trend":
        context["feature"] = ASKED[int(candidate.feature)]
    if kind == "effect":
        states = states_after(records, here, tuple(candidate.donor))
        context["states"] = states[::-1] if candidate.label else states
    messages = qa_prompts.messages(kind, chart, options=options, **context)
    return Question(kind, messages, answer, options, int(episodes.stay_id[here[0]]), here[1])


def _timestep(episodes: Any, stay: int, step: int) -> Timestep:
    """A recorded row as an environment shows it; `observation_at` in NumPy."""
    row = stay, step
    before = (stay, step - 1)
    nothing = cast("jax.Array", np.int32(0))
    over = cast("jax.Array", np.bool_(False))
    info = cast("Info", None)
    observation = Observation(
        dynamic=episodes.dynamic[row],
        measured=episodes.measured[row],
        static=episodes.static[stay],
        ventilated=episodes.ventilated[row],
        sofa=episodes.sofa[row],
        urine_24h=episodes.urine_24h[row],
        vasopressor=episodes.vasopressor[before] if step else nothing,
        fluid=episodes.fluid[before] if step else nothing,
        step=nothing + step,
    )
    return Timestep(observation, nothing, over, over, info)
