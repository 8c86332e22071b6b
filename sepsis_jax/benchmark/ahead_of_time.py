"""Programs compiled for devices that are not there: GPUs by their figures, TPUs by their topology.

The compilers of `jax[cuda13]` and `jax[tpu]` run on any x86 Linux host. Nothing is allocated and
nothing runs: arguments are shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from policy.qwen3.config import Qwen3Config
from policy.qwen3.lora import add_adapters
from policy.qwen3.model import Qwen3
from policy.qwen3.sampler import Settings, draw_replies, read_prompts
from policy.qwen3.sharding import abstract, batch_sharding, shardings
from policy.train.data.packing import Rows
from policy.train.loop.optimizer import LearnerConfig, Params, initial_state, update
from policy.train.losses import cross_entropy
from sepsis_jax.benchmark.programs import traffic
from sepsis_jax.ope.bootstrap import block_shapes, from_counts, join
from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import ESTIMATORS, Batch, make_batch
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import published_scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.sharded import AXIS, Task, branch_mesh, sharded_call, task_shape
from worldmodel.simulate.unroll import RolloutConfig
from worldmodel.synthetic import generate

PATIENTS, PLANS = 64, 25


class Card(NamedTuple):
    """A GPU's figures by NVIDIA's data sheets (SXM); rates dense, of matrix products."""

    name: str
    memory: int  # bytes
    bandwidth: float  # bytes/s
    bfloat16: float  # FLOP/s
    tensorfloat32: float  # FLOP/s
    float32: float  # FLOP/s, without tensor cores


CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", 84_942_979_072, 3.35e12, 989e12, 494e12, 67e12),
    "h200": Card("NVIDIA H200", 150_754_820_096, 4.8e12, 989e12, 494e12, 67e12),
}


class Chip(NamedTuple):
    """A TPU's figures by Google's documentation; its FLOP/s: `metrics.peak_flops`."""

    memory: int  # bytes
    bandwidth: float  # bytes/s


CHIPS = {  # by kind of device
    "TPU v5 lite": Chip(16 * 2**30, 819e9),
    "TPU v5": Chip(95 * 2**30, 2765e9),
    "TPU v6 lite": Chip(32 * 2**30, 1640e9),
}

_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{name}"
"""


def gpu(card: str) -> list[jax.Device]:
    """One absent GPU; needs `jax[cuda13]`.

    Args:
      card: one of `CARDS`.
    """
    figures = CARDS[card]
    spec = _HOPPER.format(**figures._asdict())
    found = topologies.get_topology_desc(card, "cuda", target_config=spec, topology="1x1x1")
    return list(found.devices)


