"""Qwen3 and Llama in Flax NNX: one scan over stacked layers, for packed training and decoding.

Modules and parameters are named as in the Hugging Face checkpoints; kernels are [in, out]. The
architecture is that of Llama (arXiv 2407.21783): pre-norm, grouped-query attention, rotary
positions, SwiGLU; Qwen3 (arXiv 2505.09388) normalises queries and keys of each head as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from policy.qwen3.attention import CHECKPOINT_NAME, attend, attend_cache, map_chunks
from policy.qwen3.config import Qwen3Config
from policy.qwen3.sharding import constrain, on_own_share
from worldmodel import struct

S = TypeVar("S")  # PyTrees of arrays
T = TypeVar("T")
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, T]]

_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
# policies of `jax.checkpoint`, which have no exact type
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.save_from_both_policies(
        _dots, jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)
    ),
    "dots": _dots,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass keeps of a layer: matrix products and attention, so that only elementwise
values are computed again; matrix products; or the layer's input alone."""

MLP_TOKENS = 2048
"""Tokens of a row that go through the MLP at once where only a layer's input is kept. Its inner
values are the largest of a layer; fewer tokens would not hide the time that shared weights travel.
"""


@struct.dataclass
class Cache:
    """Keys and values of tokens read so far; a token's slot is its position."""

    k: jax.Array  # [L, B, K, D, S], as products with queries take them
    v: jax.Array  # [L, B, K, S, D]

    def write(
        self,
        layer: int | jax.Array,
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K D"],
        start: Int[Array, " B"],
    ) -> Cache:
        """Puts k, v [B, T, K, D] of a layer into slots `start[b]`, `start[b] + 1`, ...

        All must exist: of tokens beyond the last slot JAX would shift the whole row to the left.
        """

        def put(kept: jax.Array, new: jax.Array, start: jax.Array, axis: int) -> jax.Array:
            at = [layer, 0, 0, 0]  # of [L, K, ...], one row
            at[axis] = start
            return jax.lax.dynamic_update_slice(kept, new[None].astype(kept.dtype), at)

        def rows(axis: int) -> Callable[..., jax.Array]:
            return jax.vmap(partial(put, axis=axis), in_axes=(1, 0, 0), out_axes=1)

        return Cache(
            rows(3)(self.k, jnp.moveaxis(k, 1, 3), start),
            rows(2)(self.v, jnp.moveaxis(v, 1, 2), start),
        )


Caches = Cache | tuple[Cache, ...]
"""A cache of all layers, or one for each."""


