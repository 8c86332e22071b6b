"""Stays to learn from: written out under policies, which demonstrate, or under language models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import numpy as np

from policy.agent.dialogue import COMPLETED, DialogueConfig, Stay, treat, treat_all
from policy.agent.env_pool import CAPACITY, EnvBatch, EnvPool, StateScorer, reset_batch
from policy.agent.forecast import Forecaster
from policy.agent.prompts import Prompts
from policy.agent.scripted import Script, ScriptedBackend, damaged, prescribe, simulate
from policy.agent.tools import MAX_OPTIONS
from policy.agent.transcript import g1, g2
from policy.serving.backend import Backend, Lockstep, Message, Reply
from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.envs.env import EnvState, SepsisEnv
from worldmodel.errors import InputError
from worldmodel.observation import PolicyFn, as_pytree, recent
from worldmodel.simulate.randomness import policy_key
from worldmodel.synthetic import patient_keys


def probabilities(policy: PolicyFn, key: jax.Array) -> StateScorer:
    """A state scorer that notes a policy's probabilities.

    Args:
      policy: any; it may look back as far as the pool's environment does.
      key: of policies that draw.
    """
    return partial(
        _probabilities, as_pytree(policy), policy_key(key), past=getattr(policy, "past", 0)
    )


@dataclass(frozen=True)
class DemonstrationConfig:
    """How demonstrations are held.

    Attributes:
      shuffle: put the options in an order that does not depend on the choice; otherwise it stands
        first, which is enough to learn the form of the dialogue from.
      second_round: share of decisions in which options around another action are simulated first.
      without_simulator: share of patients who are treated without it, so that the model also knows
        how to.
      exploration: share of decisions in which any action is prescribed instead of the chosen one.
        It is not learned: decisions are learned by wanted probabilities, the demonstrator's. A
        patient whose last treatment is not what the demonstrator would have given shows what it
        depends on (noise injection, Laskey et al. 2017, arXiv 1703.09327); else a clone may learn
        to repeat the last treatment, and never begin one.
      errors: share of replies before which a damaged one is shown, at most one per decision, with
        the error that answers it; it is not learned (`policy.train.data.packing.written`), how to
        go on after it is.
    """

    shuffle: bool = True
    second_round: float = 0.1
    without_simulator: float = 0.1
    exploration: float = 0.2
    errors: float = 0.05

    def __post_init__(self) -> None:
        names = ("second_round", "without_simulator", "exploration", "errors")
        require(self, "within [0, 1)", lambda x: 0 <= x < 1, *names)


def following(pool: EnvPool, slot: int, config: DemonstrationConfig) -> Script:
    """The script of a patient whose pool has a state scorer of `probabilities`.

    Chooses an action from them, by the seed of the reply, and prescribes it after simulating it
    beside two others, in an order that does not depend on the choice: where an action stands tells
    nothing of what is prescribed, and a model that learns from this has to look at the answers.

    Args:
      pool, slot: of the patient.
      config: settings.
    """
    waiting: list[Callable[[Sequence[Message]], Reply]] = []  # replies of the decision under way
    erred = False  # in this decision

    def script(messages: Sequence[Message], seed: int) -> Reply:
        nonlocal erred
        draw = np.random.default_rng(seed)
        if not waiting:
            erred = False
            values = pool.values(slot)
            assert values is not None
            shares = np.asarray(values, np.float64)
            chosen = int(draw.choice(schema.NUM_ACTIONS, p=shares / shares.sum()))
            around = partial(_around, draw=draw, shuffle=config.shuffle)
            rounds = [around(chosen)] if pool.can_simulate else []
            if rounds and draw.random() < config.second_round:
                rounds.insert(0, around(int(draw.choice(neighbours(chosen)))))
            waiting.extend(partial(simulate, actions=options) for options in rounds)
            given = chosen
            if draw.random() < config.exploration:
                given = int(draw.integers(schema.NUM_ACTIONS))
            waiting.append(partial(prescribe, action=given))
        reply = waiting[0](messages)
        if not erred and draw.random() < config.errors:
            erred = True
            return damaged(reply, draw)
        del waiting[0]
        return reply

    return script


def _around(action: int, draw: np.random.Generator, *, shuffle: bool) -> list[int]:
    """An action and two of its neighbours, in any order or the action first."""
    near: list[int] = draw.permutation(neighbours(action))[: MAX_OPTIONS - 1].tolist()
    found: list[int] = draw.permutation([action, *near]).tolist() if shuffle else [action, *near]
    return found


def neighbours(action: int) -> list[int]:
    """Joint actions that differ from one by a single level of a single drug."""
    vasopressor, fluid = (int(level) for level in schema.action_levels(action))
    return [
        int(schema.action_index(v, f))
        for v, f in (
            (vasopressor - 1, fluid),
            (vasopressor + 1, fluid),
            (vasopressor, fluid - 1),
            (vasopressor, fluid + 1),
        )
        if 0 <= v < schema.NUM_LEVELS and 0 <= f < schema.NUM_LEVELS
    ]


def demonstrate(
    policy: PolicyFn,
    env: SepsisEnv,
    batch: EnvBatch,
    forecaster: Forecaster | None,
    prompts: Prompts,
    config: DialogueConfig | None = None,
    *,
    seed: int,
    how: DemonstrationConfig | None = None,
    capacity: int = CAPACITY,
) -> list[Stay]:
    """Lets a policy treat all patients of a batch, written out as dialogues.

    Args:
      policy: such as `GuidelineRules()` or a planner.
      env, batch, forecaster, capacity: as for `policy.agent.env_pool.EnvPool`.
      prompts, config, seed: as for `policy.agent.dialogue.treat`.
      how: settings of the demonstration.

    Returns:
      The stays in the order of the batch, all completed.

    Raises:
      InputError: the policy looks back on more rows than the environment shows, or failed a stay.
    """
    state_scorer = probabilities(policy, jax.random.key(seed))
    pool = EnvPool(env, batch, forecaster, capacity=capacity, state_scorer=state_scorer)
    try:
        stays = asyncio.run(
            _demonstrate(pool, batch, prompts, config, seed=seed, how=how or DemonstrationConfig())
        )
    finally:
        pool.close()
    for stay in stays:
        if stay.status != COMPLETED:
            raise InputError(f"demonstrator: failed stay {stay.patient} ({stay.detail})")
    return stays


async def _demonstrate(
    pool: EnvPool,
    batch: EnvBatch,
    prompts: Prompts,
    config: DialogueConfig | None,
    *,
    seed: int,
    how: DemonstrationConfig,
) -> list[Stay]:
    async def stay(slot: int, patient: int) -> Stay:
        backend = ScriptedBackend(following(pool, slot, how))
        return await treat(
            slot, patient, backend, pool, prompts, config or DialogueConfig(), seed=seed
        )

    return await asyncio.gather(
        *(stay(slot, patient) for slot, patient in enumerate(batch.patients.tolist()))
    )


@partial(jax.jit, static_argnames="past")
def _probabilities(policy: PolicyFn, key: jax.Array, states: EnvState, *, past: int) -> jax.Array:
    observations = recent(states.last.observation, past)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, observations.step)
    return jax.vmap(policy)(keys, observations)


@dataclass(frozen=True)
class RejectionConfig:
    """Bounds that a stay must keep.

    Attributes:
      invalid: refused calls and replies.
      violations: decisions against the guideline rules G1 and G2.
      total_reward: at least; none if not given.
    """

    invalid: int = 0
    violations: int = 0
    total_reward: float | None = None

    def __post_init__(self) -> None:
        require(self, "0 or more", lambda n: n >= 0, "invalid", "violations")


def accepted(stays: Sequence[Stay], config: RejectionConfig) -> list[Stay]:
    """The completed stays within the bounds.

    Raises:
      InputError: there is none.
    """
    least = config.total_reward
    found = [
        stay
        for stay in stays
        if stay.status == COMPLETED
        and sum(stay.invalid.values()) <= config.invalid
        and sum(g1(vars(one)) + g2(vars(one)) for one in stay.decisions) <= config.violations
        and (least is None or stay.total_reward >= least)
    ]
    if not found:
        raise InputError(f"rejection: none of {len(stays)} stays is good enough; widen the bounds")
    return found


@dataclass(frozen=True)
class EpisodeRunner:
    """An environment with an unlimited number of patients, each with its own random key.

    Attributes:
      env: environment; its observations include `Forecaster.past` past rows.
      forecaster: world model that answers simulations; None for none.
      prompts: texts of the dialogue.
      dialogue: limits of dialogues, and sampling of replies.
      seed: of the patients.
      concurrency: stays in treatment at the same time.
    """

    env: SepsisEnv
    forecaster: Forecaster | None
    prompts: Prompts
    dialogue: DialogueConfig = field(default_factory=DialogueConfig)
    seed: int = 0
    concurrency: int = 64

    def reset_batch(self, patients: Sequence[int] | np.ndarray) -> EnvBatch:
        """Patients by number; the same number is the same patient with the same random numbers."""
        numbers = np.asarray(patients, np.int32)
        return reset_batch(self.env, patient_keys(jax.random.key(self.seed), numbers), numbers)

    def demonstrate(
        self,
        policy: PolicyFn,
        patients: Sequence[int] | np.ndarray,
        how: DemonstrationConfig | None = None,
    ) -> list[Stay]:
        """Stays under a policy, as `policy.train.episodes.demonstrate`."""
        how = how or DemonstrationConfig()
        alone = 0 if self.forecaster is None else round(how.without_simulator * len(patients))
        parts = ((patients[alone:], self.forecaster), (patients[:alone], None))
        return [
            stay
            for some, forecaster in parts
            if len(some)
            for stay in demonstrate(
                policy, self.env, self.reset_batch(some), forecaster, self.prompts, self.dialogue,
                seed=self.seed, how=how, capacity=self.concurrency,
            )
        ]  # fmt: skip

    async def treat(
        self,
        backend: Backend,
        patients: Sequence[int] | np.ndarray,
        *,
        seeds: Sequence[int],
        state_scorer: StateScorer | None = None,
        lockstep: Lockstep | None = None,
    ) -> list[Stay]:
        """Stays under a language model, in the order of the patients.

        Args:
          backend: the model.
          patients: [N] numbers, which may repeat.
          seeds: [N] of the replies; repetitions of a patient need different seeds.
          state_scorer, lockstep: as for `policy.agent.env_pool.EnvPool`.
        """
        pool = EnvPool(
            self.env, self.reset_batch(patients), self.forecaster, capacity=self.concurrency,
            state_scorer=state_scorer, lockstep=lockstep,
        )  # fmt: skip
        try:
            return await treat_all(
                np.asarray(patients).tolist(), backend, pool, self.prompts, self.dialogue,
                seeds=seeds, concurrency=self.concurrency,
            )  # fmt: skip
        finally:
            pool.close()

    def replace(self, *, env: SepsisEnv | None = None, seed: int | None = None) -> EpisodeRunner:
        """A copy with other patients or another environment."""
        return replace(
            self, env=self.env if env is None else env, seed=self.seed if seed is None else seed
        )
