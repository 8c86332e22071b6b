"""Fixtures that all tests share."""

import hashlib
import os
import platform
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import tests.shapes

# Arrays are checked against their annotations in all that is imported from here on.
jaxtyping.install_import_hook(
    ["worldmodel", "policy", "sepsis_jax"],
    f"{tests.shapes.__name__}.{tests.shapes.arrays_checked.__name__}",
)

from worldmodel.scaling import Scaler  # noqa: E402


def compiled_programs() -> Path:
    """A folder for compiled programs that outlives the run, one per version and processor."""
    cpu = Path("/proc/cpuinfo")
    flags = re.search(r"^flags.*$", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    machine = flags[0] if flags else platform.platform()
    name = hashlib.sha256(f"{jax.__version__} {machine}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "sepsis-jax" / f"compiled-{name}"


@pytest.fixture(scope="session", autouse=True)
def keep_compiled_programs():
    """What one module, worker or run compiled, the others read from the disk."""
    settings = {
        "jax_compilation_cache_dir": str(compiled_programs()),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each program keeps mappings of memory; a whole suite of them exceeds Linux's limit of 65,530.

    XLA aborts the process at the limit (`vm.max_map_count`), wherever it happens to be.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def unit_scaler():
    """A scaler that leaves everything but the logarithm of urine alone."""
    return Scaler(
        mean=jnp.zeros(39), std=jnp.ones(39), static_mean=jnp.zeros(3), static_std=jnp.ones(3)
    )


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def taught(tmp_path_factory):
    """A tiny Qwen3 that holds short dialogues: its folder, and the reports of its training."""
    from policy.testing.taught_qwen3 import taught_tiny

    reports = []
    path = taught_tiny(tmp_path_factory.mktemp("taught") / "tiny", report=reports.append)
    return path, reports
