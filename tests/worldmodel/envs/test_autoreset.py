"""Automatic reset in both of Gymnasium's conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worldmodel.envs.unrolling import play
from worldmodel import SepsisEnv
from worldmodel.envs.env import AutoReset, episode_key
from worldmodel.errors import InputError

KEY = jax.random.key(9)
ACTIONS = jnp.asarray(np.random.default_rng(1).integers(0, 25, 8))


@pytest.fixture(scope="module")
def env(world, episodes):
    return SepsisEnv.learned(world, episodes, horizon=2)  # three decisions each


def plain(env, number, actions):
    _, first, rest = play(env, episode_key(KEY, number), actions)
    rows = jnp.concatenate([first.observation.dynamic[None], rest.observation.dynamic])
    return np.asarray(rows), np.asarray(rest.reward)


def test_next_step(env):
    _, first, got = play(AutoReset(env, "next-step"), KEY, ACTIONS)
    shown = np.concatenate([first.observation.dynamic[None], got.observation.dynamic])
    rows, rewards = plain(env, 0, ACTIONS[:3])
    np.testing.assert_allclose(shown[:4], rows, rtol=1e-5)
    np.testing.assert_allclose(got.reward[:3], rewards, rtol=1e-5)
    # The fourth action is spent on the reset.
    rows, rewards = plain(env, 1, ACTIONS[4:7])
    np.testing.assert_allclose(shown[4:8], rows, rtol=1e-5)
    np.testing.assert_allclose(got.reward[4:7], rewards, rtol=1e-5)
    assert float(got.reward[3]) == 0
    np.testing.assert_array_equal(got.terminated, [0, 0, 1, 0, 0, 0, 1, 0])


def test_same_step(env):
    _, first, got = play(AutoReset(env, "same-step"), KEY, ACTIONS)
    final = np.asarray(got.info.final_observation.dynamic)
    for number, begin in ((0, 0), (1, 3)):
        rows, rewards = plain(env, number, ACTIONS[begin : begin + 3])
        np.testing.assert_allclose(final[begin : begin + 3], rows[1:], rtol=1e-5)
        np.testing.assert_allclose(got.reward[begin : begin + 3], rewards, rtol=1e-5)
        shown = first if begin == 0 else jax.tree.map(lambda x, b=begin: x[b - 1], got)
        np.testing.assert_allclose(shown.observation.dynamic, rows[0], rtol=1e-5)
    np.testing.assert_array_equal(got.terminated, [0, 0, 1, 0, 0, 1, 0, 0])
    assert not np.allclose(final[2], got.observation.dynamic[2])


def test_bad_mode(env):
    with pytest.raises(InputError, match="mode: got 'later'"):
        AutoReset(env, "later")
