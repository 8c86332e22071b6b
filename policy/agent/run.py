"""Many stays at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from policy.agent.dialogue import DialogueConfig, Stay, treat
from policy.agent.prompts import Prompts
from policy.agent.scoring import ActionScorer
from policy.agent.ward import Ward
from policy.serving.backend import Backend


async def treat_all(
    patients: Sequence[int],
    backend: Backend,
    ward: Ward,
    prompts: Prompts,
    config: DialogueConfig,
    *,
    seeds: Sequence[int],
    concurrency: int,
    finished: Callable[[Stay], None] | None = None,
    scorer: ActionScorer | None = None,
) -> list[Stay]:
    """Treats every patient of a ward.

    Args:
      patients: [N] identities, in the order of the ward's beds.
      backend, ward, prompts, config: as for `treat`.
      seeds: [N] as for `treat`.
      concurrency: stays in treatment at the same time.
      scorer: as for `treat`.
      finished: called with each stay as it ends, in the order they end.

    Returns:
      The stays in the order of `patients`.
    """
    waiting = iter(enumerate(patients))
    stays: dict[int, Stay] = {}

    async def nurse() -> None:
        for bed, patient in waiting:
            stay = await treat(
                bed, patient, backend, ward, prompts, config, seed=seeds[bed], scorer=scorer
            )
            stays[bed] = stay
            if finished is not None:
                finished(stay)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(patients))):
            group.create_task(nurse())
    return [stays[bed] for bed in range(len(patients))]
