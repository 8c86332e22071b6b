"""From action probabilities to weights, a few stays at a time.

What estimators need of probabilities [N, T, A] is [N, T]. Blocks of stays stay in the cache, so
the time per stay does not depend on their number.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sepsis_jax.ope.checks import BLOCK, Inspected
from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.diagnostics import Diagnostics, Limits, summarize, unsupported_mass
from sepsis_jax.ope.estimators import Batch, Shrinkage, make_batch
from sepsis_jax.ope.weights import Clip, drug_weights, weigh
from worldmodel import schema
from worldmodel.blocks import in_blocks


class _Stay(NamedTuple):
    """What is kept of the probabilities of one stay."""

    log_weight: jax.Array  # [K, T]
    drug_log_weight: jax.Array | None  # [K, 2, T]
    clipped: jax.Array  # [K] recorded steps whose ratio or weight was clipped
    unsupported: jax.Array  # [K] as `unsupported_mass`


def prepare(
    found: Inspected,
    index: np.ndarray,
    *,
    gamma: float = 1.0,
    clip: Clip | None = None,
    shrinkage: Shrinkage | None = None,
    limits: Limits | None = None,
) -> tuple[Batch, Diagnostics]:
    """Weights of all policies and their diagnostics.

    Args:
      found: inspected input.
      index: [N] numbers of the stays, in the order that is wanted.
      gamma: discount.
      clip: bounds of ratios.
      shrinkage: tuning that the batch carries.
      limits: of support.

    Returns:
      A batch without fitted ingredients.
    """
    support = (limits or Limits()).support

    def of_block(rows: np.ndarray) -> _Stay:
        chosen = index[rows]
        tables = [table.of(chosen, found.steps) for table in found.policies.values()]
        behavior = None if found.behavior is None else found.behavior.of(chosen, found.steps)
        data = found.stays(chosen).replace(behavior_probs=behavior)  # type: ignore[attr-defined]
        return _of_stays(data, np.stack(tables, 1), clip=clip, support=support)

    parts: _Stay = in_blocks(of_block, len(index), min(BLOCK, len(index)))
    data = jax.tree.map(jnp.asarray, found.stays(index))
    return _gather(data, parts, gamma=gamma, shrinkage=shrinkage)


@partial(jax.jit, static_argnames=("clip", "support"))
def _of_stays(data: OPEData, probs: jax.Array, *, clip: Clip | None, support: float) -> _Stay:
    """[n, ...] of n stays with probabilities [n, K, T, A]."""

    def of_stay(stay: OPEData, target: jax.Array) -> _Stay:
        one, target = jax.tree.map(lambda leaf: leaf[None], stay), target[:, None]
        weights = weigh(one, target, clip)
        drugs = None
        if one.behavior_probs is not None and target.shape[-1] == schema.NUM_ACTIONS:
            drugs = drug_weights(one, target, clip)[:, :, 0]
        return _Stay(
            log_weight=weights.log_weight[:, 0],
            drug_log_weight=drugs,
            clipped=weights.clipped_share * stay.alive.sum(),
            unsupported=unsupported_mass(one, target, support),
        )

    return jax.vmap(of_stay)(data, probs)


@partial(jax.jit, static_argnames=("gamma", "shrinkage"))
def _gather(
    data: OPEData, parts: _Stay, *, gamma: float, shrinkage: Shrinkage | None
) -> tuple[Batch, Diagnostics]:
    log_weight = jnp.moveaxis(parts.log_weight, 0, 1)
    drugs = parts.drug_log_weight
    batch = make_batch(
        data, log_weight, gamma=gamma, shrinkage=shrinkage,
        drug_log_weight=None if drugs is None else jnp.moveaxis(drugs, 0, 2),
    )  # fmt: skip
    steps = data.alive.sum()
    shares = parts.clipped.sum(0) / steps, parts.unsupported.sum(0) / steps
    return batch, summarize(log_weight, *shares)
