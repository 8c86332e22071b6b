"""Tables of one patient's futures."""

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from sepsis_jax.pipelines.world_model import outcome_table, trajectory_table
from worldmodel.simulate.plans import Plan
from worldmodel.simulate.rollout import Rollouts

PLAN = Plan("plan", np.zeros(2, np.int64))


def two_futures(alive):
    """MAP 60 then 60, and 80 then 50; ventilated in the second future only."""
    meanbp = jnp.array([[60.0, 60.0], [80.0, 50.0]])[None, None]
    zeros = jnp.zeros((1, 1, 2, 2))
    return Rollouts(
        values=meanbp[..., None],
        sofa=zeros,
        ventilation=jnp.array([[0.0, 0.0], [1.0, 1.0]])[None, None],
        reward=zeros,
        action=zeros.astype(jnp.int32),
        mortality=jnp.zeros((1, 1, 2)),
        projected=jnp.zeros((1, 1, 2), jnp.int32),
        features=("meanbp",),
        mode="corrected",
        alive=None if alive is None else jnp.asarray(alive)[None, None],
    )


def test_steps_count_by_the_probability_that_the_stay_reaches_them():
    ended = [[1.0, 1.0], [1.0, 0.0]]
    row = outcome_table(two_futures(ended), [PLAN]).iloc[0]
    assert row["map_below_65"] == pytest.approx(2 / 3)
    assert row["ventilation"] == pytest.approx(1 / 3)
    hours, start = np.array([8.0, 12.0, 16.0]), pd.Series({"meanbp": 70.0, "sofa": 0.0})
    table = trajectory_table(two_futures(ended), [PLAN], hours, start)
    meanbp = table[table["feature"] == "meanbp"].set_index("hour")
    assert meanbp["mean"].tolist() == pytest.approx([70.0, 70.0, 60.0])
    assert meanbp["q95"].tolist() == pytest.approx([70.0, 80.0, 60.0])


def test_without_hazards_all_steps_count_alike():
    row = outcome_table(two_futures(None), [PLAN]).iloc[0]
    assert row["map_below_65"] == pytest.approx(3 / 4)
    assert row["ventilation"] == pytest.approx(1 / 2)


def test_after_the_end_of_every_future_all_count_alike():
    row = outcome_table(two_futures(np.zeros((2, 2))), [PLAN]).iloc[0]
    assert row["map_below_65"] == pytest.approx(3 / 4)
