"""Demonstration dialogues of policies that need no language model, and which stays to keep."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from policy.agent.dialogue import COMPLETED, DialogueConfig, Stay, treat
from policy.agent.env_pool import CAPACITY, Admission, Observer, Ward
from policy.agent.forecast import Forecaster
from policy.agent.prompts import Prompts
from policy.agent.scripted import Script, ScriptedBackend, simulating
from policy.agent.tools import MAX_OPTIONS
from policy.agent.transcript import g1, g2
from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.envs.env import EnvState, SepsisEnv
from worldmodel.errors import InputError
from worldmodel.observation import PolicyFn, as_pytree, recent
from worldmodel.simulate.randomness import policy_key


def probabilities(policy: PolicyFn, key: jax.Array) -> Observer:
    """An observer that notes a policy's probabilities.

    Args:
      policy: any; it may look back as far as the ward's environment does.
      key: of policies that draw.
    """
    return partial(
        _probabilities, as_pytree(policy), policy_key(key), past=getattr(policy, "past", 0)
    )


def following(ward: Ward, bed: int) -> Script:
    """The script of a patient whose ward has an observer of `probabilities`.

    Simulates an action drawn from them, by the seed of the reply, with two of its neighbours,
    and prescribes it.
    """

    def choose(seed: int) -> tuple[int, ...]:
        values = ward.values(bed)
        assert values is not None
        draw = np.random.default_rng(seed)
        shares = np.asarray(values, np.float64)
        action = int(draw.choice(schema.NUM_ACTIONS, p=shares / shares.sum()))
        near = draw.permutation(neighbours(action))
        return (action, *near[: MAX_OPTIONS - 1].tolist())

    return simulating(choose)


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
    admission: Admission,
    forecaster: Forecaster | None,
    prompts: Prompts,
    config: DialogueConfig | None = None,
    *,
    seed: int,
    capacity: int = CAPACITY,
) -> list[Stay]:
    """Lets a policy treat everybody who is admitted, written out as dialogues.

    Args:
      policy: such as `GuidelineRules()` or a planner.
      env, admission, forecaster, capacity: as for `policy.agent.env_pool.Ward`.
      prompts, config, seed: as for `policy.agent.dialogue.treat`.

    Returns:
      The stays in the order of admission, all completed.

    Raises:
      InputError: the policy looks back on more rows than the environment shows, or failed a stay.
    """
    observer = probabilities(policy, jax.random.key(seed))
    ward = Ward(env, admission, forecaster, capacity=capacity, observer=observer)
    try:
        stays = asyncio.run(_demonstrate(ward, admission, prompts, config, seed=seed))
    finally:
        ward.close()
    for stay in stays:
        if stay.status != COMPLETED:
            raise InputError(f"teacher: failed stay {stay.patient} ({stay.detail})")
    return stays


async def _demonstrate(
    ward: Ward,
    admission: Admission,
    prompts: Prompts,
    config: DialogueConfig | None,
    *,
    seed: int,
) -> list[Stay]:
    async def stay(bed: int, patient: int) -> Stay:
        backend = ScriptedBackend(following(ward, bed))
        return await treat(
            bed, patient, backend, ward, prompts, config or DialogueConfig(), seed=seed
        )

    return await asyncio.gather(
        *(stay(bed, patient) for bed, patient in enumerate(admission.patients.tolist()))
    )


@partial(jax.jit, static_argnames="past")
def _probabilities(policy: PolicyFn, key: jax.Array, states: EnvState, *, past: int) -> jax.Array:
    views = recent(states.last.observation, past)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, views.step)
    return jax.vmap(policy)(keys, views)


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
