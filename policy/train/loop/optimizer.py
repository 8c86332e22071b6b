"""One update: gradients summed over micro-batches, AdamW, and bfloat16 with stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from policy.qwen3.model import Qwen3
from policy.train.losses import Summed
from worldmodel.configuration import require
from worldmodel.errors import InputError

T = TypeVar("T")  # a PyTree of arrays

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class LearnerConfig:
    """Settings of the optimizer and of the training loop.

    Attributes:
      max_steps: updates; the schedule ends with the last.
      learning_rate: peak of a linear warm-up and a cosine decay.
      warmup_steps: updates until the peak.
      final_share: learning rate at the end, as a share of the peak.
      weight_decay: decoupled, on matrices only.
      adam_beta1, adam_beta2: decay of Adam's moments.
      max_grad_norm: bound on the global norm of the gradient.
      gradient_accumulation_steps: micro-batches per update; all their tokens have equal weight.
      logging_steps: updates between two reports, and between two checks of the loss.
      save_steps: updates between two checkpoints, a multiple of `logging_steps`; 0 for one at the
        end alone.
      param_dtype: of trained matrices; bfloat16 is rounded stochastically after each update.
        Norms are float32 in any case.
      moment_dtype: of Adam's moments of matrices, likewise.
      seed: of the rounding.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "steps": "max_steps",
        "warm_up": "warmup_steps",
        "beta1": "adam_beta1",
        "beta2": "adam_beta2",
        "clip_norm": "max_grad_norm",
        "accumulate": "gradient_accumulation_steps",
        "report_every": "logging_steps",
        "save_every": "save_steps",
    }

    max_steps: int = 1000
    learning_rate: float = 1e-5
    warmup_steps: int = 20
    final_share: float = 0.1
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    logging_steps: int = 10
    save_steps: int = 0
    param_dtype: str = "float32"
    moment_dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("max_steps", "gradient_accumulation_steps", "logging_steps")
        require(self, "at least 1", lambda n: n >= 1, *counts)
        require(
            self, "0 or more", lambda x: x >= 0, "learning_rate", "warmup_steps", "weight_decay"
        )
        require(self, "above 0", lambda x: x > 0, "max_grad_norm")
        require(self, "within [0, 1]", lambda x: 0 <= x <= 1, "final_share")
        require(self, "within [0, 1)", lambda x: 0 <= x < 1, "adam_beta1", "adam_beta2")
        require(self, f"one of {DTYPES}", DTYPES.__contains__, "param_dtype", "moment_dtype")
        if self.warmup_steps > self.max_steps:
            raise InputError(
                f"warmup_steps: got {self.warmup_steps}, more than the {self.max_steps} steps"
            )
        if self.save_steps < 0 or self.save_steps % self.logging_steps:
            raise InputError(
                f"save_steps: got {self.save_steps}, expected a multiple of logging_steps "
                f"({self.logging_steps}), so that no report spans a checkpoint; or 0"
            )


# a loss knows the type of its batches
Loss = Callable[[Qwen3, Any], Summed]
"""Of a model and a micro-batch."""


Params = nnx.State[Any, Any]
"""Trained parameters of a model."""


class State(NamedTuple):
    """What learning changes."""

    params: Params  # matrices in the configured type, the rest float32
    optimizer: optax.OptState
    step: jax.Array  # [] int32 updates made


