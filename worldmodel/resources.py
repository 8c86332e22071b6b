"""Processors, memory and compiler: what this process may use, and work in blocks of one shape.

Blocks of one shape let one compiled program serve any number of rows.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from worldmodel.errors import InputError

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_MEMORY = Path("/proc/meminfo")
_UNLIMITED = 1 << 60  # bytes; cgroups of version 1 write such a number for no limit


def usable_cores() -> int:
    """Cores that this process may use, at least 1.

    The cores that it is bound to, and no more than the quota of its cgroups (rounded up), which
    containers set; `os.cpu_count` knows neither.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(min([cores, *(math.ceil(quota) for quota in _cpu_quotas())]), 1)


def free_memory() -> int | None:
    """Bytes that this process can still allocate; None where the system does not tell.

    The least of what the machine, its cgroups and its limit on address space leave.
    """
    return min([*_free_of_machine(), *_free_of_cgroups(), *_free_of_limit()], default=None)


_LITTLE = 64e6  # bytes; asking what is free takes half a millisecond, as long as a small rollout


def require_memory(setting: str, count: int, bytes_each: float, *, free: int | None = None) -> None:
    """Refuses a number of things that memory does not hold, before any of it is allocated.

    Args:
      setting: that asks for the number, as the message names it.
      count: how many.
      bytes_each: about what one takes.
      free: bytes at hand; None for those of this machine.

    Raises:
      InputError: they do not fit; the message gives the number that does.
    """
    if free is None:
        if count * bytes_each < _LITTLE:
            return
        free = free_memory()
    if free is None or count * bytes_each <= free:
        return
    raise InputError(
        f"{setting}: got {count}, which need about {_gigabytes(count * bytes_each)} of memory; "
        f"{_gigabytes(free)} are free, so at most {int(free / bytes_each)} fit"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's cgroups with a controller, and whether they are of version 2."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controller if controllers else _CGROUPS
        folder = root / own.lstrip("/")
        # Within a container the path may be the host's, which is not there: the root is ours.
        for group in (folder, *folder.parents):
            if group.is_relative_to(root) and group.is_dir():
                yield group, not controllers


def _cpu_quotas() -> Iterator[float]:
    """Cores by quota, of each cgroup that sets one."""
    for group, second in _groups("cpu"):
        if second:
            values = _words(group / "cpu.max")
        else:
            values = [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
        if len(values) == 2 and all(value.isdigit() and int(value) > 0 for value in values):
            yield int(values[0]) / int(values[1])


def _free_of_cgroups() -> Iterator[int]:
    for group, second in _groups("memory"):
        names = ("max", "current") if second else ("limit_in_bytes", "usage_in_bytes")
        values = [word for name in names for word in _words(group / f"memory.{name}")]
        if len(values) == 2 and all(map(str.isdigit, values)) and int(values[0]) < _UNLIMITED:
            words = _words(group / "memory.stat")
            counts = dict(zip(words[::2], words[1::2], strict=False))
            cached = counts.get("inactive_file" if second else "total_inactive_file", "0")
            yield max(int(values[0]) - int(values[1]) + int(cached), 0)


def _free_of_machine() -> Iterator[int]:
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return
    yield from (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _free_of_limit() -> Iterator[int]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _words(Path("/proc/self/statm"))
    if soft != resource.RLIM_INFINITY and used:
        yield max(soft - int(used[0]) * resource.getpagesize(), 0)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


BFLOAT16 = "bfloat16"  # operands of products; sums and everything else stay float32

# Measured with jaxlib 0.10 on AVX-512 cores (docs/benchmarks.md): Eigen's float32 products beat
# YNNPACK's at the shapes of a GRU, and gates gain from full-width vectors. In bfloat16 it is
# YNNPACK that supports the matrix instructions. LLVM's levels above 1 take a quarter of the time to
# compile and give the same numbers at the same speed; level 0 is four times as slow.
_CPU: dict[str, str | int] = {
    "xla_cpu_prefer_vector_width": 512,
    "xla_backend_optimization_level": 1,
}
_CPU_FLOAT32: dict[str, str | int] = {"xla_cpu_experimental_ynn_fusion_type": ""}
# XLA's Triton products find no tiles for some float32 products of the residual and reference
# variants and stop the compilation; cuBLAS has products of any shape.
_GPU_FLOAT32: dict[str, str | int] = {"xla_gpu_enable_triton_gemm": False}


@cache
def compiler_options(
    precision: str | None = None, platform: str | None = None
) -> dict[str, str | int]:
    """For `jax.jit(..., compiler_options=...)` of an outermost function.

    Args:
      precision: of its products; "bfloat16" or anything else for float32.
      platform: "cpu", "gpu", "cuda" or "tpu"; None for JAX's default. What this jaxlib does not
        know is left out.
    """
    platform = platform or jax.default_backend()
    options: dict[str, str | int] = {}
    if platform == "cpu":
        options = _CPU if precision == BFLOAT16 else _CPU | _CPU_FLOAT32
    elif platform in ("gpu", "cuda") and precision != BFLOAT16:
        options = _GPU_FLOAT32
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


def bucket(size: int, smallest: int = 1, *, digits: int = 1) -> int:
    """The least number of few leading binary digits that is at least `size` and `smallest`.

    Sizes that are rounded up to it share compiled programs. With one digit these are powers of two;
    with three 1 to 8, 10, 12, 14, 16, 20, and at most a fifth is filled up.
    """
    unit = 1 << max(max(size - 1, 0).bit_length() - digits, 0)
    return max(smallest, -(-size // unit) * unit)
