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
    finished: Callable[[Stay], None],
    scorer: ActionScorer | None = None,
) -> None:
    """Treats every patient of a ward.

    Args:
      patients: [N] identities, in the order of the ward's beds.
      backend, ward, prompts, config: as for `treat`.
      seeds: [N] as for `treat`.
      concurrency: stays in treatment at the same time.
      scorer: as for `treat`.
      finished: called with each stay as it ends, in the order they end.
    """
    waiting = iter(enumerate(patients))

    async def nurse() -> None:
        for bed, patient in waiting:
            stay = await treat(
                bed, patient, backend, ward, prompts, config, seed=seeds[bed], scorer=scorer
            )
            finished(stay)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(patients))):
            group.create_task(nurse())