@dataclass(frozen=True)
class Sweep:
    """The program that `sepsis-jax sweep` runs, with one task per device.

    Attributes:
      variant: of the world model.
      precision: of matrix products, as for `RolloutConfig`.
      branches: per device.
      horizon: steps.
      members: of the ensemble.
      kernel: as for `RolloutConfig`.
    """

    variant: str
    precision: str
    branches: int
    horizon: int = 24
    members: int = 3
    kernel: str = "xla"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Patients, plans and samples of a task: many samples per patient and plan."""
        return task_shape(PATIENTS, PLANS, 10**6, 1, branches=self.branches)

    def lower(self, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
        """The lowered program."""
        mesh = branch_mesh(devices)
        config = RolloutConfig(self.horizon, precision=self.precision, kernel=self.kernel)
        call = sharded_call(mesh, self.shape, config)
        lowered: jax.stages.Lowered = call.lower(*self._arguments(mesh))
        return lowered

    def counted(
        self, program: jax.stages.Compiled, *, bandwidth: float, products: float
    ) -> dict[str, float]:
        """Kernels of a call; bytes and FLOPs per branch-step, and what they allow at most.

        Args:
          program: compiled for a device.
          bandwidth: bytes/s of its memory.
          products: FLOP/s of its matrix products.
        """
        found = traffic(program.as_text() or "")
        steps = math.prod(self.shape) * self.horizon
        moved, flops = found.bytes / steps, found.flops / steps
        return {
            "kernels_per_call": found.kernels,
            "bytes_per_branch_step": round(moved),
            "flops_per_branch_step": round(flops),
            "branch_steps_by_bandwidth": bandwidth / moved,
            "branch_steps_by_products": products / flops,
        }

    def _arguments(self, mesh: Mesh) -> tuple[object, ...]:
        world_model = init_world_model(
            jax.random.key(0),
            published_scaler(),
            ModelConfig(variant=self.variant),
            members=self.members,
        )
        episodes, _ = generate(jax.random.key(1), PATIENTS, keep_latent=False)
        start = start_history(world_model, episodes, 0)
        plans = jnp.zeros((PATIENTS, PLANS, self.horizon), jnp.int32)
        devices = mesh.devices.size
        tasks = Task(
            np.zeros((devices, self.shape[0]), np.int32),
            np.zeros((devices, self.shape[2]), np.int32),
            np.zeros(devices, np.int32),
        )

        def shaped(tree: object, spec: PartitionSpec) -> object:
            sharding = NamedSharding(mesh, spec)
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
            )

        everywhere = PartitionSpec()
        return (
            shaped(world_model, everywhere),
            None,
            shaped(jax.random.key(0), everywhere),
            shaped(start, everywhere),
            shaped(plans, everywhere),
            shaped(tasks, PartitionSpec(AXIS)),
        )


@dataclass(frozen=True)
class Update:
    """The program that `Learner.update` runs: cross-entropy of packed rows and AdamW.

    Attributes:
      param_dtype: of parameters and moments; bfloat16 is rounded stochastically.
      rows: of a micro-batch, over all devices.
      accumulate: micro-batches of an update.
      length: tokens per row.
      remat: as for `Qwen3.hidden`.
      lora: rank of adapters on bfloat16 weights; 0 trains all parameters.
    """

    param_dtype: str
    rows: int
    accumulate: int
    length: int = 8192
    remat: str = "full"
    lora: int = 0

    def lower(self, config: Qwen3Config, mesh: Mesh) -> jax.stages.Lowered:
        """The lowered program for a model on a mesh."""
        trainable = nnx.LoRAParam if self.lora else nnx.Param
        learning = LearnerConfig(
            gradient_accumulation_steps=self.accumulate,
            param_dtype=self.param_dtype,
            moment_dtype=self.param_dtype,
        )

        def make() -> Qwen3:
            kept = jnp.bfloat16 if self.lora else jnp.float32
            model = Qwen3(config, dtype=jnp.bfloat16, param_dtype=kept, rngs=nnx.Rngs(0))
            if self.lora:
                return add_adapters(model, rank=self.lora, alpha=float(self.lora), rngs=nnx.Rngs(1))
            return model

        def split() -> tuple[object, Params, Params]:
            graphdef, trained, *rest = nnx.split(make(), trainable, ...)
            return graphdef, trained, rest[0]

        graphdef, *_ = nnx.split(nnx.eval_shape(make), trainable, ...)
        state = abstract(lambda: initial_state(split()[1], learning), mesh)
        frozen = abstract(lambda: split()[2], mesh)
        (rows,) = batch_sharding(mesh).spec
        where = NamedSharding(mesh, PartitionSpec(None, rows))
        shape = (self.accumulate, self.rows, self.length)
        batch = Rows(
            *(
                cast(jax.Array, jax.ShapeDtypeStruct(shape, dtype, sharding=where))
                for dtype in (jnp.int32, jnp.int32, jnp.int32, jnp.bool_)
            )
        )
        loss = partial(cross_entropy, remat=self.remat)
        everywhere = NamedSharding(mesh, PartitionSpec())
        step = jax.jit(
            partial(update, graphdef, loss, learning),
            donate_argnums=0,
            out_shardings=(shardings(state, mesh), everywhere, everywhere),
        )
        with jax.set_mesh(mesh):
            return step.lower(state, frozen, batch)


@dataclass(frozen=True)
class Sampling:
    """The programs of the embedded sampler: one reads prompts, the other draws after them.

    Attributes:
      rows: of a batch.
      prompt, new: tokens per row that are read, and that are drawn at most.
    """

    rows: int
    prompt: int
    new: int

    def lower(self, config: Qwen3Config, mesh: Mesh) -> dict[str, jax.stages.Lowered]:
        """The lowered programs for a model in bfloat16 on a mesh, by what they do."""

        def make() -> Qwen3:
            return Qwen3(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

        graphdef = nnx.graphdef(nnx.eval_shape(make))
        state = abstract(lambda: nnx.split(make())[1], mesh)
        where = NamedSharding(mesh, PartitionSpec())
        shaped = partial(_shaped, where)
        numbers = shaped((self.rows,), jnp.int32)
        settings = Settings(
            length=numbers, limit=numbers, seed=shaped((self.rows, 2), jnp.uint32),
            temperature=shaped((self.rows,), jnp.float32), top_p=None,
            stop_ids=shaped((8,), jnp.int32),
        )  # fmt: skip
        ids = shaped((self.rows, self.prompt), jnp.int32)
        with jax.set_mesh(mesh):
            reading = read_prompts.lower(
                graphdef, state, None, ids, numbers, numbers, slots=self.prompt + self.new
            )
            last, cache = jax.tree.map(lambda x: shaped(x.shape, x.dtype), reading.out_info)
            drawing = draw_replies.lower(
                graphdef, state, None, settings, last, cache, most=self.new
            )
        return {"reading prompts": reading, "drawing": drawing}


@dataclass(frozen=True)
class Bootstrap:
    """Estimators of off-policy evaluation in resamples of stays, which take most of its time.

    Attributes:
      stays, steps, policies: of the data.
      resamples: at once.
    """

    stays: int
    steps: int
    policies: int
    resamples: int = 512

    def lower(self, device: jax.Device) -> jax.stages.Lowered:
        """The lowered program of all estimators that need no fitted values."""
        names = tuple(name for name, one in ESTIMATORS.items() if not one.needs)

        def joined() -> tuple[Batch, jax.Array]:
            stays = jnp.zeros((self.stays, self.steps))
            data = OPEData(
                reward=stays, alive=stays == 0, action=stays.astype(jnp.int32), behavior_prob=stays
            )
            batch = make_batch(data, jnp.zeros((self.policies, *stays.shape)))
            return batch, join(batch, names)[0]

        shaped = partial(_shaped, SingleDeviceSharding(device))
        batch, table = jax.tree.map(lambda x: shaped(x.shape, x.dtype), jax.eval_shape(joined))
        blocks = jax.eval_shape(partial(block_shapes, names=names), batch)
        lowered: jax.stages.Lowered = from_counts.lower(
            shaped((self.resamples, self.stays), jnp.uint8), table, batch, None, names=names,
            widths=tuple((block, shape.shape[-1]) for block, shape in blocks.items()), levels=(),
        )  # fmt: skip
        return lowered


def _shaped(where: Sharding, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return cast(jax.Array, jax.ShapeDtypeStruct(shape, dtype, sharding=where))


def bytes_planned(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes per device that a compiler plans for, by part, and their `peak`.

    Of the compiler for TPUs the temporaries are what its plan of the heap has beside the rest.
    Its own count of them is larger, and not what it compares with the chip: for a v5e, which has
    16 GiB, it compiles a train step that takes 18.7 GiB by that count, and 12.7 by the plan.
    """
    memory = program.memory_analysis()
    assert memory is not None  # of a device
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    given_away = memory.alias_size_in_bytes
    kept = arguments + outputs - given_away
    (device, *_) = jax.tree.leaves(program.input_shardings)[0].device_set
    tpu = device.platform == "tpu"
    temporaries = memory.peak_memory_in_bytes - kept if tpu else memory.temp_size_in_bytes
    code = memory.generated_code_size_in_bytes
    return {
        "arguments": arguments,
        "outputs": outputs,
        "given_away": given_away,
        "temporaries": temporaries,
        "code": code,
        "peak": kept + temporaries + code,
    }
