"""Where a rollout's time goes, from a JAX trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from sepsis_jax.benchmark.timing import seconds_of
from sepsis_jax.benchmark.tracing import PARTS, busy_seconds, parts_of, read_spans
from sepsis_jax.benchmark.workload import Workload
from sepsis_jax.progress import Progress, silent
from worldmodel.files import atomic_folder, write_json
from worldmodel.simulate.rollout import CHART_FEATURES
from worldmodel.simulate.sharded import (
    BRANCHES_PER_DEVICE,
    Player,
    Settings,
    Task,
    branch_mesh,
)

RESULT = "profile.json"
_RUNS = 3  # timed and traced


def default_branches() -> int:
    """Branches per device, as `sharded` deals them out."""
    return BRANCHES_PER_DEVICE.get(jax.default_backend(), 65_536)


def write_profile(
    job: Workload, out: Path, extra: dict[str, Any], *, progress: Progress = silent
) -> dict[str, Any]:
    """Profiles a job into profile.json, profile.csv and trace/; returns what profile.json holds.

    Raises:
      InputError: something else is in the way.
    """
    with atomic_folder(out, marker=RESULT) as folder:
        result = profile_rollout(job, folder / "trace", progress=progress) | extra
        write_json(folder / RESULT, result)
        pd.DataFrame(result["parts"]).to_csv(folder / "profile.csv", index=False)
    return result


def profile_rollout(job: Workload, out: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Traces rollouts and sums up their parts.

    Args:
      job: what every device plays at a time; all devices play at once.
      out: folder for the trace.
      progress: told of phases.

    Returns:
      JSON-ready: `parts` (name, device-seconds per run, share of the devices' time),
      `wall_seconds` per run, untraced and traced, `devices`, `branches` and the untraced rate.
    """
    mesh = branch_mesh()
    devices = mesh.devices.size
    settings = Settings(job.horizon, CHART_FEATURES)
    player = Player(job.world_model, mesh, job.shape, settings)
    patients = np.arange(job.shape.patients, dtype=np.int32)
    samples = np.arange(job.shape.samples, dtype=np.int32)
    tasks = Task(
        np.tile(patients, (devices, 1)),
        samples + job.shape.samples * np.arange(devices, dtype=np.int32)[:, None],
        np.zeros(devices, np.int32),
    )
    inputs = (jax.random.key(0), job.start, jnp.asarray(job.plans), tasks)
    progress("compiling", 0.0)
    lowered = player.call.lower(job.world_model, None, *inputs)
    compiled = lowered.compile()
    call = _placed(compiled, job, inputs)
    progress("running", 0.6)
    untraced = _timed(call)
    progress("tracing", 0.7)
    options_of_trace = jax.profiler.ProfileOptions()
    options_of_trace.python_tracer_level = 0
    jax.profiler.start_trace(str(out), profiler_options=options_of_trace)
    try:
        _, seconds = seconds_of(lambda: [call() for _ in range(_RUNS)])
    finally:
        jax.profiler.stop_trace()
    progress("reading the trace", 0.9)
    busy = busy_seconds(read_spans(out), parts_of(compiled.as_text()))
    wall = seconds / _RUNS
    rows: list[dict[str, Any]] = [
        {
            "part": part,
            "device_seconds": busy[part] / _RUNS,
            "share": busy[part] / _RUNS / (wall * devices),
        }
        for part in PARTS
    ]
    idle = wall * devices - sum(row["device_seconds"] for row in rows)
    rows.append({"part": "idle", "device_seconds": idle, "share": idle / (wall * devices)})
    return {
        "parts": rows,
        "wall_seconds": {"untraced": untraced, "traced": wall},
        "devices": devices,
        "branches": job.shape.branches * devices,
        "branch_steps_per_second": job.steps * devices / untraced,
    }


def _placed(compiled: Any, job: Workload, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """A call of a compiled program with its inputs where it wants them."""
    arguments, _ = compiled.input_shardings
    leaves = jax.device_put((job.world_model, None, *inputs), arguments)
    return lambda: jax.block_until_ready(compiled(*leaves))


def _timed(call: Callable[[], Any]) -> float:
    """Median seconds, warm."""
    jax.block_until_ready(call())
    runs = [seconds_of(lambda: jax.block_until_ready(call()))[1] for _ in range(_RUNS)]
    return float(np.median(runs))
