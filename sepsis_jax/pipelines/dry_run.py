"""What a job would take, before it is begun: work, time, memory and disk.

Each function returns lines of (what, amount) for a table.
"""

from __future__ import annotations

import resource
import sys
import time
from io import BytesIO
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq

from sepsis_jax.pipelines.agent import EMBEDDED, SYNTHETIC_PATIENTS, AgentOptions, BackendOptions
from sepsis_jax.pipelines.llm.memory_plan import Hardware, Start
from sepsis_jax.pipelines.llm.setup import ModelOptions
from sepsis_jax.pipelines.sweep import RolloutCache, block_table
from sepsis_jax.pipelines.sweep_request import SweepOptions, load_sweep
from worldmodel import schema
from worldmodel.episode_files import load_episodes, load_scaler
from worldmodel.models.training import TrainConfig
from worldmodel.models.windows import every_step_index, require_transitions, transition_index
from worldmodel.models.world_model import init_world_model
from worldmodel.synthetic.world import Config

Lines = list[tuple[str, str]]


def sweep_lines(
    episodes: Path, model: Path, options: SweepOptions, *, behavior: Path | None = None
) -> Lines:
    """Simulates one block, writes nothing, and says what all of them would take.

    Raises:
      InputError: as `run_sweep` for its inputs.
    """
    sweep = load_sweep(episodes, model, options, behavior)
    grid, groups = sweep.grid, sweep.manifest["groups"]
    rollouts = RolloutCache(sweep)
    block = grid.blocks[0]
    table = block_table(sweep, rollouts, block)  # compiles
    begun = time.monotonic()
    table = block_table(sweep, rollouts, block)
    speed = grid.branch_steps(block) / (time.monotonic() - begun)
    written = BytesIO()
    pq.write_table(table, written, compression="zstd")
    rows = groups["starts"] * len(sweep.names)
    return [
        ("stays, starts, plans", f"{groups['stays']:,}, {groups['starts']:,}, {len(sweep.names)}"),
        ("branch-steps", f"{groups['branch_steps']:,} in {groups['blocks']:,} blocks"),
        ("speed of one block", f"{speed:,.0f} branch-steps/s"),
        ("time", _time(groups["branch_steps"] / speed)),
        ("memory at its most", _gib(_peak_memory())),
        ("on disk", f"{rows:,} rows, {rows * written.tell() / table.num_rows / 1e6:,.1f} MB"),
    ]


def training_lines(episodes_path: Path, config: TrainConfig) -> Lines:
    """Updates at most, parameters and memory of the training of a world model.

    Raises:
      InputError: the episodes cannot be read, or a split has no transitions.
    """
    episodes, scaler = load_episodes(episodes_path), load_scaler(episodes_path)
    train = episodes.of_split(schema.SPLITS[0])
    transitions = require_transitions(transition_index(train), schema.SPLITS[0])
    model = jax.eval_shape(
        lambda key: init_world_model(
            key, scaler, config.model, members=config.members, stay_steps=episodes.num_steps
        ),
        jax.random.key(0),
    )
    if config.model.variant == "recurrent":
        work = {"both models": (config.stays, train.num_stays)}
    else:
        outcomes = len(every_step_index(train)) if config.resolved_prefixes else train.num_stays
        work = {
            "State Model": (config.state, len(transitions)),
            "Outcome Model": (config.outcome, outcomes),
        }
    lines = [
        ("stays, transitions to learn from", f"{train.num_stays:,}, {len(transitions):,}"),
        ("members", f"{config.members}"),
    ]
    for name, (fit, windows) in work.items():
        updates, batch = fit.updates(windows)
        lines.append((f"updates, {name}", f"{fit.epochs} epochs x {updates:,} of {batch} at most"))
    held = _bytes((model.state_model, model.outcome_model))
    data = _bytes(episodes)
    return [
        *lines,
        ("parameters", f"{held / 4:,.0f} with all members"),
        ("parameters, best ones, moments, gradients", _mib(5 * held)),
        ("episodes", _mib(data)),
    ]


def agent_lines(options: AgentOptions, backend: BackendOptions, episodes: Path | None) -> Lines:
    """Decisions and replies at most, and the memory of an embedded model.

    Args:
      options, backend: of the run.
      episodes: folder of recorded stays, if the patients are those.

    Raises:
      InputError: the episodes or the model's folder cannot be read.
    """
    if episodes is None:
        lengths = np.full(options.patients or SYNTHETIC_PATIENTS, Config.horizon)
    else:
        lengths = np.asarray(options.chosen(load_episodes(episodes)).length)
    decisions = int(np.minimum(lengths, options.max_steps or lengths.max()).sum())
    patients = len(lengths)
    dialogue = options.dialogue
    replies = dialogue.max_simulations + dialogue.max_invalid + 1
    length = dialogue.sampling.max_completion_length
    lines = [
        ("patients", f"{patients:,}, {min(options.concurrency, patients)} at a time"),
        ("decisions", f"{decisions:,} at most"),
        ("replies", f"{decisions * replies:,} at most ({replies} a decision)"),
        ("tokens of a reply", f"{length:,} at most"),
    ]
    if backend.kind == EMBEDDED:
        start = Start.load(Path(str(backend.llm)))
        model, config = start.model(ModelOptions(), Hardware.of(devices=1)), start.config
        width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        token = width * jnp.dtype(start.dtype).itemsize
        lines += [
            ("weights", _mib(model.weights((1, 1, 1)))),
            ("keys and values", f"{token / 1e3:,.1f} kB per token of context"),
        ]
    return lines


def _bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _peak_memory() -> float:
    """Bytes of the fullest device, or of this process where devices do not say."""
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max((int(stats.get("peak_bytes_in_use", 0)) for stats in told), default=0)
    unit = 1 if sys.platform == "darwin" else 1024
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
