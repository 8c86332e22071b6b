"""Where a rollout's time goes, read from a JAX trace."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from sepsis_jax.benchmark.setup import Workload
from sepsis_jax.benchmark.timing import seconds_of
from sepsis_jax.runs import JsonDict, Progress, silent
from worldmodel.files import atomic_folder, write_json
from worldmodel.simulate.rollout import CHART_FEATURES
from worldmodel.simulate.sharded import BRANCHES_PER_DEVICE, ShardedRollout, Task, branch_mesh
from worldmodel.simulate.unroll import RolloutConfig

RESULT = "profile.json"
_RUNS = 3  # timed and traced


def default_branches() -> int:
    """Branches per device, as `sharded` deals them out."""
    return BRANCHES_PER_DEVICE.get(jax.default_backend(), 65_536)


def write_profile(
    job: Workload, out: Path, extra: JsonDict, *, progress: Progress = silent
) -> JsonDict:
    """Profiles a job into profile.json, profile.csv and trace/; returns what profile.json holds.

    Raises:
      InputError: something else is in the way.
    """
    with atomic_folder(out, marker=RESULT) as folder:
        result = profile_rollout(job, folder / "trace", progress=progress) | extra
        write_json(folder / RESULT, result)
        pd.DataFrame(result["parts"]).to_csv(folder / "profile.csv", index=False)
    return result


def profile_rollout(job: Workload, out: Path, *, progress: Progress = silent) -> JsonDict:
    """Traces rollouts and sums up their parts.

    Args:
      job: workload of every device; all devices simulate at once.
      out: folder for the trace.
      progress: told of phases.

    Returns:
      JSON-ready: `parts` (name, device-seconds per run, share of the devices' time),
      `wall_seconds` per run, untraced and traced, `devices`, `branches` and the untraced rate.
    """
    mesh = branch_mesh()
    devices = mesh.devices.size
    settings = RolloutConfig(job.horizon, CHART_FEATURES, kernel=job.kernel)
    sharded_rollout = ShardedRollout(job.world_model, mesh, job.shape, settings)
    patients = np.arange(job.shape.patients, dtype=np.int32)
    samples = np.arange(job.shape.samples, dtype=np.int32)
    tasks = Task(
        np.tile(patients, (devices, 1)),
        samples + job.shape.samples * np.arange(devices, dtype=np.int32)[:, None],
        np.zeros(devices, np.int32),
    )
    inputs = (jax.random.key(0), job.start, jnp.asarray(job.plans), tasks)
    progress("compiling", 0.0)
    # By shapes alone: a model that was loaded lies on one device, whatever the mesh.
    shapes = jax.eval_shape(lambda *leaves: leaves, job.world_model, None, *inputs)
    compiled = sharded_rollout.call.lower(*shapes).compile()
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
    rows: list[JsonDict] = [
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


def _placed(
    compiled: jax.stages.Compiled, job: Workload, inputs: tuple[object, ...]
) -> Callable[[], object]:
    """A call of a compiled program with its inputs where it wants them."""
    arguments, _ = compiled.input_shardings
    leaves = jax.device_put((job.world_model, None, *inputs), arguments)
    return lambda: jax.block_until_ready(compiled(*leaves))


def _timed(call: Callable[[], object]) -> float:
    """Median seconds, warm."""
    jax.block_until_ready(call())
    runs = [seconds_of(lambda: jax.block_until_ready(call()))[1] for _ in range(_RUNS)]
    return float(np.median(runs))


OTHER = "other"
CONTAINER = "container"  # loops and calls
SCOPES = (
    "projection", "recurrence", "gates", "heads", "sampling", "scoring", "policy", "outcome",
    "output",
)  # fmt: skip
PARTS = (*SCOPES, OTHER)

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_CONTAINERS = ("while", "conditional", "call")


class Span(NamedTuple):
    """An instruction in flight on a device, in ns."""

    device: str
    start: float
    end: float
    name: str


def parts_of(hlo: str) -> dict[str, str]:
    """The part that each instruction of a compiled program belongs to.

    Args:
      hlo: the program's text, `compiled.as_text()`.
    """
    counted: dict[str, Counter[str]] = {}  # of each computation, its instructions by part
    found: dict[str, tuple[str | None, str, list[str]]] = {}
    computation = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            name, opcode = match[1], match[2]
            op_name = _OP_NAME.search(line)
            scope = _scope(op_name[1]) if op_name else None
            found[name] = (scope, opcode, _CALLS.findall(line))
            if scope:
                counted.setdefault(computation, Counter())[scope] += 1
    parts: dict[str, str] = {}
    for name, (scope, opcode, calls) in found.items():
        for called in calls if scope is None else ():
            if called in counted:
                scope = counted[called].most_common(1)[0][0]
        parts[name] = CONTAINER if opcode in _CONTAINERS else scope or OTHER
    return parts


def _scope(op_name: str) -> str | None:
    """The innermost of our scopes in a path such as jit(f)/while/body/heads/dot_general.

    Operations within the outcome model or a policy are counted as its own.
    """
    named = [part for part in op_name.split("/") if part in SCOPES]
    whole = [part for part in named if part in ("outcome", "policy")]
    kept = whole or named[-1:]
    return kept[0] if kept else None


def read_spans(folder: Path) -> list[Span]:
    """Spans of compiled instructions in the newest trace under a folder."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    spans = []
    for plane in devices or planes:
        begun: dict[int, tuple[str, float, float, str]] = {}
        ended: dict[int, float] = {}
        for line in plane.lines:
            for event in line.events:
                stats: JsonDict = dict(event.stats)
                stop = event.start_ns + event.duration_ns
                if "hlo_op" in stats:
                    device = f"{plane.name} {stats.get('device_ordinal', 0)}"
                    identity = stats.get("_p", -len(begun) - 1)
                    begun[identity] = (device, event.start_ns, stop, str(stats["hlo_op"]))
                elif "_c" in stats:
                    ended[stats["_c"]] = event.start_ns
        # A product goes on in other threads after the call that began it; its end is an event.
        spans += [
            Span(device, start, max(stop, ended.get(identity, stop)), name)
            for identity, (device, start, stop, name) in begun.items()
        ]
    return spans


def busy_seconds(spans: Iterable[Span], parts: Mapping[str, str]) -> dict[str, float]:
    """Device-seconds by part.

    A device's time is shared evenly by the instructions that it has in flight; loops count for
    what runs in them.

    Args:
      spans: from `read_spans`.
      parts: from `parts_of`.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    by_device: dict[str, list[tuple[float, int, str]]] = {}
    for span in spans:
        part = parts.get(span.name, OTHER)
        if part != CONTAINER:
            edges = by_device.setdefault(span.device, [])
            edges += [(span.start, 1, part), (span.end, -1, part)]
    for edges in by_device.values():
        flying: Counter[str] = Counter()
        before = 0.0
        for moment, change, part in sorted(edges):
            total = flying.total()
            for name, count in flying.items():
                if count:
                    seconds[name] += (moment - before) * 1e-9 * count / total
            flying[part] += change
            before = moment
    return seconds
