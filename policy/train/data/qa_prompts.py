"""Questions about patients with answers from their records, worded by Jinja2 templates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from policy.agent.prompts import OWN_SETS, Chart, Treatment
from policy.serving.backend import Message
from policy.serving.tokens import ChatTokens
from policy.train.data.packing import Dialogue
from policy.train.data.qa_sampling import (
    OPTIONS,
    WINDOW,
    Candidates,
    Records,
    draw_candidates,
    states_after,
)
from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.envs.base import Timestep
from worldmodel.episodes import Episodes
from worldmodel.observation import Observation


@dataclass(frozen=True)
class QuestionConfig:
    """Which questions to ask.

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
      InputError: the records hold no question of some kind or, to be balanced, no case of an
        answer.
    """
    records = Records.of(episodes)
    qa_prompts = QAPrompts(config.charts, hours=schema.STEP_HOURS, window=WINDOW)
    found: list[Question] = []
    for number, kind in enumerate(OPTIONS):
        if kind in config.kinds:
            draw = np.random.default_rng([seed, number])
            cases = draw_candidates(records, kind, config.count, draw, balanced=config.balanced)
            found += _worded(kind, records, cases, qa_prompts)
    return found


def as_dialogue(question: Question, tokens: ChatTokens) -> Dialogue:
    """A question as a training sequence: the answer and its end token are learned."""
    told = tokens.first(question.messages, ())
    said = [*tokens.encode(question.answer), tokens.end_id]
    own = np.arange(len(told) + len(said)) >= len(told)
    return Dialogue(np.array([*told, *said], np.int32), own)


def _worded(
    kind: str, records: Records, cases: Candidates, qa_prompts: QAPrompts
) -> Iterator[Question]:
    """Stay by stay, so that each chart is written once, and then in the order of the cases."""
    found: list[Question | None] = [None] * len(cases.stay)
    order = np.lexsort((cases.step, cases.stay))
    for stay, places in groupby(order, key=lambda place: int(cases.stay[place])):
        chart, step = Chart.of(_timestep(records.episodes, stay, 0)), 0
        for place in places:
            while step < cases.step[place]:
                action = schema.action_index(
                    records.episodes.vasopressor[stay, step], records.episodes.fluid[stay, step]
                )
                step += 1
                chart.add(int(action), _timestep(records.episodes, stay, step))
            found[place] = _one(kind, records, cases.take(place), chart, qa_prompts)
    return (question for question in found if question is not None)


def _one(
    kind: str, records: Records, case: Candidates, chart: Chart, qa_prompts: QAPrompts
) -> Question:
    here = int(case.stay), int(case.step)
    episodes, options = records.episodes, OPTIONS[kind]
    context: dict[str, Any] = {}
    answer = options[int(case.label)] if options else ""
    if kind in ("next_state", "trend", "effect"):
        context["given"] = Treatment(int(episodes.vasopressor[here]), int(episodes.fluid[here]))
    if kind == "next_state":
        known = np.flatnonzero(records.known[here])
        context["features"] = [ASKED[i] for i in known]
        answer = short_state(records.next(*here), known)
    if kind == "trend":
        context["feature"] = ASKED[int(case.feature)]
    if kind == "effect":
        states = states_after(records, here, tuple(case.donor))
        context["states"] = states[::-1] if case.label else states
    messages = qa_prompts.messages(kind, chart, options=options, **context)
    return Question(kind, messages, answer, options, int(episodes.stay_id[here[0]]), here[1])


def _timestep(episodes: Any, stay: int, step: int) -> Timestep:
    """A recorded row as an environment shows it; `observation_at` in NumPy."""
    row = stay, step
    before = (stay, step - 1)
    nothing: Any = np.int32(0)
    over: Any = np.bool_(False)
    info: Any = None
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


class Asked(NamedTuple):
    """A feature that is asked for."""

    name: str
    short: str
    steady: float  # a smaller change is none, in the feature's unit

    @property
    def unit(self) -> str:
        return schema.FEATURES[schema.INDEX[self.name]].unit


ASKED: tuple[Asked, ...] = (
    Asked("meanbp", "MAP", 5),
    Asked("heart_rate", "HR", 5),
    Asked("spo2", "SpO2", 2),
    Asked("lactate", "lactate", 0.3),
    Asked("creatinine", "creatinine", 0.2),
    Asked("ph", "pH", 0.03),
    Asked("output_4hourly", "urine", 60),
)
"""What charts show in both sets; changes as large as measurement and rounding make are steady."""

_COLUMNS = [schema.INDEX[asked.name] for asked in ASKED]
_DECIMALS = [schema.FEATURES[i].decimals for i in _COLUMNS]


class QAPrompts:
    """Messages of questions.

    Args:
      charts: a set of the agent's templates, whose `chart` shows the patient.
      hours: per step.
      window: steps in which a vasopressor counts.
    """

    def __init__(self, charts: str, *, hours: float, window: int):
        self._environment = Environment(
            loader=ChoiceLoader(
                [
                    PackageLoader("policy.train", "templates"),
                    PackageLoader("policy.agent", f"templates/{charts}"),
                ]
            ),
            undefined=StrictUndefined,
            autoescape=False,
        )
        self._environment.globals.update(
            hours=f"{hours:g}", window=f"{window * hours:g}", levels=schema.LEVEL_NAMES
        )
        self._system = self._render("system")

    def messages(self, kind: str, chart: Chart, **context: Any) -> tuple[dict[str, str], ...]:
        """The system's and the user's message; context as the kind's template wants it."""
        return (
            {"role": "system", "content": self._system},
            {"role": "user", "content": self._render(kind, chart=chart, **context)},
        )

    def _render(self, name: str, **context: Any) -> str:
        return self._environment.get_template(f"{name}.md.j2").render(**context).strip()


def short_state(values: np.ndarray, which: np.ndarray) -> str:
    """Values [F] of `ASKED`, of those at the indices `which`, within their physiologic ranges."""
    inside = np.clip(values, schema.LOW[_COLUMNS], schema.HIGH[_COLUMNS])
    return " ".join(f"{ASKED[i].short} {inside[i]:.{_DECIMALS[i]}f}" for i in which)
