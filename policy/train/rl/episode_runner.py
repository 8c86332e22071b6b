"""Runs episodes for training: an environment, a world model for simulations, and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from policy.agent.dialogue import DialogueConfig, Stay, treat_all
from policy.agent.env_pool import EnvBatch, EnvPool, StateScorer, reset_batch
from policy.agent.forecast import Forecaster
from policy.agent.prompts import Prompts
from policy.serving.backend import Backend
from policy.serving.batching import Lockstep
from policy.train.data.demonstrations import demonstrate
from worldmodel.envs.env import SepsisEnv
from worldmodel.observation import PolicyFn
from worldmodel.synthetic import patient_keys


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

    def demonstrate(self, policy: PolicyFn, patients: Sequence[int] | np.ndarray) -> list[Stay]:
        """Stays under a policy, as `policy.train.data.demonstrations.demonstrate`."""
        return demonstrate(
            policy, self.env, self.reset_batch(patients), self.forecaster, self.prompts,
            self.dialogue,
            seed=self.seed, capacity=self.concurrency,
        )  # fmt: skip

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
