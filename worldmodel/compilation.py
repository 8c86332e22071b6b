"""Compiler options, and work on many rows in blocks of one shape.

The options make matrix products and gates faster and do not change the program. Blocks of one
shape let one compiled program serve any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np

BFLOAT16 = "bfloat16"  # operands of products; sums and everything else stay float32

# Measured with jaxlib 0.10 on AVX-512 cores (docs/benchmarks.md): Eigen's float32 products beat
# YNNPACK's at the shapes of a GRU, and gates gain from full-width vectors. In bfloat16 it is
# YNNPACK that supports the matrix instructions.
_CPU = {"xla_cpu_prefer_vector_width": 512}
_CPU_FLOAT32 = {"xla_cpu_experimental_ynn_fusion_type": ""}


@cache
def compiler_options(
    precision: str | None = None, platform: str | None = None
) -> dict[str, str | int]:
    """For `jax.jit(..., compiler_options=...)` of an outermost function.

    Args:
      precision: of its products; "bfloat16" or anything else for float32.
      platform: "cpu", "gpu" or "tpu"; None for JAX's default. Only a CPU has options here, and
        those that this jaxlib does not know are left out.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    options = _CPU if precision == BFLOAT16 else _CPU | _CPU_FLOAT32
    return {name: value for name, value in options.items() if _known(name, value)}


def being_traced() -> bool:
    """Whether an outer `jax.jit` is tracing, in which no options can be given."""
    return isinstance(jax.lax.add(0, 0), jax.core.Tracer)


def _known(name: str, value: object) -> bool:
    device = jax.local_devices(backend="cpu")[0]
    try:
        with jax.default_device(device):
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


# the result has the structure of the function's, with NumPy instead of JAX arrays.
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

    def of_block(first: int) -> object:
        rows = np.minimum(np.arange(first, first + block), count - 1)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[: count - first], function(rows))

    parts = [of_block(first) for first in range(0, count, block)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def bucket(size: int, smallest: int = 1) -> int:
    """The least power of two that is at least `size` and `smallest`.

    Sizes that are rounded up to it share compiled programs.
    """
    return max(smallest, 1 << max(size - 1, 0).bit_length())
