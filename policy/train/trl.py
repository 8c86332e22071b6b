"""The agent's dialogue as environments of TRL's trainers (`environment_factory`).

    environments = ToolEnvironments(runner)
    trainer = GRPOTrainer(
        model, environment_factory=environments,
        train_dataset=Dataset.from_list(environments.rows(range(64))), args=GRPOConfig(...),
    )

A trainer samples the replies, calls the tools and computes advantages; the environment has the
patient, the texts, the rules and the reward of `policy.agent.dialogue`, and neither imports the
other. TRL calls tools one after another; `policy.agent.speculative_pool` makes one jitted call of
those of a whole batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from operator import itemgetter

import jax

from policy.agent.dialogue import FailedStayError, Stay, StaySession
from policy.agent.env_pool import EnvBatch
from policy.agent.speculative_pool import SpeculativePool
from policy.agent.tools import (
    PRESCRIPTION,
    SIMULATION,
    InvalidCallError,
    Prescribe,
    Simulate,
)
from policy.serving.backend import ToolCall
from policy.train.episodes import EpisodeRunner
from policy.train.rl.advantages import AdvantageConfig, rewards
from worldmodel.envs.base import Timestep
from worldmodel.errors import InputError

_BLOCK = 8  # patients that are reset together, the rows of the smallest program
_BLOCKS = 64  # kept


class PrescriptionEnvironment:
    """One patient at a time, without a simulator; made by `ToolEnvironments`.

    Public methods are what TRL expects: it offers them to the model as tools, but for `reset` and
    `get_reward`.

    Args:
      environments: with the pool and the settings.
      slot: of the pool.
    """

    def __init__(self, environments: ToolEnvironments, slot: int):
        self._environments, self._slot = environments, slot
        self._session: StaySession | None = None

    def reset(self, *, patient: int | None = None, **_: object) -> str:
        """Starts the stay of a patient.

        Args:
          patient: number; stays of the same number have the same random numbers.

        Returns:
          The first chart, to be appended to the prompt.

        Raises:
          InputError: no number is given.
        """
        if patient is None:
            raise InputError("patient: none; give a data set of `ToolEnvironments.rows`")
        self._session = self._environments.start(self._slot, int(patient))
        return "\n\n".join(message["content"] for message in self._session.first())

    def prescription(self, vasopressor: int, iv_fluid: int) -> str:
        """Gives a treatment for the next four hours.

        Args:
            vasopressor: Vasopressor level, 0 to 4.
            iv_fluid: Intravenous fluid level, 0 to 4.

        Returns:
            The chart after the treatment, or how the stay ended.
        """
        return self._call(PRESCRIPTION, {"vasopressor": vasopressor, "iv_fluid": iv_fluid})

    def get_reward(self) -> float:
        """The return of the stay with its penalties, as in `policy.train.rl`.

        A stay that the model has left before its end has failed.
        """
        return float(rewards(self.stay, self._environments.penalties).sum())

    @property
    def stay(self) -> Stay:
        """The stay so far, without its turns, which the trainer knows."""
        return self._started.stay

    @property
    def _started(self) -> StaySession:
        if self._session is None:
            raise InputError("reset: call it before a tool")
        return self._session

    def _call(self, name: str, arguments: dict[str, object]) -> str:
        session, pool = self._started, self._environments.pool
        if session.stay.failure is not None:
            raise InvalidCallError("stay_over")
        try:
            asked = session.read(ToolCall("", name, json.dumps(arguments)))
        except InvalidCallError as error:
            self._refuse(error.reason)
            raise  # TRL answers with the message, and counts it
        if isinstance(asked, Simulate):
            return session.simulated(asked, pool.simulate(self._slot, asked.actions))
        assert isinstance(asked, Prescribe)
        return session.prescribed(asked, asked.action, pool.prescribe(self._slot, asked.action))

    def _refuse(self, reason: str) -> None:
        session = self._started
        if session.done:  # the model goes on talking after the end, which changes nothing
            return
        try:
            session.refuse(reason)
        except FailedStayError as failure:
            session.stay.failure, session.stay.detail = failure.reason, str(failure)


class TreatmentEnvironment(PrescriptionEnvironment):
    """One patient at a time, with a simulator; made by `ToolEnvironments`."""

    def simulation(self, actions: list[str]) -> str:
        """Predicts the patient's state four hours ahead under up to 3 treatments.

        Args:
            actions: Treatments as "[vasopressor level, fluid level]", such as "[1, 2]".

        Returns:
            The state that the world model expects under each of them.
        """
        return self._call(SIMULATION, {"actions": actions})


class ToolEnvironments:
    """Makes environments that share one pool; the `environment_factory` of a TRL trainer.

    Args:
      runner: environment, world model, texts and limits, as for our own trainer.
      penalties: rewards of refused calls, failed stays and broken rules; the kind of advantages is
        TRL's.
    """

    def __init__(self, runner: EpisodeRunner, penalties: AdvantageConfig | None = None):
        self.pool = SpeculativePool(runner.env, runner.forecaster, capacity=runner.concurrency)
        self.penalties = penalties or AdvantageConfig()
        self._runner, self._made = runner, 0
        self._block = lru_cache(_BLOCKS)(self._reset_block)

    def __call__(self) -> PrescriptionEnvironment:
        """A further environment."""
        kind = TreatmentEnvironment if self.pool.can_simulate else PrescriptionEnvironment
        self._made += 1
        return kind(self, self._made - 1)

    def rows(self, patients: Iterable[int]) -> list[dict[str, object]]:
        """Rows of a data set for TRL, one per patient, whose prompts `reset` fills."""
        prompt = [{"role": "user", "content": ""}]
        return [{"prompt": prompt, "patient": int(patient)} for patient in patients]

    def start(self, slot: int, patient: int) -> StaySession:
        """Puts a patient into a slot of the pool, and begins the stay."""
        block, row = divmod(patient, _BLOCK)
        batch, first = self._block(block)
        self.pool.reset(slot, batch, row)
        return StaySession(
            patient,
            jax.tree.map(itemgetter(row), first),
            self._runner.prompts,
            self._runner.dialogue,
            can_simulate=self.pool.can_simulate,
        )

    def _reset_block(self, block: int) -> tuple[EnvBatch, Timestep]:
        """Patients, and their first time steps on the host."""
        batch = self._runner.reset_batch(range(_BLOCK * block, _BLOCK * (block + 1)))
        return batch, jax.device_get(batch.states.last)
