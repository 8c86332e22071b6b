"""JAX rollouts and environments as contenders of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepsis_jax.benchmark.setup import Workload
from sepsis_jax.benchmark.timing import Contender, seconds_of
from worldmodel import schema
from worldmodel.envs.env import EnvState, SepsisEnv
from worldmodel.episodes import Episodes
from worldmodel.models.world_model import WorldModel
from worldmodel.resources import compiler_options
from worldmodel.simulate.history import History
from worldmodel.simulate.rollout import CHART_FEATURES, rollout
from worldmodel.simulate.sharded import (
    ShardedRollout,
    branch_mesh,
    branches_per_device,
    device_memory,
    rollout_block,
    task_shape,
)
from worldmodel.simulate.step import advance
from worldmodel.simulate.unroll import RolloutConfig


def checksum(found: object) -> float:
    """Sum of everything that was returned, NaN left out."""
    return float(sum(np.nansum(np.asarray(leaf), dtype=np.float64) for leaf in _leaves(found)))


def _leaves(found: object) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(found) if hasattr(leaf, "shape")]


def plain_model(job: Workload) -> Contender:
    """The plain model: reads full windows in every step, in one jitted scan."""
    start, plans = job.flat()
    branches = job.shape.branches

    def run(world_model: WorldModel, start: History, key: jax.Array, plans: jax.Array) -> object:
        # what is kept depends on the model's outputs
        def step(history: History, inputs: tuple[jax.Array, jax.Array]) -> Any:
            h, action = inputs
            noise = jax.random.normal(jax.random.fold_in(key, h), (branches, schema.NUM_FEATURES))
            history, outputs = advance(world_model, history, action, noise, mode="corrected")
            return history, (*outputs, history.sofa, history.obs[:, -1, :3])

        history, kept = jax.lax.scan(step, start, (jnp.arange(job.horizon), plans.T))
        history = history.choose(plans[:, -1])
        window = history.window(schema.OUTCOME_WINDOW)
        return kept, jax.nn.sigmoid(world_model.mortality_logit(*window))

    arguments = (job.world_model, start)
    return _compiled("plain model", job, run, arguments, (jnp.asarray(plans),))


def jitted_rollout(
    job: Workload,
    name: str = "rollout",
    *,
    features: tuple[str, ...] = CHART_FEATURES,
    precision: str | None = None,
) -> Contender:
    """`rollout` in one jitted call."""

    def run(world_model: WorldModel, start: History, key: jax.Array) -> object:
        return rollout(
            world_model,
            key,
            start,
            job.plans,
            samples=job.shape.samples,
            features=features,
            precision=precision,
        )

    return _compiled(name, job, run, (job.world_model, job.start), (), precision=precision)


def _compiled(
    name: str,
    job: Workload,
    function: Callable[..., object],
    before: tuple[object, ...],
    after: tuple[object, ...],
    *,
    precision: str | None = None,
) -> Contender:
    """A contender that calls `function(*before, key, *after)`, compiled ahead."""
    options = compiler_options(precision)
    jitted = jax.jit(function, compiler_options=options)
    lower = partial(jitted.lower, *before, jax.random.key(0), *after)
    call, seconds = seconds_of(lambda: lower().compile())

    def run(repeat: int) -> object:
        return jax.block_until_ready(call(*before, jax.random.key(repeat + 1), *after))

    return Contender(
        name=name,
        run=run,
        work=job.steps,
        branches=job.shape.branches,
        checksum=checksum,
        compile_seconds=seconds,
        memory_bytes=_memory(call),
    )


def sharded(job: Workload, name: str = "sharded", *, precision: str | None = None) -> Contender:
    """`ShardedRollout`: tasks of one shape over all devices, summarised on the host."""
    mesh = branch_mesh()
    most = branches_per_device(
        job.world_model.config, jax.default_backend(), job.kernel, device_memory()
    )
    per_device = min(most, -(-job.shape.branches // mesh.devices.size))
    shape = task_shape(*job.shape, 1, branches=per_device)
    settings = RolloutConfig(
        horizon=job.horizon, features=CHART_FEATURES, precision=precision, kernel=job.kernel
    )
    sharded_rollout = ShardedRollout(job.world_model, mesh, shape, settings)
    plans = jnp.asarray(job.plans)

    def run(repeat: int) -> object:
        return rollout_block(
            sharded_rollout, jax.random.key(repeat + 1), job.start, plans, job.shape.samples
        )

    # The first call compiles; the second tells how much of the first was not compiling.
    _, first = seconds_of(lambda: run(0))
    _, second = seconds_of(lambda: run(0))
    return Contender(
        name=name,
        run=run,
        work=job.steps,
        branches=job.shape.branches,
        checksum=checksum,
        compile_seconds=max(first - second, 0.0),
    )


def _memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes of arguments, results and temporaries of a compiled call."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def drift(job: Workload, precision: str) -> dict[str, float]:
    """Difference in z-scores to float32 after the last step, with the same noise.

    Args:
      job: workload to simulate.
      precision: of matrix products, compared with "highest".
    """
    patients, _, samples = job.shape
    shape = (patients, samples, job.horizon, job.world_model.noise_width)
    noise = jax.random.normal(jax.random.key(7), shape)

    def last_row(precision: str) -> jax.Array:
        simulated = rollout(
            job.world_model, jax.random.key(0), job.start, job.plans,
            samples=samples, noise=noise, features=schema.FEATURE_NAMES, precision=precision,
            mortality=False,
        )  # fmt: skip
        return job.world_model.scaler.normalize(simulated.values[:, :, :, -1])

    difference = jnp.abs(last_row(precision) - last_row("highest"))
    return {"mean": float(difference.mean()), "max": float(difference.max())}


QUESTION = "agent's question"
_PLANS = np.arange(schema.NUM_ACTIONS, dtype=np.int32)[:, None]


def agent_questions(world_model: WorldModel, pool: History, samples: int) -> list[Contender]:
    """The question as `rollout` answers it, with and without mortality.

    Args:
      world_model: of one member.
      pool: patients; every repeat asks about each of the first eight.
      samples: per treatment, with common noise.
    """
    return [_question(world_model, pool, samples, mortality=value) for value in (False, True)]


def _question(
    world_model: WorldModel, pool: History, samples: int, *, mortality: bool
) -> Contender:
    count = pool.step.shape[0]
    patients = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], pool) for i in range(min(count, 8))]

    def run(repeat: int) -> object:
        # One after another, as an agent asks: a single call of some milliseconds would be timed
        # with the waking up of threads.
        for start in patients:
            found = jax.block_until_ready(
                rollout(
                    world_model,
                    jax.random.key(repeat + 1),
                    start,
                    _PLANS,
                    samples=samples,
                    mortality=mortality,
                )
            )
        return found

    _, first = seconds_of(lambda: run(0))
    _, second = seconds_of(lambda: run(0))
    return Contender(
        name=QUESTION + (", with mortality" if mortality else ""),
        run=run,
        work=len(patients),
        branches=schema.NUM_ACTIONS * samples,
        checksum=checksum,
        compile_seconds=max(first - second, 0.0),
    )


DECISIONS = 20  # per episode of the environment


def environment(world_model: WorldModel, episodes: Episodes, *, each_step: bool) -> SepsisEnv:
    """Episodes of `DECISIONS` decisions from the first row of recorded stays.

    Args:
      world_model: of one member.
      episodes: stays to start from.
      each_step: ask the Outcome Model in each step; otherwise at the end of the episode alone.
    """
    return SepsisEnv.learned(
        world_model, episodes, horizon=DECISIONS - 1, mortality_each_step=each_step
    )


@partial(jax.jit, static_argnames="batch")
def random_episodes(env: SepsisEnv, key: jax.Array, batch: int) -> jax.Array:
    """Returns [batch] of episodes of `DECISIONS` decisions under random actions, in one call."""

    def one(key: jax.Array) -> jax.Array:
        state, _ = env.reset(key)
        actions = jax.random.randint(
            jax.random.fold_in(key, 1), (DECISIONS,), 0, schema.NUM_ACTIONS
        )

        def step(state: EnvState, action: jax.Array) -> tuple[EnvState, jax.Array]:
            state, timestep = env.step(state, action)
            return state, timestep.reward

        return jax.lax.scan(step, state, actions)[1].sum()

    return jax.vmap(one)(jax.random.split(key, batch))


def environment_steps(env: SepsisEnv, batch: int) -> Contender:
    """Episodes of `batch` patients side by side; the work is counted in steps of the environment.

    Args:
      env: from `environment`.
      batch: patients.
    """

    def run(repeat: int) -> object:
        return jax.block_until_ready(random_episodes(env, jax.random.key(repeat + 1), batch))

    return Contender(
        name=f"environment, {batch:,} patients",
        run=run,
        work=batch * DECISIONS,
        branches=batch,
        checksum=checksum,
    )
