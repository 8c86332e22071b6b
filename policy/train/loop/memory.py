"""Device memory of training and sampling a Qwen3, from shapes alone.

What lies in memory all the time (parameters, moments) is exact. What comes and goes is a formula,
whose factors were fitted to XLA's own plans: of small models on CPUs, and of Qwen3-4B compiled for
TPUs (`benchmarks/train_step_tpu.json`); tests compare both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.typing import DTypeLike

from policy.qwen3.attention import CPU_SLOTS, SCORES_AT_ONCE
from policy.qwen3.config import Qwen3Config
from policy.qwen3.logprobs import LOGITS_AT_ONCE
from policy.qwen3.lora import add_adapters
from policy.qwen3.model import MLP_TOKENS, Qwen3
from policy.qwen3.sampler import SMALLEST_BUCKET, prefill_width
from policy.qwen3.sharding import AXES, abstract, bytes_per_device, check_divisible
from policy.train.loop.optimizer import LearnerConfig, Params, State, initial_state
from worldmodel.resources import bucket

RESERVE = 2**30
"""Bytes for world model, patients, programs and fragments."""

# Values per token by `remat`: times the MLP's width, the model's, that of queries, that of keys.
_SAVED = {"none": (2.0, 2.0, 2.0, 2.0), "dots": (2.0, 2.0, 1.0, 2.0), "full": (0.0, 1.0, 0.0, 0.0)}
_BACKWARD = {
    "none": (7.0, 6.5, 3.5, 4.5), "dots": (7.0, 6.5, 3.5, 4.5), "full": (7.5, 9.5, 6.0, 6.0),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model to be trained, as shapes on a mesh of absent devices.

    Attributes:
      config: its figures.
      dtype: of activations and products.
      param_dtype: of the files.
      lora_rank: rank of adapters that alone are trained; 0 trains all.
      mesh: devices along data, fsdp and tensor.
    """

    config: Qwen3Config
    dtype: str
    param_dtype: str
    lora_rank: int
    mesh: tuple[int, int, int]

    @property
    def trainable(self) -> nnx.filterlib.Filter:
        """Filter of NNX."""
        return nnx.LoRAParam if self.lora_rank else nnx.Param

    def make(self) -> Qwen3:
        """The model; to be called under `jax.eval_shape`."""
        model = Qwen3(self.config, dtype=self.dtype, param_dtype=self.param_dtype, rngs=nnx.Rngs(0))
        if not self.lora_rank:
            return model
        return add_adapters(model, rank=self.lora_rank, alpha=1.0, rngs=nnx.Rngs(0))

    def trained(self) -> Params:
        """Parameters that are trained."""
        params: Params = nnx.split(self.make(), self.trainable, ...)[1]
        return params

    def frozen(self) -> Params:
        """Parameters that are not."""
        params: Params = nnx.state(self.make(), nnx.Not(self.trainable))
        return params

    def on(self, mesh: tuple[int, int, int]) -> AbstractMesh:
        """A mesh without devices.

        Raises:
          InputError: the model does not divide over it.
        """
        found = AbstractMesh(mesh, AXES, axis_types=(AxisType.Auto,) * 3)
        check_divisible(self.config, found)
        return found

    def weights(self, mesh: tuple[int, int, int], dtype: DTypeLike | None = None) -> int:
        """Bytes per device of all parameters, in a type instead of that of the files."""
        shapes = abstract(lambda: nnx.state(self.make(), nnx.Param), self.on(mesh))
        return _bytes(shapes, dtype)

    def copies(self, mesh: tuple[int, int, int], dtype: DTypeLike) -> int:
        """Bytes per device of a copy of the trained parameters in a type."""
        return _bytes(abstract(self.trained, self.on(mesh)), dtype)

    def layers(self, mesh: tuple[int, int, int]) -> int:
        """Bytes per device of all parameters of the layers."""
        return _bytes(abstract(lambda: nnx.state(self.make().layers), self.on(mesh)), None)


def _bytes(shapes: object, dtype: DTypeLike | None) -> int:
    return bytes_per_device(
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding), shapes
        )
    )


def kept(model: Model, config: LearnerConfig) -> dict[str, int]:
    """Bytes per device that a learner holds between two updates, by part."""
    mesh = model.on(model.mesh)

    def state() -> State:
        return initial_state(model.trained(), config)

    found = abstract(state, mesh)
    frozen = bytes_per_device(abstract(model.frozen, mesh))
    parts = {
        "parameters": bytes_per_device(found.params) + frozen,
        "moments": bytes_per_device(found.optimizer),
    }
    if model.lora_rank:
        parts = {
            "frozen weights": frozen,
            "adapters": bytes_per_device(found.params),
            "moments of adapters": parts["moments"],
        }
    return parts


