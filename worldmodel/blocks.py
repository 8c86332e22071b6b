"""Work on many rows in blocks of one shape, so that one compiled program serves them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def in_blocks(function: Callable[[np.ndarray], Any], count: int, block: int) -> Any:
    """Applies a function to the row numbers 0 ... count - 1, `block` at a time.

    Args:
      function: of row numbers [block] to a PyTree of arrays [block, ...]; in the last block the
        last row is repeated, and cut off afterwards.
      count: number of rows, at least 1.
      block: rows per call; bounds the memory.

    Returns:
      The PyTree with NumPy arrays [count, ...].
    """

    def of_block(first: int) -> Any:
        rows = np.minimum(np.arange(first, first + block), count - 1)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[: count - first], function(rows))

    parts = [of_block(first) for first in range(0, count, block)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
