"""Figures of policies: shares by hand, and that every figure is drawn."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from sepsis_jax.report.policies import (
    action_heat_map,
    action_shares,
    difference_heat_map,
    reliability_figure,
)
from worldmodel.errors import InputError


def test_shares_by_hand():
    probs = np.zeros((1, 3, 25))
    probs[0, 0, 7] = probs[0, 1, 0] = 1.0  # vasopressor 1 with fluid 2; nothing
    probs[0, 2] = 9.0  # padding
    shares = action_shares(probs, np.array([[True, True, False]]))
    assert shares[1, 2] == shares[0, 0] == 50.0 and shares.sum() == 100.0
    with pytest.raises(InputError, match="no recorded row"):
        action_shares(probs, np.zeros((1, 3), bool))


@pytest.mark.parametrize("policies", [1, 3, 5])
def test_heat_maps_are_drawn_for_any_number_of_policies(policies, tmp_path):
    rng = np.random.default_rng(0)
    shares = {f"p{i}": 100 * rng.dirichlet(np.ones(25)).reshape(5, 5) for i in range(policies)}
    action_heat_map(shares, "given", tmp_path / "given.png")
    difference_heat_map(shares, shares["p0"], "difference", tmp_path / "difference.png")
    for name in ("given", "difference"):
        image = imread(tmp_path / f"{name}.png")
        assert image.shape[1] > 400 and image[..., :3].std() > 0.01


def test_reliability_is_drawn_where_a_bin_was_never_observed(tmp_path):
    bins = pd.DataFrame(
        {"predicted": [0.001, 0.1, 0.5], "observed": [0.0, 0.12, 0.4], "count": [100, 100, 100]}
    )
    reliability_figure({"a": bins}, {"a": 0.04}, "reliability", tmp_path / "curve.png")
    assert imread(tmp_path / "curve.png")[..., :3].std() > 0.01
