"""Teachers that need no language model, and the dialogues they hold with patients."""

from __future__ import annotations

import asyncio
from functools import partial

import jax
import numpy as np

from policy.agent.dialogue import COMPLETED, DialogueConfig, Stay, treat
from policy.agent.forecast import Forecaster
from policy.agent.prompts import Prompts
from policy.agent.script import simulating
from policy.agent.tools import MAX_OPTIONS
from policy.agent.ward import CAPACITY, Admission, Observer, Ward
from policy.serving.scripted import Script, ScriptedBackend
from worldmodel import schema
from worldmodel.envs.env import EnvState, SepsisEnv
from worldmodel.errors import InputError
from worldmodel.simulate.noise import policy_key
from worldmodel.view import Policy, as_pytree, recent


def probabilities(policy: Policy, key: jax.Array) -> Observer:
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
    policy: Policy,
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
      env, admission, forecaster, capacity: as for `policy.agent.ward.Ward`.
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
def _probabilities(policy: Policy, key: jax.Array, states: EnvState, *, past: int) -> jax.Array:
    views = recent(states.last.observation, past)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, views.step)
    return jax.vmap(policy)(keys, views)
