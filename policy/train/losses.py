"""Losses as sums over tokens: who adds them up over a whole batch also divides."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from policy.qwen3.logprobs import token_logprobs
from policy.qwen3.model import Qwen3
from policy.train.data import Rows


class Summed(NamedTuple):
    """A loss before its division."""

    total: jax.Array  # [] float32, sum over tokens
    weight: jax.Array  # [] float32, what the sum over a whole batch is divided by
    metrics: dict[str, jax.Array]  # [] float32 each, sums that are divided likewise


def cross_entropy(
    model: Qwen3, rows: Rows, *, remat: str = "none", chunk: int | None = None
) -> Summed:
    """Negative log-likelihood, in nats, of the tokens to learn.

    Args:
      model: the model.
      rows: [R, L]. The first token of a dialogue is predicted by nothing and counts for nothing.
      remat, chunk: as for `qwen3.logprobs.token_logprobs`; [R, L, V] is never held.
    """
    found = token_logprobs(
        model,
        rows.ids,
        positions=rows.positions,
        segments=rows.segments,
        remat=remat,
        chunk=chunk,
    )
    learned = rows.mask & (rows.positions > 0)
    total = -jnp.sum(jnp.where(learned, found.logprob, 0.0))
    entropy = jnp.sum(jnp.where(learned, found.entropy, 0.0))
    return Summed(total, jnp.sum(learned, dtype=jnp.float32), {"entropy": entropy})
