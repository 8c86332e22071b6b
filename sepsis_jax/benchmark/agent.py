"""The agent's question: this patient, all 25 treatments, four hours ahead, many samples."""

from __future__ import annotations

import jax
import numpy as np

from sepsis_jax.benchmark.ours import checksum
from sepsis_jax.benchmark.timing import Contender, seconds_of
from worldmodel import schema
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import History
from worldmodel.simulate.rollout import rollout

QUESTION = "agent's question"
_PLANS = np.arange(schema.NUM_ACTIONS, dtype=np.int32)[:, None]


def agent_questions(world_model: WorldModel, pool: History, samples: int) -> list[Contender]:
    """The question as `rollout` answers it, with and without mortality.

    Args:
      world_model: of one member.
      pool: patients; every repeat asks about another one.
      samples: per treatment, with common noise.
    """
    return [_question(world_model, pool, samples, mortality=value) for value in (False, True)]


def _question(
    world_model: WorldModel, pool: History, samples: int, *, mortality: bool
) -> Contender:
    count = pool.step.shape[0]
    patients = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], pool) for i in range(min(count, 8))]

    def run(repeat: int) -> object:
        start = patients[repeat % len(patients)]
        return jax.block_until_ready(
            rollout(
                world_model,
                jax.random.key(repeat + 1),
                start,
                _PLANS,
                samples=samples,
                mortality=mortality,
            )
        )

    _, first = seconds_of(lambda: run(0))
    _, second = seconds_of(lambda: run(0))
    return Contender(
        name=QUESTION + (", with mortality" if mortality else ""),
        run=run,
        work=1.0,
        branches=schema.NUM_ACTIONS * samples,
        checksum=checksum,
        compile_seconds=max(first - second, 0.0),
    )
