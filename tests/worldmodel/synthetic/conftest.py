"""One world for all tests of this folder: generating it compiles once."""

import jax
import numpy as np
import pytest

from worldmodel.synthetic import generate

WORLD = jax.random.key(7)


@pytest.fixture(scope="session")
def world():
    """3,000 stays and their `Truth`."""
    return generate(WORLD, 3000)


def assert_same(left, right):
    """Asserts that two PyTrees are bitwise equal."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    for a, b in pairs:
        if jax.dtypes.issubdtype(getattr(a, "dtype", None), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.array_equal(np.asarray(a), np.asarray(b))
