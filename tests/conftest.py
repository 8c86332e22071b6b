"""Fixtures that all tests share."""

import os

import jax
import jax.numpy as jnp
import pytest

from worldmodel.scaling import Scaler


@pytest.fixture(scope="session", autouse=True)
def keep_compiled_programs(tmp_path_factory):
    """What one module or worker compiled, the others read from the disk."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
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
