"""What a recurrent world model knows of a stay besides its newest row."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from worldmodel.models.recurrent import row_inputs
from worldmodel.models.recurrent_training import stay_row
from worldmodel.schema import DoseEdges


@struct.dataclass
class StayMemory:
    """What the recurrent variant knows of a stay besides the newest row; [B, ...]."""

    inputs: jax.Array  # [B, R, F] of the rows before the newest, oldest first
    valid: jax.Array  # [B, R] bool, the row exists
    value: jax.Array  # [B, 39] last measured values, z-scores
    age: jax.Array  # [B, 39] rows since then, infinite before the first
    measured: jax.Array  # [B, 39] bool, in the newest row
    before: jax.Array  # [B, 8] code of the treatment before
    sums: jax.Array  # [B, 30] decayed sums of the doses before


@partial(jax.jit, static_argnames="dose_edges")
def stay_memory(
    dose_edges: DoseEdges,
    *,
    obs: jax.Array,
    measured: jax.Array,
    ventilated: jax.Array,
    static: jax.Array,
    action: jax.Array,
    step: jax.Array,
    newest: jax.Array,
) -> StayMemory:
    """The memory of B stays; works on traced values.

    Args:
      dose_edges: what the levels stand for.
      obs, measured: [B, T, 39] z-scores and what was recorded.
      ventilated: [B, T] bool.
      static: [B, 3] scaled.
      action: [B, T] joint action 0-24; -1 where there was no row.
      step: [B, T] int32 number of the row, below 0 where there was none.
      newest: [B] int32 index of the newest row, about to be treated.
    """
    rows = stay_row(obs, measured, ventilated, static, action, dose_edges, step)
    index = jnp.arange(obs.shape[1])
    known = (index <= newest[:, None]) & (step >= 0)
    last = jnp.where(measured & known[..., None], index[:, None], -1).max(1)  # [B, 39]
    age = jnp.where(last >= 0, newest[:, None] - last, jnp.inf)

    def at_newest(leaf: jax.Array) -> jax.Array:
        return leaf[jnp.arange(leaf.shape[0]), newest]

    value = jnp.take_along_axis(obs, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    return StayMemory(
        inputs=row_inputs(rows),
        valid=known & (index < newest[:, None]),
        value=jnp.where(last >= 0, value, at_newest(obs)),
        age=age.astype(jnp.float32),
        measured=at_newest(measured),
        before=at_newest(rows.before),
        sums=at_newest(rows.sums),
    )