class Linear(nnx.Module):
    """x @ kernel, plus a bias and a low-rank adapter where there are such."""

    def __init__(
        self,
        config: Qwen3Config,
        n_in: int,
        n_out: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        use_bias: bool = False,
    ):
        draw = jax.random.normal(rngs.params(), (n_in, n_out), dtype)
        self.kernel = nnx.Param(config.initializer_range * draw)
        zeros = nnx.Param(jnp.zeros(n_out, dtype)) if use_bias else None
        self.bias: nnx.Param[jax.Array] | None = nnx.data(zeros)
        self.adapter: Any = nnx.data(None)  # a policy.qwen3.lora.Adapter

    def __call__(self, x: Float[Array, "*b I"]) -> Float[Array, "*b O"]:
        """[..., O] product with the kernel, plus bias and adapter if there are any."""
        y = product(x, self.kernel[...].astype(x.dtype))
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return y if self.adapter is None else y + self.adapter(x)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, in float32."""

    def __init__(self, config: Qwen3Config, width: int, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """[..., D] normalised by the root mean square, in float32."""
        full = x.astype(jnp.float32)
        full = full * jax.lax.rsqrt(jnp.mean(full * full, axis=-1, keepdims=True) + self.eps)
        return (full * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention; what is attended to is the caller's."""

    def __init__(self, config: Qwen3Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(Linear, config, dtype=dtype, rngs=rngs, use_bias=config.attention_bias)
        inner = config.num_attention_heads * config.head_dim
        outer = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = linear(config.hidden_size, inner)
        self.k_proj = linear(config.hidden_size, outer)
        self.v_proj = linear(config.hidden_size, outer)
        self.o_proj = linear(inner, config.hidden_size)
        norm = partial(RMSNorm, config, config.head_dim, dtype=dtype)
        self.q_norm: RMSNorm | None = nnx.data(norm() if config.qk_norm else None)
        self.k_norm: RMSNorm | None = nnx.data(norm() if config.qk_norm else None)

    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend[T]
    ) -> tuple[jax.Array, T]:
        """[B, L, D] attention over the rows, and the new memory of keys and values."""
        batch, length, _ = x.shape

        def heads(y: jax.Array) -> jax.Array:
            y = y.reshape(batch, length, -1, self.head_dim)
            return constrain(y, "batch", "length", "heads", None)

        q, k = heads(self.q_proj(x)), heads(self.k_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        context, memory = attend(rotate(q, angles), rotate(k, angles), heads(self.v_proj(x)))
        return self.o_proj(context.reshape(batch, length, -1)), memory


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: Qwen3Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(Linear, config, dtype=dtype, rngs=rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """[B, L, D] SwiGLU of [B, L, D]."""
        inner = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(constrain(inner, "batch", "length", "mlp"))


class Layer(nnx.Module):
    """Attention and MLP, each on normed input and added to the stream."""

    def __init__(self, config: Qwen3Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, config.hidden_size, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        attend: Attend[T],
        at_once: int | None = None,
    ) -> tuple[jax.Array, T]:
        """[B, L, D] after attention and MLP, `at_once` tokens at a time, and the new memory."""
        attended, memory = self.self_attn(self.input_layernorm(x), angles, attend)
        x = constrain(x + attended, "batch", "length", "embed")

        def further(x: jax.Array) -> jax.Array:
            return x + self.mlp(self.post_attention_layernorm(x))

        if at_once is None or x.shape[1] <= at_once:
            x = further(x)
        else:
            x = map_chunks(further, x, at_once)
        return constrain(x, "batch", "length", "embed"), memory


class Embedding(nnx.Module):
    """A table [V, D] of token embeddings."""

    def __init__(self, config: Qwen3Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        draw = jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), dtype)
        self.embedding = nnx.Param(config.initializer_range * draw)

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """[B, L, D] embeddings of ids [B, L]."""
        # Every device reads its share of the width, of all rows that share the parameters: neither
        # the table nor its gradient is ever whole on one.
        share = ("rows", "length", "param_embed")
        return on_own_share(
            lambda table, ids: table[ids], ((None, "param_embed"), share[:2]), share,
            self.embedding[...], ids,
        )  # fmt: skip


class Qwen3(nnx.Module):
    """A dense Qwen3 or Llama; parameters of `layers` carry a leading axis of layers.

    Args:
      config: its figures.
      dtype: of activations and products; norms, softmax and logits are float32 in any case.
      param_dtype: of the parameters.
      rngs: of the initial parameters.
    """

    def __init__(
        self,
        config: Qwen3Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embed_tokens = Embedding(config, dtype=param_dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, dtype=param_dtype, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = RMSNorm(config, config.hidden_size, dtype=param_dtype)
        tied = config.tie_word_embeddings
        self.lm_head: Linear | None = nnx.data(
            None
            if tied
            else Linear(config, config.hidden_size, config.vocab_size, dtype=param_dtype, rngs=rngs)
        )

    def hidden(
        self,
        ids: Int[Array | np.ndarray, "B T"],
        *,
        positions: Int[Array | np.ndarray, "B T"] | None = None,
        segments: Int[Array | np.ndarray, "B T"] | None = None,
        shared: Bool[Array | np.ndarray, "B T"] | None = None,
        remat: str = "none",
        attention_block: int | None = None,
    ) -> Float[Array, "B T D"]:
        """Final normed hidden states [B, T, D] of whole sequences, padded or packed.

        Args:
          ids: [B, T] int token ids.
          positions: [B, T] int, counted within each segment; the column if not given.
          segments: [B, T] int; a token sees earlier ones of its own segment alone, whose tokens
            stand side by side, and 0 marks padding. One segment per row if not given.
          shared: [B, T] bool; marks tokens that later ones of every segment see, such as one
            prompt before several continuations.
          remat: what the backward pass keeps, one of `REMAT`: "none" computes elementwise values
            again, "dots" attention too, "full" all of a layer.
          attention_block: tokens per block, as for `attention.attend`.
        """
        ids = jnp.asarray(ids)
        positions = None if positions is None else jnp.asarray(positions)
        segments = None if segments is None else jnp.asarray(segments)
        shared = None if shared is None else jnp.asarray(shared)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        if segments is None:
            segments = jnp.ones_like(ids)

        def over_tokens(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return attend(q, k, v, segments, shared, block=attention_block), None

        angles = rotary(positions, frequencies(self.config))
        graphdef, stacked = nnx.split(self.layers)

        # No cost: what the pieces compute again is computed again with the layer in any case.
        at_once = MLP_TOKENS if remat == "full" else None

        def one(x: jax.Array, layer: object) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, layer)(x, angles, over_tokens, at_once)

        one = jax.checkpoint(one, policy=REMAT[remat], prevent_cse=False)
        x, _ = jax.lax.scan(one, self._embed(ids), stacked)
        return self.norm(x)

    def extend(
        self,
        ids: Int[Array, "B T"],
        start: Int[Array, " B"],
        cache: Caches,
        layers: Sequence[object] | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches]:
        """Reads further tokens after what a cache holds.

        Args:
          ids: [B, T] int. Padding at the end of a row does no harm: what it leaves in the cache
            is seen by no earlier position, and the row's next tokens take its slots.
          start: [B] int; position of each row's first token, so tokens already read.
          cache: of at least `start + T` slots, padding included; one of all layers, or as many
            of one layer each.
          layers: parameters as of `apart`, for a cache that is apart; made if not given.

        Returns:
          Final normed hidden states [B, T, D], and the cache with the new tokens.
        """
        positions = start[:, None] + jnp.arange(ids.shape[1])
        angles = rotary(positions, frequencies(self.config))
        graphdef, stacked = nnx.split(self.layers)

        def one(
            carry: tuple[jax.Array, Cache], layer: tuple[int | jax.Array, object]
        ) -> tuple[tuple[jax.Array, Cache], None]:
            x, cache = carry
            index, params = layer

            def over_cache(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Cache]:
                new = cache.write(index, k, v, start)
                return attend_cache(q, new.k, new.v, index, positions), new

            return nnx.merge(graphdef, params)(x, angles, over_cache), None

        x = self._embed(ids)
        if isinstance(cache, Cache):
            numbered = (jnp.arange(self.config.num_hidden_layers), stacked)
            (x, new), _ = jax.lax.scan(one, (x, cache), numbered)
            return self.norm(x), new
        every = []
        for of_layer, params in zip(cache, layers or self.apart(), strict=True):
            (x, new), _ = one((x, of_layer), (0, params))
            every.append(new)
        return self.norm(x), tuple(every)

    def apart(self) -> list[object]:
        """Parameters of each layer in arrays of their own, which CPUs need not copy to read."""
        stacked = nnx.state(self.layers)
        return [
            jax.tree.map(lambda x, n=number: x[n], stacked)
            for number in range(self.config.num_hidden_layers)
        ]

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache of all layers in which nothing has been read."""
        return self._empty(self.config.num_hidden_layers, batch, slots)

    def empty_caches(self, batch: int, slots: int) -> tuple[Cache, ...]:
        """The same, apart: a cache of one layer for each."""
        layers = self.config.num_hidden_layers
        return tuple(self._empty(1, batch, slots) for _ in range(layers))

    def _empty(self, layers: int, batch: int, slots: int) -> Cache:
        width = self.config.head_dim
        rows = (layers, batch, self.config.num_key_value_heads)

        def nothing(*shape: int) -> jax.Array:
            return constrain(
                jnp.zeros((*rows, *shape), self.dtype), None, "batch", "heads", None, None
            )

        return Cache(nothing(width, slots), nothing(slots, width))

    def head(self) -> Float[Array, "D V"]:
        """[D, V] output projection; the transposed embeddings where they are tied."""
        if self.lm_head is None:
            return self.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """[..., V] float32 logits of hidden states [..., D]."""
        return project(hidden, self.head())

    def _embed(self, ids: jax.Array) -> jax.Array:
        return constrain(self.embed_tokens(ids).astype(self.dtype), "batch", "length", "embed")


def project(hidden: Float[Array, "*b D"], head: Float[Array, "D V"]) -> Float[Array, "*b V"]:
    """[..., V] float32 logits; operands in the type of the hidden states, sums in float32."""
    return product(hidden, head.astype(hidden.dtype), jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    x: Float[Array, "*b I"], kernel: Float[Array, "I O"], dtype: DTypeLike | None = None
) -> Float[Array, "*b O"]:
    """[..., O] of inputs [..., I] and a kernel [I, O], whose gradient takes inputs as they lie.

    For the kernel's gradient JAX would contract all leading axes at once, for which XLA's CPU
    compiler first turns one operand around, slower than the product itself.

    Args:
      dtype: of the result; that of the operands if not given.
    """
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _product_forward(
    x: jax.Array, kernel: jax.Array, dtype: DTypeLike | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.matmul(x, kernel, preferred_element_type=dtype), (x, kernel)


def _product_backward(
    dtype: DTypeLike | None, kept: tuple[jax.Array, jax.Array], change: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rows, changes = x.reshape(-1, x.shape[-1]), change.reshape(-1, change.shape[-1])
    contract = partial(jax.lax.dot_general, preferred_element_type=dtype)
    of_x = contract(change, kernel, (((change.ndim - 1,), (1,)), ((), ())))
    of_kernel = contract(rows, changes, (((0,), (0,)), ((), ())))
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


def logits(model: Qwen3, ids: Int[Array, "B T"], **where: Any) -> Float[Array, "B T V"]:
    """[B, T, V] float32 logits of the next token after each of `ids` [B, T].

    Args:
      where: positions, segments and so on, as for `Qwen3.hidden`.
    """
    return model.logits(model.hidden(ids, **where))


def frequencies(config: Qwen3Config) -> Float[np.ndarray, " half"]:
    """[head_dim / 2] float32 angles per position of the rotary embedding, scaled or not."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain: np.ndarray = 1.0 / np.float32(config.rope_theta) ** exponent
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        divided: np.ndarray = plain / np.float32(scaling.factor)
        return divided
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    assert low is not None and high is not None and context is not None  # of llama3
    turns = context * plain / (2 * np.pi)  # within the original context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    stretched: np.ndarray = plain * (kept + (1 - kept) / scaling.factor)
    return stretched.astype(np.float32)


def rotary(
    position: Int[Array, "B T"], frequency: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosine and sine [B, T, 1, head_dim / 2] float32 of the rotary embedding's angles."""
    angle = position[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T H D"], angles: tuple[jax.Array, jax.Array]
) -> Float[Array, "B T H D"]:
    """Heads [B, T, H, head_dim] turned by their positions; halves are pairs, as in the weights."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
