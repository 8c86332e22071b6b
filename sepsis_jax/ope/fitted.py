"""What has to be learned before the fitted estimators can be had, in one place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from flax import struct

from sepsis_jax.ope.estimators import Batch, Values


@struct.dataclass
class Fitted:
    """Learned ingredients of K policies; see `sepsis_jax.ope.fit`."""

    values: Values | None = None  # [K, N, T] twice
    mrdr_values: Values | None = None
    marginal: jax.Array | None = None  # [K, N, T]
    clinician_value: float | None = struct.field(pytree_node=False, default=None)

    def select(self, index: Any, steps: int) -> Fitted:
        """The stays picked by an index [N], cut to a number of steps."""
        return jax.tree.map(lambda leaf: leaf[:, index, :steps], self)

    def into(self, batch: Batch) -> Batch:
        """The batch with these ingredients."""
        return replace(
            batch, values=self.values, mrdr_values=self.mrdr_values, marginal=self.marginal
        )
