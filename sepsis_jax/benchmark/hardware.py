"""What a measurement was made on, and the peak rate of its matrix products."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sepsis_jax.benchmark.timing import Contender
from sepsis_jax.runs import JsonDict
from worldmodel.compilation import BFLOAT16, compiler_options
from worldmodel.simulate.sharded import AXIS, branch_mesh


def hardware() -> JsonDict:
    """Devices, processor, cores and memory."""
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.local_device_count(),
        "device_memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "driver": getattr(device.client, "platform_version", None),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def torch_version() -> str | None:
    """The installed torch, without loading it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Name of the processor, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# Rows, depth, columns: a large square, and the recurrent product of a GRU of 128.
SHAPES = {"cpu": ((1536, 1536, 1536), (8192, 128, 384), (512, 128, 384))}
_ELSEWHERE = ((8192, 8192, 8192), (131_072, 128, 384), (1_048_576, 128, 384))
_LEAST = {"cpu": 4e9}  # operations in a timed run, so that the clock does not matter
_LEAST_ELSEWHERE = 4e12


def _shapes(platform: str) -> tuple[tuple[int, int, int], ...]:
    return SHAPES.get(platform, _ELSEWHERE)


def _calls(platform: str, flops: float) -> int:
    return max(1, round(_LEAST.get(platform, _LEAST_ELSEWHERE) / flops))


def jax_products(precision: str) -> list[Contender]:
    """Products in JAX, on one device and on all of them at once.

    Args:
      precision: as the models', or "bfloat16".
    """
    return [
        contender
        for shape in _shapes(jax.default_backend())
        for devices in sorted({1, jax.local_device_count()})
        if (contender := _jax_product(shape, devices, precision))
    ]


def _jax_product(shape: tuple[int, int, int], devices: int, precision: str) -> Contender:
    rows, depth, columns = shape
    dtype = jnp.bfloat16 if precision == BFLOAT16 else jnp.float32

    def products(x: jax.Array, weight: jax.Array) -> jax.Array:
        def again(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, _out = carry
            if precision == BFLOAT16:
                out = jnp.matmul(x, weight, preferred_element_type=jnp.float32)
            else:
                out = jnp.matmul(x, weight, precision=precision)
            # Each product waits for the one before, so that none is left out.
            return x.at[0, 0].set(out[0, 0].astype(x.dtype)), out

        empty = jnp.zeros((x.shape[0], weight.shape[1]))
        product: jax.Array = jax.lax.fori_loop(0, calls, again, (x, empty))[1]
        return product

    flops = 2.0 * devices * rows * depth * columns
    calls = _calls(jax.default_backend(), flops)
    mesh = branch_mesh(jax.local_devices()[:devices])
    call = jax.jit(
        jax.shard_map(
            products,
            mesh=mesh,
            in_specs=(PartitionSpec(AXIS), PartitionSpec()),
            out_specs=PartitionSpec(AXIS),
            check_vma=False,
        ),
        compiler_options=compiler_options(precision),
    )
    key = jax.random.key(0)
    x = jax.random.normal(key, (devices * rows, depth)).astype(dtype)
    weight = jax.random.normal(key, (depth, columns)).astype(dtype)
    x = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec(AXIS)))
    weight = jax.device_put(weight, jax.NamedSharding(mesh, PartitionSpec()))

    def run(repeat: int) -> None:
        jax.block_until_ready(call(x, weight))

    text = " x ".join(map(str, shape))
    places = f"{devices} device{'s' * (devices > 1)}"
    return Contender(f"JAX {precision}, {text}, {places}", run, calls * flops)


def torch_products(torch: ModuleType, device: str) -> list[Contender]:
    """Products in torch, in float32 at the precision that was set."""
    contenders = []
    for rows, depth, columns in _shapes("gpu" if device == "cuda" else "cpu"):
        x = torch.randn(rows, depth, device=device)
        weight = torch.randn(depth, columns, device=device)
        out = torch.empty(rows, columns, device=device)
        flops = 2.0 * rows * depth * columns
        calls = _calls("gpu" if device == "cuda" else "cpu", flops)

        def run(
            repeat: int, x: Any = x, weight: Any = weight, out: Any = out, calls: int = calls
        ) -> None:
            for _ in range(calls):
                torch.mm(x, weight, out=out)
            if device == "cuda":
                torch.cuda.synchronize()

        contenders.append(
            Contender(f"torch float32, {rows} x {depth} x {columns}", run, calls * flops)
        )
    return contenders
