"""Counterfactual sweeps: patients x starts x plans x samples, written to Parquet by blocks."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow as pa

from policy.base import Policy
from sepsis_jax.pipelines.sweep_folder import Shard, SweepFolder
from sepsis_jax.pipelines.sweep_request import Sweep, SweepOptions, load_sweep
from sepsis_jax.report.figures import sweep_figure
from sepsis_jax.runs import JsonDict, Progress, silent
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.files import atomic_file
from worldmodel.observation import PolicyFn, as_pytree, observation_at
from worldmodel.simulate.history import start_history
from worldmodel.simulate.plans import plans_from
from worldmodel.simulate.sharded import ShardedRollout, branch_mesh, rollout_block, task_shape
from worldmodel.simulate.statistics import first_actions, group_statistics, support
from worldmodel.simulate.sweep import Block, padded

_RECENT = 10  # blocks that the speed is averaged over


class SweepResult(NamedTuple):
    """What a run did."""

    summary: pd.DataFrame | None  # a row per plan; None while blocks of other hosts are missing
    blocks: int  # written by this run
    missing: int  # that no host has written yet
    branch_steps: int  # simulated by this run
    seconds: float  # of simulation
    groups: JsonDict  # of the manifest


def run_sweep(
    episodes: str | Path,
    model: str | Path,
    out: str | Path,
    options: SweepOptions | None = None,
    *,
    behavior: str | Path | None = None,
    shard: Shard | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> SweepResult:
    """Simulates every group of a sweep and writes its statistics.

    The folder holds `manifest.json`, `parts/part-NNNNN.parquet` (a row per group) and, once no
    block is missing, `summary.csv` and `sweep.png`. A run that ends early, however, loses the
    block in work; another one goes on to the same bytes.

    Args:
      episodes: folder of episodes.
      model: world model.
      out: folder to write; hosts with different shards may share it.
      options: settings.
      behavior: folder of a policy that treats as the records do, for the support flag.
      shard: this host's share of the blocks; None for all.
      resume: go on with what is there.
      progress: called with (what is done, at what speed; share done).

    Raises:
      InputError: an input is missing or unfit, or something else is in the way.
    """
    progress("reading", 0.0)
    behavior = None if behavior is None else Path(behavior)
    sweep = load_sweep(Path(episodes), Path(model), options or SweepOptions(), behavior)
    folder = SweepFolder(Path(out), sweep.grid)
    todo = folder.begin(sweep.manifest, shard or Shard(), resume=resume)
    total = sum(map(sweep.grid.branch_steps, todo))
    progress_log = _ProgressLog(progress, len(todo), total)
    rollouts = RolloutCache(sweep)
    for block in todo:
        folder.write(block, block_table(sweep, rollouts, block))
        progress_log.block(sweep.grid.branch_steps(block))
    seconds = progress_log.seconds()
    missing = folder.missing()
    summary = None
    if not missing:
        progress("summary", 1.0)
        summary = summarise(folder, sweep)
        write_summary(folder.path, summary, sweep)
    return SweepResult(summary, len(todo), missing, total, seconds, sweep.manifest["groups"])


class RolloutCache:
    """The program of each section, compiled when it is first needed."""

    def __init__(self, sweep: Sweep):
        self._sweep = sweep
        self._mesh = branch_mesh()
        self._found: dict[object, ShardedRollout] = {}

    def of(self, number: int) -> ShardedRollout:
        """The program of a section, by its number."""
        sweep, section = self._sweep, self._sweep.grid.sections[number]
        plans = len(sweep.plan_set.names)
        policy = None
        if section.plans[0] >= plans:
            policy = list(sweep.policies.values())[section.plans[0] - plans]
        shape = task_shape(
            section.starts,
            section.width,
            sweep.options.samples,
            sweep.world_model.num_members,
            branches=max(sweep.task // section.cost, 1),
        )
        key = (shape, id(policy))
        if key not in self._found:
            self._found[key] = ShardedRollout(
                sweep.world_model, self._mesh, shape, sweep.settings, policy
            )
        return self._found[key]


def block_table(sweep: Sweep, rollouts: RolloutCache, block: Block) -> pa.Table:
    """Plays a block: one row per group, start by start."""
    options, world_model = sweep.options, sweep.world_model
    section = sweep.grid.sections[block.section]
    rows = padded(np.arange(block.first, block.first + block.size), section.starts)
    stay, step = sweep.grid.starts.stay[rows], sweep.grid.starts.step[rows]
    chosen = sweep.episodes.select(stay)
    own = np.arange(len(rows))
    start = start_history(world_model, chosen, step, recorded_sofa=options.mode == "reference")
    plans: jax.Array | None = None
    within = np.full((len(rows), 1), np.nan)
    if section.plans[0] < len(sweep.plan_set.names):
        actions = sweep.plan_set.actions[padded(np.array(section.plans), section.width)]
        filled, within = plans_from(actions, chosen, own, step)
        plans = jnp.asarray(filled)
    summary = rollout_block(
        rollouts.of(block.section),
        jax.random.key(options.seed),
        start,
        plans,
        options.samples,
    )
    size, width = block.size, len(section.plans)
    summary = jax.tree.map(lambda leaf: leaf[:size, :width], summary)
    columns = [schema.INDEX[name] for name in options.features]
    statistics = group_statistics(
        summary,
        np.asarray(chosen.dynamic)[own, step][:size, columns],
        np.asarray(start.sofa)[:size],
        features=options.features,
        members=world_model.num_members,
        horizon=options.horizon,
        mode=options.mode,
    )
    probs = None if sweep.behavior is None else _probs(sweep.behavior, chosen, step)[:size]
    supported = support(probs, summary)
    given = np.asarray(chosen.action)[own, step]

    def per_start(values: np.ndarray) -> np.ndarray:
        return np.repeat(values[:size], width)

    def named(values: tuple[str, ...]) -> pa.Array:
        return pa.array([values[number] for number in section.plans] * size, pa.string())

    table = {
        "stay_id": pa.array(per_start(np.asarray(chosen.stay_id))),
        "step": pa.array(per_start(step), pa.int32()),
        "hour": pa.array(per_start(step * world_model.step_hours), pa.float32()),
        "plan": named(sweep.names),
        "kind": named(sweep.kinds),
        "recorded_action": pa.array(per_start(given), pa.int8()),
        "first_action": _whole(first_actions(summary), pa.int8()),
        "recorded_steps": _whole(within[:size, :width], pa.int32()),
        "support": _real(supported),
        "supported": pa.array(supported.ravel() >= options.support, pa.bool_(),
                              mask=np.isnan(supported.ravel())),
    }  # fmt: skip
    return pa.table(table | {name: _real(values) for name, values in statistics.items()})


def _real(values: np.ndarray) -> pa.Array:
    """float32, NaN as null."""
    return pa.array(values.ravel().astype(np.float32), from_pandas=True)


def _whole(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.array(values.ravel(), from_pandas=True).cast(kind)


def _probs(policy: Policy, episodes: Episodes, step: np.ndarray) -> np.ndarray:
    """[P, 25] probabilities of a policy in row `step` of each of P stays."""
    on_device = jax.tree.map(jnp.asarray, episodes)
    past = getattr(policy, "past", 0)
    return np.asarray(_jitted_probs(as_pytree(policy), on_device, jnp.asarray(step), past=past))


@partial(jax.jit, static_argnames="past")
def _jitted_probs(policy: PolicyFn, episodes: Episodes, step: jax.Array, *, past: int) -> jax.Array:
    keys = jax.random.split(jax.random.key(0), step.shape[0])
    probs: jax.Array = jax.vmap(policy)(
        keys, observation_at(episodes, jnp.arange(step.shape[0]), step, past=past)
    )
    return probs


class _ProgressLog:
    """Speed and progress; what compiles is not counted into the speed once there is more."""

    def __init__(self, progress: Progress, blocks: int, total: int):
        self._progress, self._blocks, self._total = progress, blocks, total
        self._done, self._steps = 0, 0
        self._begun = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self._begun, 0)], maxlen=_RECENT + 1)

    def block(self, steps: int) -> None:
        self._done += 1
        self._steps += steps
        self._recent.append((time.monotonic(), self._steps))
        (before, then), (now, done) = self._recent[min(len(self._recent) - 2, 1)], self._recent[-1]
        speed = (done - then) / max(now - before, 1e-9)
        text = f"block {self._done} of {self._blocks}, {speed:,.0f} branch-steps/s"
        self._progress(text, self._steps / self._total)

    def seconds(self) -> float:
        return time.monotonic() - self._begun


_AVERAGED = (
    "sofa_mean", "sofa_change", "mortality_mean", "mortality_disagreement", "reward_mean",
    "reward_disagreement", "map_below_65", "map_ever_below_65", "lactate_clearance",
    "lactate_cleared_20", "ventilation", "vasopressor_level", "fluid_level", "projected_share",
    "in_unit", "plan_support", "support", "supported",
)  # fmt: skip


def summarise(folder: SweepFolder, sweep: Sweep) -> pd.DataFrame:
    """One row per plan: mean over the starts of each column, block by block; NaN where null.

    Args:
      folder: with every block.
      sweep: what was asked for.
    """
    wanted = [f"{name}_mean" for name in sweep.options.features] + list(_AVERAGED)
    if "lactate" not in sweep.options.features:
        wanted = [name for name in wanted if not name.startswith("lactate")]
    sums = np.zeros((len(sweep.names), len(wanted)))
    counts = np.zeros_like(sums)
    for block, table in folder.read(wanted):
        plans = list(sweep.grid.sections[block.section].plans)
        values = table.to_pandas().to_numpy(np.float64).reshape(block.size, len(plans), -1)
        sums[plans] += np.nansum(values, 0)
        counts[plans] += np.isfinite(values).sum(0)
    with np.errstate(invalid="ignore"):
        means = sums / counts
    summary = pd.DataFrame(means, columns=wanted)
    summary.insert(0, "plan", sweep.names)
    summary.insert(1, "kind", sweep.kinds)
    summary.insert(2, "starts", len(sweep.grid.starts.stay))
    return summary


def write_summary(path: Path, summary: pd.DataFrame, sweep: Sweep) -> None:
    """Writes summary.csv and sweep.png."""
    with atomic_file(path / "summary.csv") as temporary:
        summary.to_csv(temporary, index=False)
    options = sweep.options
    hours = options.horizon * sweep.world_model.step_hours
    groups = sweep.manifest["groups"]
    title = (
        f"after {hours:g} h: mean over {groups['starts']:,} starts of {groups['stays']:,} stays, "
        f"{options.samples} futures each.  Not for clinical use."
    )
    with atomic_file(path / "sweep.png") as temporary:
        sweep_figure(summary, title, temporary)