def schedule(config: LearnerConfig) -> optax.Schedule:
    """The learning rate by update."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.max_steps, config.warmup_steps + 1),
        end_value=config.final_share * config.learning_rate,
    )


def optimizer(config: LearnerConfig) -> optax.GradientTransformation:
    """AdamW, for gradients that are clipped already."""
    return optax.chain(
        optax.identity(),  # where clipping has its place in the states of checkpoints
        optax.adamw(
            schedule(config),
            b1=config.adam_beta1,
            b2=config.adam_beta2,
            weight_decay=config.weight_decay,
            mask=partial(jax.tree.map_with_path, _is_matrix),
        ),
    )


def initial_state(params: Params, config: LearnerConfig) -> State:
    """The state before the first update.

    Args:
      params: of any type; matrices are rounded to the nearest.
    """
    params = _of_matrices(params, config.param_dtype)
    moments = optimizer(config).init(widen(params))
    return State(params, _of_matrices(moments, config.moment_dtype), jnp.int32(0))


def update(
    graphdef: nnx.GraphDef[Qwen3],
    loss: Loss,
    config: LearnerConfig,
    state: State,
    frozen: object,
    batch: object,
) -> tuple[State, Summed, jax.Array]:
    """One update.

    Args:
      graphdef, frozen: the model but for the parameters in `state`.
      loss: summed over a micro-batch; the gradient is that of the sum over all micro-batches,
        divided by their summed weight.
      config: as at `initial_state`.
      batch: PyTree of leaves [gradient_accumulation_steps, ...].

    Returns:
      The next state; the loss summed over the batch; the norm of the gradient before clipping.
    """

    def of_micro_batch(params: object, micro: object) -> tuple[jax.Array, Summed]:
        params = jax.tree.map_with_path(_sum_in_float32, params)
        summed = loss(nnx.merge(graphdef, params, frozen), micro)
        return summed.total, summed

    def add(so_far: T, micro: object) -> tuple[T, None]:
        gradient, summed = jax.grad(of_micro_batch, has_aux=True)(state.params, micro)
        total: T = jax.tree.map(jnp.add, so_far, (widen(gradient), summed))
        return total, None

    first = jax.tree.map(lambda leaf: leaf[0], batch)
    of_loss = jax.eval_shape(lambda micro: of_micro_batch(state.params, micro)[1], first)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), of_loss)
    no_gradient = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), state.params)
    (gradient, summed), _ = jax.lax.scan(add, (no_gradient, nothing), batch)
    divisor = jnp.maximum(summed.weight, 1.0)
    norm = optax.tree.norm(jax.tree.map(lambda leaf: leaf / divisor, gradient))
    stepped = _stepped(config, state, gradient, divisor, norm)
    return State(*stepped, state.step + 1), summed, norm


def _stepped(
    config: LearnerConfig, state: State, gradient: Params, divisor: jax.Array, norm: jax.Array
) -> tuple[Params, optax.OptState]:
    """AdamW's next parameters and moments, in the types they are kept in.

    Where bfloat16 is kept, stacked layers are computed one after another: of what is float32 on
    the way, and of the random bits, a layer's alone is in memory, where all at once would take
    nine times the parameters in float32.

    Args:
      config, state: of the learner.
      gradient: summed over the batch.
      divisor: of the gradient.
      norm: of the gradient after its division.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    before: Parts = (state.params, state.optimizer)

    def step(part: Parts, gradient: Params, key: jax.Array) -> Parts:
        params, moments = widen(part)
        clipped = jax.tree.map(partial(_clipped, config, divisor, norm), gradient)
        change, moments = optimizer(config).update(clipped, moments, params)
        return store((optax.apply_updates(params, change), moments), part, key)

    if "bfloat16" not in (config.param_dtype, config.moment_dtype):
        return step(before, gradient, key)

    def of_layer(layer: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
        part = _of_layer(before, leaves, layer)
        own = _of_layer(gradient, _stacked(gradient), layer)
        new = step(part, own, jax.random.fold_in(key, layer + 1))
        return [leaf.at[layer].set(x) for leaf, x in zip(leaves, _stacked(new), strict=True)]

    rest = iter(jax.tree.leaves(step(_rest(before), _rest(gradient), key)))
    stacked = _stacked(before)
    layers = iter(jax.lax.fori_loop(0, len(stacked[0]), of_layer, stacked) if stacked else ())
    result: Parts = jax.tree.map_with_path(
        lambda path, _: next(layers if _is_stacked(path) else rest), before
    )
    return result


Parts = tuple[Params, optax.OptState]


def _clipped(
    config: LearnerConfig, divisor: jax.Array, norm: jax.Array, summed: jax.Array
) -> jax.Array:
    leaf = summed / divisor
    return jnp.where(norm < config.max_grad_norm, leaf, leaf / norm * config.max_grad_norm)


def _is_stacked(path: tuple[object, ...]) -> bool:
    """Parameters of layers have a leading axis of layers."""
    return "layers" in jax.tree_util.keystr(path)


def _stacked(tree: object) -> list[jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in leaves if _is_stacked(path)]


def _rest(tree: T) -> T:
    """The tree without its stacked leaves."""
    result: T = jax.tree.map_with_path(lambda path, leaf: None if _is_stacked(path) else leaf, tree)
    return result


def _of_layer(tree: T, stacked: list[jax.Array], layer: jax.Array) -> T:
    """The tree with a layer of the stacked leaves, counters, and nothing else."""
    leaves = iter(stacked)

    def one(path: tuple[object, ...], leaf: jax.Array) -> jax.Array | None:
        if _is_stacked(path):
            return next(leaves)[layer]
        return None if leaf.ndim else leaf

    result: T = jax.tree.map_with_path(one, tree)
    return result


def _is_matrix(path: tuple[object, ...], leaf: object) -> bool:
    """Norms and biases of stacked layers have two axes too, so names tell."""
    name = jax.tree_util.keystr(path)
    return "scale" not in name and "bias" not in name


def _of_matrices(tree: T, dtype: str) -> T:
    def one(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.array(leaf)
        return jnp.array(leaf, dtype if _is_matrix(path, leaf) else jnp.float32)

    result: T = jax.tree.map_with_path(one, tree)
    return result


def _sum_in_float32(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
    """Outside of the layers: embeddings collect many gradients, one per token or chunk of logits.

    A layer's matrices get one each, whose sum is float32 within the product.
    """
    return leaf if _is_stacked(path) else widen(leaf)


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of its two neighbours in bfloat16; their mean over keys is x.

    Args:
      x: float32, any shape. What bfloat16 holds exactly stays, and so does what is not finite.
      key: each element's draw depends on the key and its index, not on how x is sharded.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)  # a carry out of the lower half rounds up
    rounded = jax.lax.bitcast_convert_type(cut, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def store(tree: T, like: object, key: jax.Array) -> T:
    """A tree in the types of another; float32 becomes bfloat16 by stochastic rounding.

    Args:
      tree: arrays.
      like: arrays of the same structure.
      key: leaves get keys of their own.
    """
    leaves, structure = jax.tree.flatten(tree)

    def one(index: int, x: jax.Array, old: jax.Array) -> jax.Array:
        if x.dtype == jnp.float32 and old.dtype == jnp.bfloat16:
            return round_stochastically(x, jax.random.fold_in(key, index))
        return x.astype(old.dtype)

    pairs = enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    result: T = jax.tree.unflatten(structure, [one(index, *pair) for index, pair in pairs])
    return result


def widen(tree: T) -> T:
    """A tree with bfloat16 as float32, and the rest as it is."""
    result: T = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
        tree,
    )
    return result
