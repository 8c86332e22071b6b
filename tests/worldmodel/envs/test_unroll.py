"""`unroll` equals a plain loop over `reset` and `step`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worldmodel.envs.unrolling import keys_of, reset, step
from worldmodel import SepsisEnv, keys
from worldmodel.envs import AutoReset, unroll
from worldmodel.errors import InputError
from worldmodel.observation import draw_action, recent

KEY = jax.random.key(3)


class LooksBack:
    """A policy that prefers the action its past rows were given."""

    past = 2

    def __call__(self, key, observation):
        assert observation.past.valid.shape == (2,)
        given = observation.past.vasopressor[0] * 5 + observation.past.fluid[0]
        return jnp.full(25, 0.02).at[given].add(0.5)


@pytest.fixture(scope="module")
def env(world, episodes):
    return SepsisEnv.learned(world, episodes, horizon=3, past=4)


def test_equals_a_plain_loop(env):
    policy = LooksBack()
    state, timestep = reset(env, KEY)
    own = jax.random.fold_in(KEY, keys.UNROLL)
    actions, rewards = [], []
    for number in range(3):
        observation = recent(timestep.observation, 2)
        actions.append(draw_action(policy, jax.random.fold_in(own, number), observation))
        state, timestep = step(env, state, actions[-1])
        rewards.append(timestep.reward)
    after, trajectory = jax.jit(lambda env: unroll(env, policy, KEY, num_steps=3))(env)
    np.testing.assert_array_equal(trajectory.actions, actions)
    np.testing.assert_allclose(trajectory.timesteps.reward, rewards, rtol=1e-5)
    assert int(after.taken) == 3


def test_goes_on_from_a_state(env):
    state, trajectory = unroll(env, LooksBack(), KEY, num_steps=2)
    _, more = unroll(env, LooksBack(), KEY, num_steps=1, start=(state, state.last))
    np.testing.assert_array_equal(
        more.first.observation.dynamic, trajectory.timesteps.observation.dynamic[-1]
    )


def test_many_patients_with_automatic_reset(env):
    own = keys_of(KEY, 3)
    state, trajectory = jax.vmap(lambda key: unroll(AutoReset(env), LooksBack(), key, num_steps=6))(
        own
    )
    assert trajectory.actions.shape == (3, 6)
    assert trajectory.timesteps.reward.shape == (3, 6)
    np.testing.assert_array_equal(state.episode, [1, 1, 1])


def test_a_policy_that_looks_back_further_than_the_environment(world, episodes):
    short = SepsisEnv.learned(world, episodes, past=1)
    with pytest.raises(InputError, match="looks back on 2 rows"):
        unroll(short, LooksBack(), KEY, num_steps=1)
