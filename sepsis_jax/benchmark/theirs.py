"""torch's contenders: batched, eager and compiled, and the published runner's loop of one."""

from __future__ import annotations

from typing import Any

import numpy as np

from sepsis_jax.benchmark.timing import Contender, seconds_of
from sepsis_jax.benchmark.torch_rollout import TorchRollout
from sepsis_jax.benchmark.workload import Workload

ONE_BRANCH = "torch, one branch"
EAGER = "torch, eager"
COMPILED = "torch, compiled"


def torch_device(torch: Any, backend: str) -> str:
    """Where torch runs: beside JAX on its GPU if it can, else on the CPU."""
    return "cuda" if backend == "gpu" and torch.cuda.is_available() else "cpu"


def torch_contender(torch: Any, job: Workload, device: str, name: str) -> Contender:
    """A rollout of a job in torch; all of its branches are one batch.

    Args:
      torch: from `load_torch`.
      job: what to play.
      device: of torch.
      name: one of the names above.
    """
    player = TorchRollout(torch, job.world_model, device, compiled=name == COMPILED)
    start, plans = job.flat()
    begun = player.start(start)
    actions = torch.tensor(np.asarray(plans, np.int64), device=device)

    def run(repeat: int) -> Any:
        torch.manual_seed(repeat)
        found = player.play(begun, actions)
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _, first = seconds_of(lambda: run(0))
    _, second = seconds_of(lambda: run(0))
    return Contender(
        name=name,
        run=run,
        work=job.steps,
        branches=job.shape.branches,
        checksum=lambda found: float(sum(value.double().sum() for value in found.values())),
        compile_seconds=max(first - second, 0.0) if name == COMPILED else None,
        memory_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None,
    )
