"""Dialogues in which a language model treats patients: propose, simulate, refine, prescribe.

Only an unambiguous call of the model prescribes. Every other reply is answered with an error, a
bounded number of times per decision; after that the stay has failed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from policy.agent.env_pool import EnvPool
from policy.agent.forecast import Forecast
from policy.agent.prompts import Chart, Prompts, options
from policy.agent.tools import (
    REASONS,
    ActionScorer,
    InvalidCallError,
    Prescribe,
    Simulate,
    read_call,
)
from policy.serving.backend import (
    LENGTH,
    Backend,
    BackendError,
    ContextError,
    Conversation,
    Message,
    Reply,
    Sampling,
    ToolCall,
)
from worldmodel.configuration import require
from worldmodel.envs.base import Timestep

COMPLETED, FAILED = "completed", "failed"
RELEASE, DEATH, CUT_OFF = "release", "death", "cut off"
TOO_MANY_INVALID, TOO_LONG, NO_BACKEND = "too_many_invalid", "too_long", "backend"
STAY, DECISION = MEMORIES = ("stay", "decision")

_OUTCOMES = {
    RELEASE: "the patient was released",
    DEATH: "the patient died",
    CUT_OFF: "observation ended",
}


@dataclass(frozen=True)
class DialogueConfig:
    """Limits of a dialogue.

    Attributes:
      max_simulations: simulation calls answered per decision.
      max_invalid: invalid calls and replies per decision; one more fails the stay.
      memory: "stay": one conversation from admission to the end; "decision": every decision
        begins a new one with the current chart, which keeps contexts short.
      sampling: temperature, top-p and length of replies.
    """

    max_simulations: int = 10
    max_invalid: int = 10
    memory: str = STAY
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        require(self, "0 or more", lambda n: n >= 0, "max_simulations", "max_invalid")
        require(self, f"one of {MEMORIES}", lambda name: name in MEMORIES, "memory")


@dataclass(frozen=True)
class Turn:
    """Messages to the model, and its reply."""

    messages: tuple[Message, ...]
    reply: Reply
    seed: int
    opens: bool = False  # true at the first turn of a conversation
    refused: bool = False  # true where the reply, or a call in it, was answered with an error


@dataclass(frozen=True)
class Decision:
    """A treatment with the state before it and its reward."""

    step: int  # row since admission
    action: int  # joint action 0-24
    reward: float
    sofa: float  # points, before
    meanbp: float  # mmHg, before
    lactate: float  # mmol/L, before
    pao2: float  # mmHg, before
    fio2: float  # percent, before
    previous_vasopressor: int
    simulations: int  # calls answered
    invalid: int  # calls and replies refused
    probabilities: tuple[float, ...] | None = None  # [25] of all prescriptions, if requested
    values: tuple[float, ...] | None = None  # [25] of the pool's state scorer, if it has one
    turn: int = 0  # index of the turn that prescribed


@dataclass
class Stay:
    """A stay from admission to its end or failure."""

    patient: int
    status: str = FAILED  # COMPLETED or FAILED
    failure: str | None = None  # TOO_MANY_INVALID, TOO_LONG or NO_BACKEND
    detail: str | None = None  # of the failure
    outcome: str | None = None  # RELEASE, DEATH or CUT_OFF; None of a failed stay
    mortality: float | None = None  # probability; 0 or 1 where it is a fact
    decisions: list[Decision] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    closing: str = ""  # the answer to the last prescription
    invalid: Counter[str] = field(default_factory=Counter)  # by reason
    tool_calls: int = 0  # number of valid calls
    can_simulate: bool = True  # whether there was a simulator

    @property
    def total_reward(self) -> float:
        """Undiscounted sum of rewards."""
        return sum(decision.reward for decision in self.decisions)


async def treat(
    slot: int,
    patient: int,
    backend: Backend,
    pool: EnvPool,
    prompts: Prompts,
    config: DialogueConfig,
    *,
    seed: int,
    scorer: ActionScorer | None = None,
) -> Stay:
    """Lets a language model treat a patient of a pool until the stay ends or fails.

    Args:
      slot: of the patient in the pool.
      patient: identifier, for the record and the seeds.
      backend: the model.
      pool: environments.
      prompts: texts of the dialogue.
      config: limits.
      seed: of the attempt; the seed of a reply depends on it, the patient and the turn.
      scorer: of the backend, to note the probabilities of all 25 prescriptions at each decision.
    """
    return await _Dialogue(slot, patient, backend, pool, prompts, config, seed, scorer).run()


class FailedStayError(Exception):
    """Raised when a stay has failed and can take no more calls.

    Attributes:
      reason: TOO_MANY_INVALID.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class StaySession:
    """The rules of one stay: what calls of the model do, what they are answered, what is refused.

    It knows neither the model nor the pool: between `read` and `simulated` or `prescribed` the
    caller asks the pool, and waits for it or not.

    Args:
      patient: identifier.
      first: the first time step.
      prompts: texts of the dialogue.
      config: limits.
      can_simulate: whether there is a simulator.
    """

    def __init__(
        self,
        patient: int,
        first: Timestep,
        prompts: Prompts,
        config: DialogueConfig,
        *,
        can_simulate: bool,
    ):
        self.stay = Stay(patient, can_simulate=can_simulate)
        self.chart = Chart.of(first)
        self.done = False
        self._prompts, self._config = prompts, config
        self._simulations = self._invalid = 0  # at this decision

    def first(self) -> list[dict[str, str]]:
        """The messages that begin a conversation."""
        return self._prompts.first(self.chart, can_simulate=self.stay.can_simulate)

    def read(self, call: ToolCall, *, alone: bool = True) -> Simulate | Prescribe:
        """What a call asks for, counted as a simulation where it is one.

        Args:
          call: of the model.
          alone: whether it is the only one of its reply.

        Raises:
          InvalidCallError: it is to be refused.
        """
        if self.done:
            raise InvalidCallError("stay_over")
        asked = read_call(call)
        if isinstance(asked, Prescribe):
            if not alone:
                raise InvalidCallError("not_alone")
            return asked
        if not self.stay.can_simulate:
            raise InvalidCallError("unknown_tool")
        if self._simulations >= self._config.max_simulations:
            raise InvalidCallError("too_many_simulations")
        self._simulations += 1
        return asked

    def simulated(self, asked: Simulate, forecast: Forecast) -> str:
        """The answer of a simulation."""
        self.stay.tool_calls += 1
        return self._prompts.simulation(options(asked.actions, forecast))

    def prescribed(
        self,
        asked: Prescribe,
        given: int,
        after: Timestep,
        *,
        probabilities: tuple[float, ...] | None = None,
        values: tuple[float, ...] | None = None,
    ) -> str:
        """Notes a prescription; returns its answer.

        Args:
          asked: what was prescribed.
          given: the joint action that was given.
          after: the time step that followed.
          probabilities, values: as in `Decision`.
        """
        stay, chart = self.stay, self.chart
        stay.tool_calls += 1
        stay.decisions.append(
            Decision(
                step=chart.step,
                action=asked.action,
                reward=float(after.reward),
                sofa=chart.sofa[-1],
                **{name: chart.number(name) for name in ("meanbp", "lactate", "pao2", "fio2")},
                previous_vasopressor=chart.given.vasopressor,
                simulations=self._simulations,
                invalid=self._invalid,
                probabilities=probabilities,
                values=values,
                turn=len(stay.turns) - 1,
            )
        )
        self._simulations = self._invalid = 0
        chart.add(given, after)
        self.done = bool(after.done)
        outcome = ""
        if self.done:
            stay.status = COMPLETED
            stay.outcome, stay.mortality = _outcome(after)
            outcome = _OUTCOMES[stay.outcome]
        answer = self._prompts.prescription(chart, done=self.done, outcome=outcome)
        if self.done:
            stay.closing = answer
        return answer

    def refuse(self, reason: str) -> str:
        """Counts what is refused; returns the answer.

        Raises:
          FailedStayError: it was one too many.
        """
        self.stay.invalid[reason] += 1
        self._invalid += 1
        if self._invalid > self._config.max_invalid:
            raise FailedStayError(
                TOO_MANY_INVALID, f"{self._invalid} invalid calls at t = {self.chart.step}"
            )
        return self._prompts.error(REASONS[reason])


