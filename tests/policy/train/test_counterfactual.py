"""Advantages of all actions beside futures that are played one by one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.agent.env_pool import reset_batch
from policy.planner import Planner, PlannerConfig, fit_planner
from policy.simple import GuidelineRules, RandomPolicy
from policy.train.rl.counterfactual import counterfactual, planned, smoothing
from tests.toy import toy_episodes
from worldmodel import struct
from worldmodel.envs.env import SepsisEnv
from worldmodel.errors import InputError
from worldmodel.keys import COUNTERFACTUAL
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.observation import draw_action
from worldmodel.scaling import published_scaler
from worldmodel.synthetic import Config, patient_keys

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


def test_a_planner_tells_advantages_over_the_clinician(states):
    """Those of its own search in each patient; what it does not support is the least of them."""
    shape = ModelConfig(variant="recurrent", hidden=8, head=4)
    world = init_world_model(jax.random.key(6), published_scaler(), shape, members=2)
    env = SepsisEnv.synthetic(config=Config(past=Planner.past), max_steps=STEPS)
    patients = np.arange(PATIENTS, dtype=np.int32)
    keys = patient_keys(jax.random.key(5), patients)
    seen = jax.tree.map(lambda leaf: leaf[:PATIENTS], reset_batch(env, keys, patients).states)
    config = PlannerConfig(support=0.5)
    planner = fit_planner(toy_episodes(4, 5), world, None, Tilted(), config)
    found = np.asarray(planned(planner)(seen))
    prior = np.asarray(Tilted()(None, None))
    np.testing.assert_allclose(found @ prior, 0.0, atol=1e-4)
    assert (found[:, 20:] == found.min(1, keepdims=True)).all()  # a hundredth of the likeliest
    for patient in range(PATIENTS):
        state = jax.tree.map(lambda leaf, at=patient: leaf[at], seen)
        own = jax.random.fold_in(state.dynamics.key, COUNTERFACTUAL)
        observation = state.last.observation
        values = planner.action_values(jax.random.fold_in(own, 0), observation)[:20]
        np.testing.assert_allclose(np.diff(found[patient, :20]), np.diff(values), atol=1e-3)
    over = replace(seen, last=replace(seen.last, terminated=jnp.ones(PATIENTS, bool)))
    assert not np.asarray(planned(planner)(over)).any()


@struct.dataclass
class Tilted(RandomPolicy):
    """Hardly ever the highest vasopressor level."""

    def __call__(self, key, observation):
        weights = jnp.where(jnp.arange(25) < 20, 1.0, 0.01)
        return weights / weights.sum()


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
