"""Agentic reinforcement learning: the model treats simulated patients and learns from the rewards.

One iteration samples a batch of stays with one version of the weights and makes a few updates on
their tokens. With a staleness of S, batch k is sampled with the weights after batch k - S - 1,
while the learner works on the batches between. Which version sampled a token therefore does
not depend on the relative speed of generator and learner.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import ClassVar

import jax
import numpy as np
from jax.typing import DTypeLike

from policy.agent.dialogue import NO_BACKEND, Stay
from policy.agent.env_pool import StateScorer
from policy.agent.records import from_record, to_record
from policy.agent.tools import DecisionTokens
from policy.qwen3.model import Qwen3
from policy.serving.backend import Backend, Lockstep
from policy.train.data.packing import Judged, judged_by_turn
from policy.train.episodes import EpisodeRunner
from policy.train.loop.checkpoints import Checkpoints
from policy.train.loop.distributed import gathered, whole
from policy.train.loop.learner import Learner
from policy.train.loop.optimizer import Loss, Params
from policy.train.losses import PRESETS, Objective, policy_loss
from policy.train.rl.advantages import (
    COUNTERFACTUAL,
    EPISODE,
    STEP,
    AdvantageConfig,
    assign_advantages,
    of_all_actions,
)
from policy.train.rl.minibatch_update import MinibatchUpdate, trajectories
from policy.train.rl.publishers import Publisher
from worldmodel.configuration import require
from worldmodel.errors import InputError

SAMPLED, ALL = DECISION_LOSSES = ("sampled", "all")


@dataclass(frozen=True)
class AgenticConfig:
    """Settings of agentic reinforcement learning.

    Attributes:
      iterations: number of batches of stays.
      patients: per batch.
      num_generations: stays of each patient in a batch; advantages that compare the stays of a
        patient need at least 2.
      num_minibatches: parts of a batch; the weights are updated once per part.
      row_length: tokens per row; longer conversations are left out and counted.
      micro_batch_size: rows per micro-batch.
      staleness: number of versions that the generator may be behind the learner.
      remat: as for `qwen3.logprobs.token_logprobs`.
      advantages: kind of advantages, and penalties.
      objective: the loss.
      decision_loss: how the two tokens of a prescription that decide are learned. "sampled": like
        all others, from the advantage of the action that was drawn. "all": from the advantages of
        all 25 actions, towards the present probabilities times exp(advantage /
        decision_temperature) (mirror descent, as MPO, 1806.06920), and the other tokens towards
        replies that are accepted; counterfactual advantages alone.
      decision_temperature: in units of reward; the smaller, the larger the step.
      decision_prior_weight: exponent of the present probabilities in that, within [0, 1]; 0 learns
        softmax(advantage / decision_temperature) on the model's own states (AggreVaTe, 1406.5979).
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "replicas": "num_generations",
        "updates": "num_minibatches",
        "rows": "micro_batch_size",
        "credit": "advantages",
    }

    iterations: int = 50
    patients: int = 64
    num_generations: int = 1
    num_minibatches: int = 2
    row_length: int = 4096
    micro_batch_size: int = 8
    staleness: int = 0
    remat: str = "none"
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: Objective = PRESETS["DAPO"]
    decision_loss: str = SAMPLED
    decision_temperature: float = 1.0
    decision_prior_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self, f"one of {', '.join(DECISION_LOSSES)}", DECISION_LOSSES.__contains__,
                "decision_loss")  # fmt: skip
        require(self, "above 0", lambda x: x > 0, "decision_temperature")
        require(self, "within [0, 1]", lambda x: 0 <= x <= 1, "decision_prior_weight")
        if self.decision_loss == ALL and self.advantages.kind != COUNTERFACTUAL:
            raise InputError(
                f"decision_loss: got {ALL}, but advantages of kind {self.advantages.kind!r} are "
                f"of the drawn actions alone; choose {SAMPLED}, or kind {COUNTERFACTUAL}"
            )
        counts = (
            "iterations",
            "patients",
            "num_generations",
            "num_minibatches",
            "row_length",
            "micro_batch_size",
        )
        require(self, "at least 1", lambda n: n >= 1, *counts)
        require(self, "0 or more", lambda n: n >= 0, "staleness")
        if self.advantages.kind in (EPISODE, STEP) and self.num_generations < 2:
            raise InputError(
                f"num_generations: got {self.num_generations}, but {self.advantages.kind!r} "
                "advantages compare stays of the same patient; expected at least 2"
            )


