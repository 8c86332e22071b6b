"""The environment on the synthetic world, against `generate` itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worldmodel.envs.unrolling import play_all
from worldmodel import SepsisEnv
from worldmodel.synthetic import Config, generate, patient_key

KEY = jax.random.key(2)
COUNT = 64


@pytest.fixture(scope="module")
def recorded():
    return generate(KEY, COUNT)[0]


@pytest.fixture(scope="module")
def played(recorded):
    keys = jax.vmap(patient_key, (None, 0))(KEY, jnp.arange(COUNT))
    return play_all(SepsisEnv.synthetic(), keys, recorded.action)


def test_patients_are_those_of_generate(recorded, played):
    state, first, got = played
    length = np.asarray(recorded.length)
    np.testing.assert_array_equal(state.taken, length)
    np.testing.assert_array_equal(first.observation.dynamic, recorded.dynamic[:, 0])
    for i, rows in enumerate(length):
        np.testing.assert_allclose(
            got.observation.dynamic[i, : rows - 1],
            recorded.dynamic[i, 1:rows],
            rtol=2e-3,
            atol=2e-3,
        )
        np.testing.assert_allclose(
            got.info.support[i, :rows], recorded.behavior_prob[i, :rows], rtol=1e-3
        )
        ends = np.zeros(20, bool)
        ends[rows - 1 :] = True
        np.testing.assert_array_equal(got.terminated[i], ends)
    died = np.asarray(recorded.died_90d)
    last = np.asarray(got.reward)[np.arange(COUNT), length - 1]
    np.testing.assert_array_equal(last, np.where(died, -15.0, 15.0))
    np.testing.assert_array_equal(
        np.asarray(got.info.mortality)[np.arange(COUNT), length - 1], died
    )
    assert died.any() and not died.all()
    assert np.isfinite(got.info.mortality).all()
    np.testing.assert_allclose(got.info.reward_terms.sum(-1), got.reward, atol=1e-5)


def test_nothing_is_earned_after_the_end(played):
    _, _, got = played
    after = np.asarray(got.terminated)[:, :-1]
    assert after.any()
    np.testing.assert_array_equal(np.asarray(got.reward)[:, 1:][after], 0)


def test_truncation(recorded):
    keys = jax.vmap(patient_key, (None, 0))(KEY, jnp.arange(COUNT))
    _, _, got = play_all(SepsisEnv.synthetic(max_steps=6), keys, recorded.action[:, :8])
    cut = np.asarray(recorded.length) > 6
    np.testing.assert_array_equal(got.truncated[:, 5], cut)
    np.testing.assert_array_equal(got.terminated[:, 5], ~cut)
    assert cut.any() and not cut.all()
    assert not np.asarray(got.info.reward_terms)[cut, :, 3].any()


def test_own_behaviour_and_past(recorded):
    def flat(key, observation):
        assert observation.past.dynamic.shape == (4, 39)
        return jnp.full(25, 0.04)

    env = SepsisEnv.synthetic(config=Config(past=4), behavior=flat)
    keys = jax.vmap(patient_key, (None, 0))(KEY, jnp.arange(3))
    _, first, got = play_all(env, keys, recorded.action[:3, :5])
    np.testing.assert_allclose(got.info.support, 0.04)
    assert first.observation.past.valid.sum() == 3
