"""World-model Monte Carlo against a plan that says the same, and its ensemble spread."""

import jax
import numpy as np
import pytest

from policy.simple import RandomPolicy
from sepsis_jax.ope.simulated import SUPPORTED, simulated_value, whole_stay
from tests.toy import toy_episodes
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import rollout
from worldmodel.simulate.stays import FOLLOW_CLINICIAN

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


def test_stays_of_the_recurrent_variant_are_simulated_to_their_end():
    """Without a policy its own clinician treats; windows have neither an end nor a clinician."""
    episodes = toy_episodes(6, 5)
    scaler = Scaler.fit(episodes, split=None)
    config = ModelConfig(variant="recurrent", hidden=6, head=5)
    world = init_world_model(jax.random.key(4), scaler, config, stay_steps=5)
    key = jax.random.key(0)
    found = simulated_value(world, key, episodes, None, samples=4)
    plan = np.full((1, 5), FOLLOW_CLINICIAN)
    futures = rollout(world, key, start_history(world, episodes, 0), plan, samples=4)
    assert np.asarray(futures.alive)[..., -1].max() == 0
    np.testing.assert_allclose(found.total, np.asarray(futures.total_reward)[:, 0].mean(-1), 1e-5)
    share = np.asarray(futures.alive)[:, 0]
    known = (np.asarray(futures.support)[:, 0] >= SUPPORTED) * share
    assert 0 < found.supported == pytest.approx(known.sum() / share.sum(), rel=1e-5)
    windows = init_world_model(jax.random.key(4), scaler, CONFIG)
    assert np.isnan(simulated_value(windows, key, episodes, RandomPolicy(), samples=1).supported)
    assert whole_stay(world, episodes) == 5
    assert whole_stay(windows, episodes) == round(float(np.mean(episodes.length))) - 1
    with pytest.raises(InputError, match="only the recurrent variant knows the clinician"):
        simulated_value(windows, key, episodes, None, samples=1)
