"""Log-probabilities and entropies of tokens without ever holding [B, T, V] logits."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from policy.qwen3.attention import map_chunks
from policy.qwen3.model import Qwen3, project
from policy.qwen3.sharding import constrain

LOGITS_AT_ONCE = 2**27
"""Logits in memory at once; 512 MiB of float32."""


class TokenLogprobs(NamedTuple):
    """Under the distribution from which each token was, or would be, drawn."""

    logprob: Float[Array, "B T"]  # float32
    entropy: Float[Array, "B T"]  # float32, nats
    choices: Float[Array, "B T C"] | None = None  # float32, of C tokens, where they are wanted


def token_logprobs(
    model: Qwen3,
    ids: Int[Array | np.ndarray, "B T"],
    *,
    positions: Int[Array | np.ndarray, "B T"] | None = None,
    segments: Int[Array | np.ndarray, "B T"] | None = None,
    temperature: float | jax.Array = 1.0,
    choices: tuple[int, ...] = (),
    wanted: Bool[Array | np.ndarray, "B T"] | None = None,
    remat: str = "none",
    chunk: int | None = None,
) -> TokenLogprobs:
    """Log-probability of each token given those before it in its segment; differentiable.

    Args:
      ids: [B, T] int.
      positions, segments, remat: as for `Qwen3.hidden`.
      temperature: logits are divided by it; positive.
      choices: ids of C tokens, whose log-probabilities are wanted in the place of every token.
      wanted: [B, T] tokens whose log-probabilities are wanted; all if not given. The output
        projection, a tenth of Qwen3-4B's products and most of a tiny model's, is computed for few
        others.
      chunk: as for `chunked_logprobs`.

    Returns:
      [B, T] each, `choices` [B, T, C]; 0 for tokens that are not wanted, for the first one of a
      segment, which nothing predicts, and for padding.
    """
    hidden = model.hidden(ids, positions=positions, segments=segments, remat=remat)
    if segments is None:
        segments = jnp.ones_like(ids)
    predicted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    if wanted is not None:
        predicted &= jnp.asarray(wanted)[:, 1:]
    found = chunked_logprobs(
        hidden[:, :-1], model.head(), ids[:, 1:], temperature=temperature, choices=choices,
        wanted=None if wanted is None else predicted, chunk=chunk,
    )  # fmt: skip

    def after_the_first(x: jax.Array) -> jax.Array:
        keep = predicted.reshape(predicted.shape + (1,) * (x.ndim - 2))
        return jnp.pad(jnp.where(keep, x, 0.0), ((0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)))

    result: TokenLogprobs = jax.tree.map(after_the_first, found)
    return result


def chunked_logprobs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array | np.ndarray, "B T"],
    *,
    temperature: float | jax.Array = 1.0,
    choices: tuple[int, ...] = (),
    wanted: Bool[Array, "B T"] | None = None,
    chunk: int | None = None,
) -> TokenLogprobs:
    """Log-probabilities of targets, and entropies, from final hidden states.

    Args:
      hidden: [B, T, D].
      head: [D, V] output projection.
      targets: [B, T] int token ids.
      temperature: logits are divided by it; positive.
      choices: as for `token_logprobs`.
      wanted: [B, T] where values are wanted; all if not given. Elsewhere they mean nothing.
      chunk: columns whose logits [B, chunk, V] are in memory at once; as many as `LOGITS_AT_ONCE`
        allows if not given, and an eighth of all at most where only some are wanted. Rows are never
        mixed, so a batch split over devices stays so.

    Returns:
      [B, T] each, `choices` [B, T, C], float32.
    """
    batch, vocab = hidden.shape[0], head.shape[1]
    size = chunk or max(8, LOGITS_AT_ONCE // (batch * vocab))

    # Devices that share the parameters each have a part of the vocabulary, for the rows of all:
    # neither the projection nor its gradient is ever whole on one.
    head = constrain(head, None, "vocab")

    def one(part: tuple[jax.Array, jax.Array]) -> TokenLogprobs:
        rows = constrain(part[0], "rows", "length", None)
        logits = constrain(project(rows, head), "rows", "length", "vocab")
        logprobs = jax.nn.log_softmax(logits / temperature)  # [B, chunk, V]
        target = part[1][..., None] == jnp.arange(vocab)
        logprob = jnp.sum(jnp.where(target, logprobs, 0.0), axis=-1)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        of_choices = logprobs[..., list(choices)] if choices else None
        return TokenLogprobs(logprob, entropy, of_choices)

    if wanted is None:
        result: TokenLogprobs = map_chunks(one, (hidden, jnp.asarray(targets)), size)
        return result
    size = min(size, -(-hidden.shape[1] // 8))
    order = jnp.argsort(~wanted, axis=1, stable=True)  # those that are wanted come first

    def in_order(x: jax.Array, order: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)

    first = (in_order(hidden, order), in_order(jnp.asarray(targets), order))
    found = map_chunks(one, first, size, used=jnp.max(jnp.sum(wanted, axis=1)))
    result = jax.tree.map(partial(in_order, order=jnp.argsort(order, axis=1)), found)
    return result
