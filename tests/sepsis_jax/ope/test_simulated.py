"""World-model Monte Carlo against a plan that says the same, and its ensemble spread."""

import jax
import numpy as np
import pytest

from sepsis_jax.ope.simulated import simulated_value
from tests.toy import toy_episodes
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import rollout

CONFIG = ModelConfig(variant="reference", hidden=8, layers=1, embed=4, head=4)


def fluids_only(key, observation):
    del key, observation
    return jax.nn.one_hot(3, 25)


def test_value_of_a_constant_policy_is_that_of_the_plan():
    episodes = toy_episodes(12, 14)
    world = init_world_model(jax.random.key(4), Scaler.fit(episodes, split=None), CONFIG, members=2)
    key = jax.random.key(0)
    found = simulated_value(world, key, episodes, fluids_only, horizon=4, samples=6)
    plan = np.full((1, 4), 3)
    futures = rollout(world, key, start_history(world, episodes, 0), plan, samples=6)
    total = np.asarray(futures.total_reward)[:, 0]
    assert found.value == pytest.approx(total.mean(), abs=1e-4)
    assert found.members == pytest.approx([total[:, ::2].mean(), total[:, 1::2].mean()], abs=1e-4)
    assert found.spread > 0
    alone = simulated_value(world.member(0), key, episodes, fluids_only, horizon=4, samples=2)
    assert alone.spread == 0
