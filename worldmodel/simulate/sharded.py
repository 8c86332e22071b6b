"""Branches in tasks of one fixed shape, distributed over the devices of a mesh.

A task is a member of the ensemble with some patients and some samples under every plan. All
tasks of a job have one shape and one program, whatever the device that gets them: the numbers
do not depend on how many devices there are (two or more; for a single one XLA compiles another
program, equal to rounding), on their order, or on where a job was resumed. Devices exchange
nothing.

On a CPU one device per core (`use_every_core`) is faster than one device of all cores: a task
whose rows fit the core's cache needs no other thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import WorldModel
from worldmodel.observation import PolicyFn, as_pytree, refuse_invalid
from worldmodel.resources import compiler_options, usable_cores
from worldmodel.simulate.history import History
from worldmodel.simulate.randomness import drawn_noise, under_plans, under_policy
from worldmodel.simulate.statistics import BranchSummary, empty_summary, finish_summary, fold_step
from worldmodel.simulate.stay_unroll import unroll_branches
from worldmodel.simulate.unroll import RolloutConfig, RolloutSpec, Shape

ModelT = TypeVar("ModelT")


AXIS = "branches"
_IN_FLIGHT = 2  # calls queued before the results of the first are read


# Branches that a device simulates at a time at most: what fits a core's cache, or fills an
# accelerator.
BRANCHES_PER_DEVICE = {"cpu": 512, "gpu": 131_072, "tpu": 65_536}

# Bytes of a call per branch on accelerators at the default widths, by the plans of their compilers
# (`benchmarks/compile_gpu.json`, `compile_tpu.json`; a test compares).
_BYTES_PER_BRANCH = {
    ("gpu", "recurrent", "xla"): 6_300,
    ("gpu", "recurrent", "pallas"): 11_600,
    ("gpu", "residual", "xla"): 24_500,
    ("gpu", "reference", "xla"): 21_800,
    ("tpu", "recurrent", "xla"): 8_300,
    ("tpu", "recurrent", "pallas"): 4_850,
}
_SHARE_OF_MEMORY = 0.8


def bytes_per_branch(config: ModelConfig, platform: str, kernel: str) -> float:
    """Bytes that a call takes on an accelerator for each branch that it simulates.

    Args:
      config: of the world model.
      platform: "gpu" or "tpu".
      kernel: as of `RolloutConfig`; with "auto" the one that takes more is meant.
    """
    plans = {
        (place, found): size
        for (place, variant, found), size in _BYTES_PER_BRANCH.items()
        if variant == config.variant
    }
    known = [size for place, size in plans.items() if place == (platform, kernel)]
    most = max(known or plans.values())
    return most * max(config.hidden / ModelConfig().hidden, 1.0)


def branches_per_device(config: ModelConfig, platform: str, kernel: str, memory: int | None) -> int:
    """Branches that a device simulates at a time by default: what it is fast with, and can hold.

    Args:
      config, platform, kernel: as of `bytes_per_branch`.
      memory: bytes that the device has for this process; None where nobody says.
    """
    most = BRANCHES_PER_DEVICE.get(platform, BRANCHES_PER_DEVICE["cpu"])
    if platform == "cpu" or memory is None:
        return most
    held = int(_SHARE_OF_MEMORY * memory / bytes_per_branch(config, platform, kernel))
    return min(most, 1 << max(held, 1).bit_length() - 1)


def device_memory() -> int | None:
    """Bytes that the default device has for this process; None where it does not say."""
    limit: int | None = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit


class Task(NamedTuple):
    """A device's share of a call; with a leading axis, one task per device."""

    patients: np.ndarray  # [p] int32 rows of the start
    samples: np.ndarray  # [c] int32 sample numbers, all of one member
    member: np.ndarray  # [] int32


def use_every_core() -> None:
    """Makes each core of a CPU a JAX device, and one core two; to be called before JAX is used.

    Does nothing once JAX has begun, or where XLA_FLAGS or JAX_NUM_CPU_DEVICES have decided.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    with suppress(RuntimeError):  # JAX has begun
        jax.config.update("jax_num_cpu_devices", max(usable_cores(), 2))


def branch_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, "branches", over this process's devices or those given."""
    return Mesh(np.array(devices or jax.local_devices()), (AXIS,))


class ShardedRollout:
    """Simulates tasks of one shape, one per device of the mesh at a time.

    Args:
      world_model: to simulate with, copied to every device.
      mesh: from `branch_mesh`.
      shape: branches p, K, c of a task; K = 1 for a policy.
      config: what is compiled.
      policy: `(key, observation) -> [25]`; None where plans are given.
    """

    def __init__(
        self,
        world_model: WorldModel,
        mesh: Mesh,
        shape: Shape,
        config: RolloutConfig,
        policy: PolicyFn | None = None,
    ):
        self.mesh, self.shape, self.config = mesh, shape, config
        past = getattr(policy, "past", 0)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._constant = jax.device_put((world_model, policy and as_pytree(policy)), everywhere)
        self.call = sharded_call(mesh, shape, config, past=past)

    def __call__(
        self, key: jax.Array, start: History, plans: jax.Array | None, tasks: Task
    ) -> BranchSummary:
        """Simulates one task per device.

        Args:
          key: of the whole job; noise is folded in by patient, step and sample.
          start: patients that the tasks point into.
          plans: [patients, K, H] joint actions; None for a policy.
          tasks: leaves with a leading axis of the devices D.

        Returns:
          Leaves [D, p, K, c, ...], sharded over the mesh and perhaps still being computed.
        """
        world_model, policy = self._constant
        result: BranchSummary = self.call(world_model, policy, key, start, plans, tasks)
        return result


