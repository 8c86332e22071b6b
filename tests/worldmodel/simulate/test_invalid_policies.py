"""Policies that are no policies, totals that are not known, and horizons that share programs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toy import toy_episodes
from worldmodel.envs import SepsisEnv, unroll
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.resources import compiler_options
from worldmodel.scaling import published_scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import Rollouts, _jitted, rollout


def _spoilt(kind):
    def policy(key, observation):
        fair = jnp.full(25, 0.04)
        late = observation.step >= 3  # not in the first step, which could be checked by itself
        return {
            "nan": jnp.where(late, jnp.nan, fair),
            "negative": jnp.where(late, fair.at[0].set(-0.04).at[1].set(0.12), fair),
            "sum": jnp.where(late, 2 * fair, fair),
            "infinite": jnp.where(late, fair.at[3].set(jnp.inf), fair),
        }[kind]

    return policy


@pytest.fixture(scope="module")
def stay_model():
    config = ModelConfig(variant="recurrent", hidden=8, head=4)
    return init_world_model(jax.random.key(0), published_scaler(), config, members=1, stay_steps=40)


@pytest.mark.parametrize("kind", ["nan", "negative", "sum", "infinite"])
def test_what_is_no_distribution_is_refused(kind, stay_model, key):
    start = start_history(stay_model, toy_episodes(3, 9).select(np.arange(1)), 0)
    with pytest.raises(InputError, match="no 25 finite probabilities that sum to 1"):
        rollout(stay_model, key, start, _spoilt(kind), horizon=4)
    assert rollout(stay_model, key, start, _spoilt(kind), horizon=2).action.shape[-1] == 2


@pytest.mark.parametrize("shape", [(24,), (1, 25), ()])
def test_a_policy_of_another_shape_is_refused(shape, stay_model, key):
    start = start_history(stay_model, toy_episodes(3, 9).select(np.arange(1)), 0)
    with pytest.raises(InputError, match="expected \\(25,\\)"):
        rollout(stay_model, key, start, lambda key, seen: jnp.ones(shape), horizon=2)


@pytest.mark.parametrize("mode", ["corrected", "reference"])
def test_without_mortality_the_total_is_unknown(mode):
    unknown, zero = jnp.full((1, 1, 2), jnp.nan), jnp.zeros((1, 1, 2, 3))
    found = Rollouts(zero[..., None], zero, zero, zero, zero, unknown, unknown, ("meanbp",), mode)
    assert np.isnan(found.total_reward).all()
    certain = found.replace(mortality=jnp.array([[[0.0, 1.0]]]))
    np.testing.assert_array_equal(certain.total_reward, [[[15.0, -15.0]]])


def test_horizons_share_programs_and_results_stay_the_same(stay_model, key):
    start = start_history(stay_model, toy_episodes(4, 9).select(np.arange(2)), 0)
    plans = np.random.default_rng(0).integers(0, 25, (3, 20))
    before = _jitted(None)._cache_size()
    for horizon in range(1, 21):
        found = rollout(stay_model, key, start, plans[:, :horizon], samples=2)
        assert found.reward.shape == (2, 3, 2, horizon)
        if horizon not in (1, 5, 8, 9):
            continue

        # Traced from outside: a program of exactly this length.
        @partial(jax.jit, compiler_options=compiler_options())
        def exact(model, start, horizon=horizon):
            return rollout(model, key, start, plans[:, :horizon], samples=2)

        for name, value in vars(exact(stay_model, start)).items():
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=f"{name}, {horizon}")
    assert _jitted(None)._cache_size() - before == 5  # 1, 4, 8, 16 and 32 steps


def test_the_environment_refuses_what_is_no_policy(stay_model, key):
    episodes = toy_episodes(3, 9)
    with pytest.raises(InputError, match="no 25 finite probabilities"):
        SepsisEnv.learned(stay_model, episodes, behavior=lambda key, seen: jnp.full(25, jnp.nan))
    with pytest.raises(InputError, match="expected \\(25,\\)"):
        SepsisEnv.learned(stay_model, episodes, behavior=lambda key, seen: jnp.ones(5) / 5)
    env = SepsisEnv.learned(stay_model, episodes)
    with pytest.raises(InputError, match="no 25 finite probabilities"):
        unroll(env, lambda key, seen: jnp.full(25, jnp.nan), key, num_steps=2)
    state, _ = env.reset(key)
    _, timestep = env.step(state, jnp.int32(25))
    assert np.isnan(timestep.reward)


def test_programs_are_bounded(stay_model, key, monkeypatch):
    start = start_history(stay_model, toy_episodes(4, 9).select(np.arange(2)), 0)
    monkeypatch.setattr("worldmodel.simulate.rollout.MAX_PROGRAMS", 2)
    _jitted(None).clear_cache()
    for horizon in (3, 7, 3, 12):
        rollout(stay_model, key, start, np.full((1, horizon), 12), samples=2)
        assert 1 <= _jitted(None)._cache_size() <= 2
