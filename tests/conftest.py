"""Fixtures that all tests share."""

import jax
import jax.numpy as jnp
import pytest

from worldmodel.scaling import Scaler


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