def update(
    model: Model,
    config: LearnerConfig,
    *,
    rows: int,
    length: int,
    remat: str,
    in_place: bool = True,
) -> dict[str, int]:
    """Bytes per device that an update takes beside what is kept, by part.

    Args:
      model: the model.
      config: of the learner.
      rows: of a micro-batch, over all devices.
      length: tokens per row.
      remat: as for `Qwen3.hidden`.
      in_place: the device rounds bfloat16 parameters and moments where they lie, as accelerators
        do; CPUs keep them once more.
    """
    figures = model.config
    data, fsdp, tensor = model.mesh
    own = rows / (data * fsdp)
    tokens = own * length
    size = jnp.dtype(model.dtype).itemsize
    mesh = model.on(model.mesh)
    shapes = abstract(lambda: initial_state(model.trained(), config).params, mesh)
    wide = _bytes(shapes, jnp.float32)
    several = config.gradient_accumulation_steps > 1
    # Beside the sum, the gradient of a micro-batch.
    micro = bytes_per_device(shapes) if several else 0
    inner = figures.num_attention_heads * figures.head_dim / tensor
    outer = figures.num_key_value_heads * figures.head_dim / tensor
    hidden, wide_hidden = figures.hidden_size, figures.intermediate_size / tensor
    sizes = (wide_hidden, hidden, inner, outer)
    saved = tokens * size * float(np.dot(_SAVED[remat], sizes))
    at_once = min(1.0, MLP_TOKENS / length) if remat == "full" else 1.0
    layer = tokens * size * float(np.dot(_BACKWARD[remat], (at_once * wide_hidden, *sizes[1:])))
    matrices = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    table = 4 * figures.vocab_size * hidden / tensor
    of_layers = max(matrices - figures.vocab_size * hidden, 0) / figures.num_hidden_layers
    logits = 4 * min(rows * length * figures.vocab_size, LOGITS_AT_ONCE) / (data * fsdp * tensor)
    if fsdp > 1:
        # A copy in the type of products, where parameters have another.
        cast = config.param_dtype != model.dtype and not model.lora_rank
        copies = 0.5 if model.lora_rank else float(cast)
        backward = 0.85 * layer + copies * model.weights(model.mesh, model.dtype)
    else:
        tables = 0.5 if model.lora_rank else 3.0  # no gradient of the table
        backward = max(tables * table + 4.25 * logits, layer)
    stepped = 0.0  # float32 is changed in place
    if "bfloat16" in (config.param_dtype, config.moment_dtype):
        # Float32 copies and random bits of a layer or the embeddings.
        state = abstract(lambda: initial_state(model.trained(), config), mesh)
        part = wide / figures.num_hidden_layers
        if not model.lora_rank:
            part = max(table, 4 * of_layers / tensor) / fsdp
        stepped = 9 * part + (0 if in_place else bytes_per_device(state))
    activations = figures.num_hidden_layers * saved
    found = {"gradients": wide}
    if micro + activations + backward < stepped:
        return found | {"optimizer": int(stepped)}
    return found | {
        "gradients of a micro-batch": micro,
        "activations": int(activations),
        "backward pass": int(backward),
    }


def sampling(
    model: Model,
    mesh: tuple[int, int, int],
    *,
    rows: int,
    prompt: int,
    new: int,
    cache_tokens: int,
    prefix_rows: int = 0,
    on_cpu: bool = False,
) -> dict[str, int]:
    """Bytes per device that a batch of the embedded sampler takes beside its weights, by part.

    Args:
      model: the model.
      mesh: of the sampler's devices.
      rows: of a batch at most.
      prompt, new: slots of the cache per row, for the longest prompt and for new tokens.
      cache_tokens, prefix_rows: as for `EmbeddedGenerator`.
      on_cpu: slots of the cache are read `CPU_SLOTS` at a time; accelerators read as many as
        `SCORES_AT_ONCE` allows.
    """
    figures = model.config
    data, fsdp, tensor = mesh
    share, size = data * fsdp * tensor, jnp.dtype(model.dtype).itemsize
    slots = min(rows * (prompt + new), cache_tokens or rows * (prompt + new))
    slots += prefix_rows * (prompt + new)
    per_layer = 2 * slots * figures.num_key_value_heads * figures.head_dim * size / share
    # Shorter prompts may be read in larger parts.
    widths = {bucket(width, digits=2) for width in range(SMALLEST_BUCKET, prompt, SMALLEST_BUCKET)}
    read = rows * max(prefill_width(rows, width) for width in {*widths, prompt})
    through = 3 * figures.hidden_size + 2 * figures.num_attention_heads * figures.head_dim
    mlp = read * size * 3 * figures.intermediate_size
    at_once = min(prompt + new, CPU_SLOTS if on_cpu else prompt + new)
    scores = min(read * figures.num_attention_heads * at_once, SCORES_AT_ONCE)
    attention = (2 if on_cpu else 3) * 4 * scores
    return {
        "key-value cache": int(figures.num_hidden_layers * per_layer),
        "reading prompts": int((read * size * through + max(mlp, attention)) / share),
        "drawing": int(6 * 4 * rows * figures.vocab_size / share),
    }


@dataclass(frozen=True)
class Budget:
    """Bytes per device of a job.

    Attributes:
      kept: what is there all the time.
      phases: what comes and goes, by phase.
      together: whether the phases overlap.
    """

    kept: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    together: bool = False

    @property
    def peak(self) -> int:
        """Bytes at most."""
        of_phases = [sum(parts.values()) for parts in self.phases.values()]
        most = sum(of_phases) if self.together else max(of_phases, default=0)
        return sum(self.kept.values()) + most + RESERVE

    def rows(self) -> list[tuple[str, str, float]]:
        """When, what, and GiB."""
        parts = [("always", name, size) for name, size in self.kept.items()]
        parts += [
            (phase, name, size)
            for phase, found in self.phases.items()
            for name, size in found.items()
        ]
        parts += [("always", "reserve", RESERVE), ("", "peak", self.peak)]
        return [(when, name, size / 2**30) for when, name, size in parts if size]