class _Dialogue:
    def __init__(
        self,
        slot: int,
        patient: int,
        backend: Backend,
        pool: EnvPool,
        prompts: Prompts,
        config: DialogueConfig,
        seed: int,
        scorer: ActionScorer | None,
    ):
        self.slot, self.backend, self.pool, self.prompts = slot, backend, pool, prompts
        self.config, self.seed, self.scorer = config, seed, scorer
        self.session = StaySession(
            patient, pool.initial(slot), prompts, config, can_simulate=pool.can_simulate
        )
        self.stay = self.session.stay
        self.conversation: Conversation
        self.opens = True

    async def run(self) -> Stay:
        messages: Sequence[Message] = []
        try:
            while not self.session.done:
                if self.opens:
                    messages = self._open()
                reply = await self._ask(messages)
                messages = await self._answer(reply)
        except BackendError as error:
            too_long = isinstance(error, ContextError)
            self.stay.failure = TOO_LONG if too_long else NO_BACKEND
            self.stay.detail = str(error)
        except FailedStayError as failure:
            self.stay.failure, self.stay.detail = failure.reason, str(failure)
        return self.stay

    def _open(self) -> Sequence[Message]:
        """Opens a conversation and returns its first messages."""
        self.conversation = self.backend.open(self.prompts.tools(self.pool.can_simulate))
        return self.session.first()

    async def _ask(self, messages: Sequence[Message]) -> Reply:
        turn = f"{self.seed}:{self.stay.patient}:{len(self.stay.turns)}"
        seed = int.from_bytes(hashlib.sha256(turn.encode()).digest()[:4], "big") >> 1
        reply = await self.conversation.ask(messages, sampling=self.config.sampling, seed=seed)
        self.stay.turns.append(Turn(tuple(messages), reply, seed, self.opens))
        self.opens = False
        return reply

    async def _answer(self, reply: Reply) -> Sequence[Message]:
        """Messages that answer a reply."""
        if not reply.tool_calls:
            reason = "truncated" if reply.finish_reason == LENGTH else "no_call"
            return [{"role": "user", "content": self._refuse(reason)}]
        try:
            async with asyncio.TaskGroup() as group:  # one that fails cancels the others
                asked = [
                    group.create_task(self._answer_call(call, reply)) for call in reply.tool_calls
                ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": task.result()}
            for call, task in zip(reply.tool_calls, asked, strict=True)
        ]

    async def _answer_call(self, call: ToolCall, reply: Reply) -> str:
        if reply.finish_reason == LENGTH:
            return self._refuse("truncated")
        try:
            asked = self.session.read(call, alone=len(reply.tool_calls) == 1)
        except InvalidCallError as error:
            return self._refuse(error.reason)
        if isinstance(asked, Simulate):
            forecast = await self.pool.simulate(self.slot, asked.actions)
            return self.session.simulated(asked, forecast)
        return await self._prescribe(asked, reply)

    async def _prescribe(self, asked: Prescribe, reply: Reply) -> str:
        probabilities = None
        if self.scorer is not None and reply.prompt_ids is not None:
            probabilities = tuple((await self.scorer(reply.prompt_ids)).tolist())
        values = self.pool.values(self.slot)
        given = self.pool.given(self.slot, asked.action)
        after = await self.pool.prescribe(self.slot, asked.action)
        self.opens = self.config.memory == DECISION
        return self.session.prescribed(
            asked, given, after, probabilities=probabilities, values=values
        )

    def _refuse(self, reason: str) -> str:
        self.stay.turns[-1] = replace(self.stay.turns[-1], refused=True)
        return self.session.refuse(reason)


