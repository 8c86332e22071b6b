"""Teachers that need no language model, and the dialogues they hold with synthetic patients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from policy.agent.dialogue import COMPLETED, DialogueConfig, Stay, treat
from policy.agent.forecast import Forecaster
from policy.agent.prompts import Prompts
from policy.agent.script import simulate_and_prescribe
from policy.agent.tools import (
    MAX_OPTIONS,
    PRESCRIPTION,
    SIMULATION,
    prescription_arguments,
    simulation_arguments,
)
from policy.agent.ward import Admission, Ward
from policy.base import Policy
from policy.serving.backend import TOOL_CALLS, Message, Reply, ToolCall
from policy.serving.scripted import Script, ScriptedBackend
from worldmodel import schema
from worldmodel.envs.base import Timestep
from worldmodel.envs.env import SepsisEnv
from worldmodel.errors import InputError
from worldmodel.view import View

Teacher = Callable[[Callable[[], View]], Script]
"""From what tells the newest view of a patient to the script of that patient's dialogue."""


def scripted(script: Script = simulate_and_prescribe) -> Teacher:
    """A teacher whose script looks at nothing but the messages."""
    return lambda view: script


def following(policy: Policy) -> Teacher:
    """A teacher that simulates a policy's action and some of its neighbours, and prescribes it.

    Args:
      policy: one that looks at the newest row alone. What it draws, it draws by the reply's seed.

    Raises:
      InputError: the policy looks back.
    """
    if policy.past:
        raise InputError(f"teacher: the policy looks back on {policy.past} rows, not on one")
    act = jax.jit(policy.act)

    def teacher(view: Callable[[], View]) -> Script:
        def script(messages: Sequence[Message], seed: int) -> Reply:
            last = messages[-1]
            if last["role"] == "tool" and last["name"] == SIMULATION:
                called = messages[-2]["tool_calls"][0]["function"]["arguments"]
                levels = json.loads(json.loads(called)["actions"][0])
                action = schema.action_index(*levels)
                call = ToolCall("", PRESCRIPTION, prescription_arguments(action))
            else:
                action = int(act(jax.random.key(seed), view()))
                near = np.random.default_rng(seed).permutation(neighbours(action))
                actions = (action, *near[: MAX_OPTIONS - 1].tolist())
                call = ToolCall("", SIMULATION, simulation_arguments(actions))
            return Reply("", (_numbered(call, messages),), TOOL_CALLS)

        return script

    return teacher


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
    teacher: Teacher,
    env: SepsisEnv,
    admission: Admission,
    forecaster: Forecaster | None,
    prompts: Prompts,
    config: DialogueConfig | None = None,
    *,
    seed: int,
) -> list[Stay]:
    """Lets a teacher treat everybody who is admitted.

    Args:
      teacher: such as `scripted()` or `following(GuidelineRules())`.
      env, admission, forecaster: as for `policy.agent.ward.Ward`.
      prompts, config, seed: as for `policy.agent.dialogue.treat`.

    Returns:
      The stays in the order of admission, all completed.

    Raises:
      InputError: the teacher failed a stay.
    """
    stays = asyncio.run(
        _demonstrate(teacher, env, admission, forecaster, prompts, config, seed=seed)
    )
    for stay in stays:
        if stay.status != COMPLETED:
            raise InputError(f"teacher: failed stay {stay.patient} ({stay.detail})")
    return stays


async def _demonstrate(
    teacher: Teacher,
    env: SepsisEnv,
    admission: Admission,
    forecaster: Forecaster | None,
    prompts: Prompts,
    config: DialogueConfig | None,
    *,
    seed: int,
) -> list[Stay]:
    ward = _Watched(env, admission, forecaster)

    async def stay(bed: int, patient: int) -> Stay:
        backend = ScriptedBackend(teacher(lambda: ward.seen[bed]))
        return await treat(
            bed, patient, backend, ward, prompts, config or DialogueConfig(), seed=seed
        )

    try:
        return await asyncio.gather(
            *(stay(bed, patient) for bed, patient in enumerate(admission.patients.tolist()))
        )
    finally:
        ward.close()


class _Watched(Ward):
    """A ward that remembers what was last seen of everybody."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        beds = range(len(self._patients))
        self.seen: list[View] = [self.admitted(bed).observation for bed in beds]

    async def prescribe(self, bed: int, action: int) -> Timestep:
        after = await super().prescribe(bed, action)
        self.seen[bed] = after.observation
        return after


def _numbered(call: ToolCall, messages: Sequence[Message]) -> ToolCall:
    return ToolCall(f"call-{len(messages)}", call.name, call.arguments)
