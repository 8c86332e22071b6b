"""How far two models' log-probabilities are apart, by hand."""

import numpy as np
import pytest

from policy.train.losses import mismatch
from worldmodel.errors import InputError


def test_mismatch():
    mask = np.array([True, True, False, True])
    found = mismatch(np.array([0.0, -1.0, np.nan, -2.0]), np.array([0.0, -1.5, 0.0, -1.0]), mask)
    assert found["mean"] == pytest.approx(0.5)
    assert found["max"] == pytest.approx(1.0)
    assert found["kl"] == pytest.approx((np.exp(-0.5) - 0.5 + np.e - 2) / 3)  # exp(d) - 1 - d
    with pytest.raises(InputError, match="1 of 3"):
        mismatch(np.array([0.0, -np.inf, 0.0, 0.0]), np.zeros(4), mask)
    with pytest.raises(InputError, match="no token"):
        mismatch(np.zeros(4), np.zeros(4), np.zeros(4, bool))