def _outcome(after: Timestep) -> tuple[str, float | None]:
    if not after.terminated:
        return CUT_OFF, None
    mortality = float(after.info.mortality)
    return (DEATH if mortality > 0.5 else RELEASE), mortality


async def treat_all(
    patients: Sequence[int],
    backend: Backend,
    pool: EnvPool,
    prompts: Prompts,
    config: DialogueConfig,
    *,
    seeds: Sequence[int],
    concurrency: int,
    finished: Callable[[Stay], None] | None = None,
    scorer: ActionScorer | None = None,
) -> list[Stay]:
    """Treats every patient of a pool.

    Args:
      patients: [N] identities, in the order of the pool's slots.
      backend, pool, prompts, config: as for `treat`.
      seeds: [N] as for `treat`.
      concurrency: stays in treatment at the same time.
      scorer: as for `treat`.
      finished: called with each stay as it ends, in the order they end.

    Returns:
      The stays in the order of `patients`.
    """
    waiting = iter(enumerate(patients))
    stays: dict[int, Stay] = {}

    async def worker() -> None:
        for slot, patient in waiting:
            stay = await treat(
                slot, patient, backend, pool, prompts, config, seed=seeds[slot], scorer=scorer
            )
            stays[slot] = stay
            if finished is not None:
                finished(stay)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(patients))):
            group.create_task(worker())
    return [stays[slot] for slot in range(len(patients))]