@lru_cache(maxsize=32)
def sharded_call(
    mesh: Mesh, shape: Shape, config: RolloutConfig, *, past: int = 0
) -> Any:  # a jitted function, which has no exact type
    """The jitted function behind a `ShardedRollout`, for ahead-of-time compilation.

    Equal arguments give the same function, which then need not be compiled again.

    Returns:
      `f(world_model, policy or None, key, start, plans or None, tasks) -> BranchSummary`, the
      tasks and the result sharded over the mesh, the rest replicated.
    """

    def of_device(
        world_model: WorldModel,
        policy: PolicyFn | None,
        key: jax.Array,
        start: History,
        plans: jax.Array | None,
        tasks: Task,
    ) -> BranchSummary:
        task = jax.tree.map(lambda leaf: leaf[0], tasks)
        member = replace(
            world_model,
            state_model=_pick(world_model.state_model, task.member),
            outcome_model=_pick(world_model.outcome_model, task.member),
        )
        starts, own_plans = jax.tree.map(lambda leaf: leaf[task.patients], (start, plans))
        if own_plans is not None:
            treat = under_plans(own_plans)
        else:
            assert policy is not None
            treat = under_policy(policy, member, key, starts, task.samples, past=past)
        rolled = unroll_branches(
            member,
            starts,
            RolloutSpec(
                config=config,
                shape=shape,
                treat=treat,
                noise=drawn_noise(
                    key,
                    starts,
                    task.samples,
                    shape,
                    config.horizon,
                    common=config.common_noise,
                    width=world_model.noise_width,
                ),
                fold=partial(fold_step, features=config.features),
                folded=empty_summary(shape, config.features),
                looks_back=own_plans is None,
                platform=mesh.devices.flat[0].platform,
            ),
        )
        summary = finish_summary(rolled.folded, rolled.mortality, rolled.later_reward)
        result: BranchSummary = jax.tree.map(lambda leaf: leaf[None], summary)
        return result

    same, split = PartitionSpec(), PartitionSpec(AXIS)
    return jax.jit(
        jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(same, same, same, same, same, split),
            out_specs=split,
            check_vma=False,  # devices exchange nothing
        ),
        compiler_options=compiler_options(config.precision, mesh.devices.flat[0].platform),
    )


def task_shape(patients: int, plans: int, samples: int, members: int, *, branches: int) -> Shape:
    """The shape (p, K, c) of tasks that divide a job into about equal parts.

    Args:
      patients, plans, samples: of the job; samples over all members.
      members: ensemble size, which divides the samples.
      branches: at most so many per task, unless the plans alone are more.
    """
    own = samples // members
    size = -(-own // -(-own // max(branches // plans, 1)))
    return min(max(branches // (plans * size), 1), patients), plans, size


def rollout_block(
    sharded_rollout: ShardedRollout,
    key: jax.Array,
    start: History,
    plans: Int[Array, "P K H"] | None,
    samples: int,
) -> BranchSummary:
    """Every sample of every patient: numpy leaves [P, K, S, ...].

    Args:
      sharded_rollout: whose tasks cover the block.
      key: of the whole job.
      start: P patients.
      plans: [P, K, H] joint actions; None for a policy.
      samples: S, a multiple of the ensemble size E; sample s is simulated by member s mod E.

    Raises:
      InputError: the policy gives no 25 finite probabilities that sum to 1.
    """
    world_model, _ = sharded_rollout._constant
    num_plans = sharded_rollout.shape[1]
    count = start.step.shape[0]
    tasks = list(_tasks(count, samples, world_model.num_members, sharded_rollout.shape))
    devices = sharded_rollout.mesh.devices.size
    whole: BranchSummary | None = None

    def write(found: BranchSummary, group: list[Task]) -> None:
        nonlocal whole
        leaves, structure = jax.tree.flatten(jax.device_get(found))
        if whole is None:
            whole = jax.tree.unflatten(
                structure,
                [np.empty((count, num_plans, samples, *x.shape[4:]), x.dtype) for x in leaves],
            )
        for device, task in enumerate(group):
            index = np.ix_(task.patients, np.arange(num_plans), task.samples)
            for kept, leaf in zip(jax.tree.leaves(whole), leaves, strict=True):
                kept[index] = leaf[device]

    queue: deque[tuple[BranchSummary, list[Task]]] = deque()
    for first in range(0, len(tasks), devices):
        group = tasks[first : first + devices]
        # A device without a task of its own repeats the last one; the result is not used.
        padded = group + group[-1:] * (devices - len(group))
        queue.append((sharded_rollout(key, start, plans, _together(padded)), group))
        if len(queue) > _IN_FLIGHT:
            write(*queue.popleft())
    while queue:
        write(*queue.popleft())
    assert whole is not None
    if plans is None:
        refuse_invalid(np.isnan(whole.shaping))
    return whole


def _tasks(count: int, samples: int, members: int, shape: Shape) -> Iterator[Task]:
    """Tasks that cover a block; the last ones repeat entries to keep the shape."""
    patients, _, size = shape
    own = samples // members
    for first in range(0, count, patients):
        rows = np.minimum(np.arange(first, first + patients), count - 1).astype(np.int32)
        for member in range(members):
            for begin in range(0, own, size):
                ids = np.minimum(np.arange(begin, begin + size), own - 1)
                yield Task(rows, (ids * members + member).astype(np.int32), np.array(member))


def _together(tasks: list[Task]) -> Task:
    return Task(*(np.stack(parts) for parts in zip(*tasks, strict=True)))


def _pick(model: ModelT, member: jax.Array) -> ModelT:
    picked: ModelT = jax.tree.map(lambda leaf: leaf[member][None], model)
    return picked
