"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax


def hardware() -> dict[str, Any]:
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
