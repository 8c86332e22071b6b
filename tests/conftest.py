"""Fixtures that all tests share."""

import jax
import jax.numpy as jnp
import pytest

from worldmodel.scaling import Scaler


@pytest.fixture
def unit_scaler():
    """A scaler that leaves everything but the logarithm of urine alone."""
    return Scaler(
        mean=jnp.zeros(39), std=jnp.ones(39), static_mean=jnp.zeros(3), static_std=jnp.ones(3)
    )


@pytest.fixture
def key():
    return jax.random.key(0)