def agentic_loss(
    config: AgenticConfig, temperature: float, decisions: DecisionTokens | None = None
) -> Loss:
    """The loss that the learner of an `AgenticTrainer` has to be made with."""
    levels = () if decisions is None else decisions.levels
    return _policy_loss(config.objective, temperature, levels, config.remat)


@lru_cache(maxsize=8)
def _policy_loss(
    objective: Objective, temperature: float, levels: tuple[int, ...], remat: str
) -> Loss:
    """The same function for equal settings, so that learners need not compile it again."""
    return partial(
        policy_loss, objective=objective, temperature=temperature, levels=levels, remat=remat
    )


class AgenticTrainer:
    """Samples stays, computes advantages and updates the weights, asynchronously.

    Args:
      learner: made with `agentic_loss`; makes at most `config.num_minibatches` updates
        per iteration.
      runner: runs the episodes; `top_p` must be 1, since the trainer computes log-probabilities of
        the whole distribution.
      backend: the language model that the runner asks.
      publisher: sends new weights to the generator.
      config: settings.
      reference: model of the KL term; needed if beta is not 0.
      state_scorer: computes the action values of counterfactual advantages.
      decisions: of the model's tokens; needed for the decision loss of all actions.
      lockstep: as for `EpisodeRunner.treat`; makes runs with the embedded generator reproducible.
      dtype: of published weights.

    Raises:
      InputError: `top_p` is not 1, or a reference or a state scorer is missing.
    """

    def __init__(
        self,
        learner: Learner,
        runner: EpisodeRunner,
        backend: Backend,
        publisher: Publisher,
        config: AgenticConfig,
        *,
        reference: Qwen3 | None = None,
        state_scorer: StateScorer | None = None,
        decisions: DecisionTokens | None = None,
        lockstep: Lockstep | None = None,
        dtype: DTypeLike = "float32",
    ):
        sampling = runner.dialogue.sampling
        if sampling.top_p != 1.0 or sampling.temperature <= 0:
            raise InputError(
                f"sampling: got top_p {sampling.top_p} and temperature {sampling.temperature}; "
                "reinforcement learning needs top_p 1 and a temperature above 0"
            )
        if config.decision_loss == ALL and decisions is None:
            raise InputError("decision_loss: all needs the model's decision tokens")
        if config.objective.beta and reference is None:
            raise InputError("objective: beta needs a reference model")
        self.learner, self.runner, self.config = learner, runner, config
        self._backend, self._publisher, self._lockstep = backend, publisher, lockstep
        self._state_scorer, self._dtype = state_scorer, dtype
        self._decisions = decisions if config.decision_loss == ALL else None
        self._updates = MinibatchUpdate(
            learner,
            num_minibatches=config.num_minibatches,
            row_length=config.row_length,
            micro_batch_size=config.micro_batch_size,
            temperature=sampling.temperature,
            reference=reference if config.objective.beta else None,
            decisions=self._decisions,
            decision_temperature=config.decision_temperature,
            decision_prior_weight=config.decision_prior_weight,
        )
        self.iteration = 0  # number of batches learned from
        self.timing: dict[str, float] = {}  # seconds of the last batch, beside its figures
        self._newest = 0  # version that the learner holds, once its batch is reported
        # Trained parameters by version, where the learner's are newer. While batch k is learned
        # from, those of versions k + 1 - staleness to k are needed, none without staleness.
        self._older: dict[int, Params] = {}
        several = jax.process_count() > 1
        if several and config.staleness > 1:
            raise InputError(
                f"staleness: got {config.staleness}, but weights are gathered from all processes "
                "between two updates; expected 0 or 1"
            )
        if several and config.patients % jax.process_count():
            raise InputError(
                f"patients: {config.patients} per iteration are no multiple of the "
                f"{jax.process_count()} processes"
            )
        self._frozen = whole(learner.frozen) if several else learner.frozen

    async def run(
        self,
        report: Callable[[int, dict[str, float], Sequence[Stay]], Awaitable[None]],
        *,
        checkpoints: Checkpoints | None = None,
        save_steps: int = 1,
    ) -> None:
        """Iterates up to `config.iterations`.

        Args:
          report: awaited after each iteration with its number from 1 on, figures, and the stays;
            the generator still has the weights that sampled these stays, or older ones.
          checkpoints: written every `save_steps` iterations and at the end.

        Raises:
          InputError: the loss is not finite, the model server failed, or a checkpoint cannot be
            written; the last checkpoint is good.
        """
        sampled: asyncio.Queue[tuple[int, list[Stay], float]] = asyncio.Queue()
        changed = asyncio.Condition()
        config = self.config

        async def publish(version: int) -> None:
            async with changed:
                await changed.wait_for(partial(self._has, version))
                model = self._to_publish(version)
                changed.notify_all()
            await self._publisher.publish(model, str(version))

        async def sample() -> None:
            published = None
            for number in range(self.iteration, config.iterations):
                version = max(number - config.staleness, 0)
                if version != published:
                    await publish(version)
                    published = version
                began = time.perf_counter()
                stays = await self._sample(number)
                await sampled.put((version, stays, time.perf_counter() - began))

        async def learn() -> None:
            for number in range(self.iteration, config.iterations):
                version, stays, seconds = await sampled.get()
                async with changed:  # an update gives the learner's weights away
                    await changed.wait_for(partial(self._may_update, number))
                began = time.perf_counter()
                stays, figures = await asyncio.to_thread(self._learn, number, stays)
                drawn = sum(len(turn.reply.token_ids or ()) for s in stays for turn in s.turns)
                self.timing = {
                    "sample_seconds": seconds,
                    "sampled_per_s": drawn / seconds,
                    "learn_seconds": time.perf_counter() - began,
                }
                figures["staleness"] = float(number - version)
                self.iteration = number + 1
                await report(self.iteration, figures, stays)
                async with changed:
                    self._newest = self.iteration
                    due = self.iteration % save_steps == 0 or self.iteration == config.iterations
                    if checkpoints is not None and due:
                        self.save(checkpoints)
                    changed.notify_all()

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(sample())
                group.create_task(learn())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def save(self, checkpoints: Checkpoints) -> None:
        """Writes a checkpoint, including the older weights that sample the next batches."""
        checkpoints.save(
            self.iteration, self.learner.state, {"iteration": self.iteration}, self._lagged()
        )

    def resume(self, checkpoints: Checkpoints) -> bool:
        """Restores the newest checkpoint; returns false if there is none."""
        if checkpoints.latest() is None:
            return False
        found = checkpoints.restore(self.learner.state, arrays=self._lagged())
        self.learner.state = found.state
        self.iteration = self._newest = int(found.extra["iteration"])
        self._older = {
            self.iteration - lag: found.arrays[f"lag_{lag}"]
            for lag in range(1, min(self.config.staleness, self.iteration) + 1)
        }
        return True

    def _lagged(self) -> dict[str, object] | None:
        """The weights of the versions before the newest, as far as there are any.

        Others take their place, or shapes before there are any, so that checkpoints look alike.
        """
        if not self.config.staleness:
            return None
        known = self._older or {0: self.learner.params_like(self._dtype)}
        lags = range(1, self.config.staleness + 1)
        return {f"lag_{lag}": known[self._nearest(known, self._newest - lag)] for lag in lags}

    @staticmethod
    def _nearest(known: Iterable[int], version: int) -> int:
        return min(known, key=lambda one: abs(one - version))

    def _has(self, version: int) -> bool:
        return version in self._older or version == self._newest

    def _may_update(self, number: int) -> bool:
        """Whether the weights before an update are kept for the batches that they will sample.

        With a staleness of 1 it is the generator's turn to take them: it has finished with those
        before, and both need not be held at once. With more it may not be, so they are kept here.
        """
        staleness = self.config.staleness
        if not staleness or number + staleness >= self.config.iterations:
            return True
        if staleness > 1:
            self._keep(number)
        return number in self._older

    def _keep(self, version: int) -> Params:
        """Trained parameters of a version; those that nothing needs any more are dropped first."""
        staleness = self.config.staleness
        for old in [one for one in self._older if one < min(version, self._newest + 1 - staleness)]:
            del self._older[old]
        if version in self._older:
            return self._older[version]
        params = self.learner.params_as(self._dtype)
        if staleness:
            self._older[version] = params
        return params

    def _to_publish(self, version: int) -> Qwen3:
        """The model of a version, for the generator of this process."""
        if self.config.staleness < 2:  # nothing else is asked of the generator meanwhile
            self._publisher.release()
        gc.collect()  # modules hold cycles, and a copy of the weights must not wait for them
        params = self._keep(version)
        if jax.process_count() > 1:
            params = whole(params)
        return self.learner.with_params(params, self._frozen)

    async def _sample(self, number: int) -> list[Stay]:
        """This process's part of a batch: its patients, each `num_generations` times."""
        config = self.config
        share = config.patients // jax.process_count()
        first = number * config.patients + jax.process_index() * share
        patients = np.repeat(np.arange(first, first + share), config.num_generations)
        sample = np.tile(np.arange(config.num_generations), share)
        return await self.runner.treat(
            self._backend,
            patients,
            seeds=(1_000_003 * number + sample).tolist(),
            state_scorer=self._state_scorer,
            lockstep=self._lockstep,
        )

    def _require_served(self, stays: Sequence[Stay], number: int) -> None:
        """Raises an error if the server failed in more than half of the stays."""
        lost = [stay for stay in stays if stay.failure == NO_BACKEND]
        if 2 * len(lost) > len(stays):
            raise InputError(
                f"iteration {number + 1}: the language model failed {len(lost)} of {len(stays)} "
                f"stays ({lost[0].detail}); start it again and resume the run"
            )

    def _judged(self, stay: Stay) -> dict[int, Judged] | None:
        """The advantages of all actions by turn, if decisions are learned from them."""
        if self._decisions is None:
            return None
        return judged_by_turn(stay, partial(of_all_actions, config=self.config.advantages))

    def _learn(self, number: int, own: Sequence[Stay]) -> tuple[list[Stay], dict[str, float]]:
        """Computes advantages of a batch and makes its updates.

        Returns:
          The stays of all processes, and figures.
        """
        config = self.config
        stays = everyones(own)
        self._require_served(stays, number)
        used = [stay for stay in stays if stay.failure != NO_BACKEND and stay.turns]
        advantages = assign_advantages(used, config.advantages)
        members = [
            one
            for stay, advantage, kept in zip(
                used, advantages.of_decisions, advantages.kept, strict=True
            )
            if kept
            for one in trajectories(stay, advantage, self._decisions, self._judged(stay))
        ]
        fitting = [one for one in members if len(one) <= config.row_length]
        figures = {
            "lost_stays": float(len(stays) - len(used)),
            "uninformative_stays": float((~advantages.kept).sum()),
            "too_long": float(len(members) - len(fitting)),
            **_gain(used),
        }
        if not fitting:
            return stays, figures
        return stays, figures | self._updates.learn(fitting, seed=number)


def everyones(own: Sequence[Stay]) -> list[Stay]:
    """The stays of all processes, in their order; all of them call it, with their own."""
    if jax.process_count() == 1:
        return list(own)
    parts = gathered(json.dumps([to_record(stay) for stay in own]).encode())
    return [from_record(record) for part in parts for record in json.loads(part)]


def _gain(stays: Sequence[Stay]) -> dict[str, float]:
    """Mean advantage of the decisions over the continuation policy, where it was computed."""
    gains = [
        decision.values[decision.action]
        for stay in stays
        for decision in stay.decisions
        if decision.values is not None
    ]
    return {"counterfactual_gain": float(np.mean(gains))} if gains else {}
