"""Advantages of all actions beside futures that are played one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.agent.env_pool import reset_batch
from policy.simple import GuidelineRules, RandomPolicy
from policy.train.rl.counterfactual import counterfactual, smoothing
from worldmodel.envs.env import SepsisEnv
from worldmodel.errors import InputError
from worldmodel.keys import COUNTERFACTUAL
from worldmodel.observation import draw_action
from worldmodel.synthetic import patient_keys

STEPS, PATIENTS, SAMPLES = 3, 3, 2


@pytest.fixture(scope="module")
def env():
    return SepsisEnv.synthetic(max_steps=STEPS)


@pytest.fixture(scope="module")
def states(env):
    patients = np.arange(PATIENTS, dtype=np.int32)
    keys = patient_keys(jax.random.key(5), patients)
    padded = reset_batch(env, keys, patients).states
    return jax.tree.map(lambda leaf: leaf[:PATIENTS], padded)


@pytest.fixture(scope="module")
def under_guideline(env, states):
    """[PATIENTS, 25] advantages under the guideline."""
    return counterfactual(env, GuidelineRules(), samples=SAMPLES)(states)


@pytest.fixture(scope="module")
def under_random(env):
    """The function of states, which compiles once."""
    return counterfactual(env, RandomPolicy(), samples=SAMPLES)


@jax.jit
def step(env, state, action):
    return env.step(state, action)


draw = jax.jit(draw_action)


def played(env, policy, state, sample, action, horizon):
    """The return of one future, step by step."""
    own = jax.random.fold_in(state.dynamics.key, COUNTERFACTUAL + state.taken.astype(jnp.uint32))
    key = jax.random.fold_in(own, sample)
    state, timestep = step(env, env.with_key(state, key), action)
    total = float(timestep.reward)
    for number in range(horizon):
        if bool(state.last.done):
            break
        drawn = draw(policy, jax.random.fold_in(key, number), state.last.observation)
        state, timestep = step(env, state, drawn)
        total += float(timestep.reward)
    return total


@pytest.mark.parametrize("horizon", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_equals_futures_that_are_played_one_by_one(env, states, under_guideline, horizon):
    policy, found = GuidelineRules(), under_guideline
    if horizon:
        found = counterfactual(env, policy, samples=SAMPLES, horizon=horizon)(states)
    assert found.shape == (PATIENTS, 25)
    one = jax.tree.map(lambda leaf: leaf[1], states)
    chosen = int(policy(jax.random.key(0), one.last.observation).argmax())

    def value_of(action):
        futures = [
            played(env, policy, one, sample, action, horizon or STEPS) for sample in range(SAMPLES)
        ]
        return np.mean(futures)

    for action in (0, 7, 24):
        expected = value_of(action) - value_of(chosen)
        np.testing.assert_allclose(found[1, action], expected, atol=2e-4)
    assert abs(found[1, chosen]) < 1e-5


def test_a_policy_gains_nothing_over_itself(under_random, states):
    found = under_random(states)
    np.testing.assert_allclose(found.mean(1), 0.0, atol=1e-4)
    assert float(jnp.abs(found).max()) > 0.1


def test_who_is_not_treated_any_more_gains_nothing(env, under_random, states):
    together = jax.jit(jax.vmap(env.step))
    for _ in range(STEPS):
        states, _ = together(states, jnp.zeros(PATIENTS, jnp.int32))
    assert not under_random(states).any()


def test_futures_are_not_the_real_one(env, states):
    """The random numbers of the episode do not affect the values of actions."""
    one = jax.tree.map(lambda leaf: leaf[0], states)
    real = step(env, one, jnp.int32(6))[0].last.observation.dynamic
    own = jax.random.fold_in(one.dynamics.key, COUNTERFACTUAL)
    other = step(env, env.with_key(one, own), jnp.int32(6))[0].last.observation.dynamic
    assert float(jnp.abs(real - other).max()) > 0
    same = step(env, env.with_key(one, one.dynamics.key), jnp.int32(6))[0]
    np.testing.assert_array_equal(same.last.observation.dynamic, real)


def test_sizes():
    with pytest.raises(InputError, match="at least 1"):
        counterfactual(SepsisEnv.synthetic(), RandomPolicy(), samples=0)


def test_smoothing_keeps_surfaces_of_degree_two_and_a_fourth_of_the_noise():
    vasopressor, fluid = np.divmod(np.arange(25), 5)
    surface = 3.0 - vasopressor + 0.5 * vasopressor**2 + 2.0 * vasopressor * fluid - fluid**2
    np.testing.assert_allclose(surface @ smoothing(), surface, atol=1e-9)
    assert np.trace(smoothing() @ smoothing().T) / 25 == pytest.approx(6 / 25)


def test_smooth_advantages_are_the_fit_of_the_values(env, states, under_guideline):
    found = counterfactual(env, GuidelineRules(), samples=SAMPLES, smooth=True)(states)
    fitted = np.asarray(under_guideline, np.float64) @ smoothing()
    np.testing.assert_allclose(
        np.asarray(found) - np.asarray(found).mean(-1, keepdims=True),
        fitted - fitted.mean(-1, keepdims=True),
        atol=1e-3,
    )
