"""ICU-Sepsis gives the returns and lengths that its authors published (Choudhary et al. 2024)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worldmodel.envs.unrolling import keys_of, play_all, play_table
from worldmodel import SepsisEnv
from worldmodel.envs.icu_sepsis import icu_sepsis
from worldmodel.envs.tables import best_policy

EPISODES, STEPS = 24_000, 100


@pytest.fixture(scope="module")
def env():
    return SepsisEnv.icu_sepsis()


@pytest.fixture(scope="module")
def mdp():
    return icu_sepsis(exploration=0.0)


def policy_of(mdp, name):
    if name == "optimal":
        return best_policy(mdp, horizon=100, gamma=1.0)
    return mdp.clinician if name == "expert" else np.full(mdp.clinician.shape, 0.04)


def mean_length(mdp, policy):
    """Exact mean number of steps, without a limit."""
    on = ~mdp.terminal
    ahead = np.einsum("sa,sat->st", policy, mdp.transition)[np.ix_(on, on)]
    return mdp.start[on] @ np.linalg.solve(np.eye(on.sum()) - ahead, np.ones(on.sum()))


@pytest.mark.parametrize(
    ("name", "value", "steps"),
    [("random", 0.78, 9.45), ("expert", 0.78, 9.22), ("optimal", 0.88, 10.99)],
)
def test_published_returns_and_lengths(env, mdp, name, value, steps):
    policy = policy_of(mdp, name)
    total, length, done = play_table(
        env, keys_of(jax.random.key(1), EPISODES), jnp.asarray(policy, jnp.float32), STEPS
    )
    assert float(done.mean()) > 0.999
    assert abs(float(total.mean()) - value) < 0.01
    exact = mean_length(mdp, policy)
    assert abs(exact - steps) < 0.02  # 9.462, 9.238 and 10.992: published ones were simulated
    assert abs(float(length.mean()) - exact) < 4 * float(length.std()) / EPISODES**0.5


def test_transitions_are_the_tables(env, mdp):
    """From one state under one action, next states come as often as the table says."""
    state, action, count = 5, 7, 40_000
    start, _ = env.reset(jax.random.key(0))
    keys = keys_of(jax.random.key(3), count)

    @jax.jit
    def after(env, keys):
        def one(key):
            inner = start.dynamics.replace(number=jnp.int32(state), key=key)
            return env.step(start.replace(dynamics=inner), jnp.int32(action))[1].observation

        return jax.vmap(one)(keys)

    share = np.bincount(after(env, keys), minlength=716) / count
    want = mdp.transition[state, action]
    assert (np.abs(share - want) < 5 * np.sqrt(want / count) + 1e-12).all()
    assert (want > 0.01).sum() > 3


def test_support_marks_admissible_actions(env, mdp):
    assert 0.05 < mdp.admissible[:-3].mean() < 0.95
    actions = jnp.arange(25)[:, None]
    keys = jnp.broadcast_to(jax.random.key(4), (25,))
    _, first, got = play_all(env, keys, actions)
    here = int(first.observation[0])
    np.testing.assert_array_equal(got.info.support[:, 0], mdp.admissible[here])
    np.testing.assert_allclose(first.info.sofa, mdp.sofa[here], rtol=1e-6)


def test_inadmissible_actions_lead_where_the_admissible_ones_lead_on_average(mdp):
    for state in (0, 100, 700):
        inside = mdp.admissible[state]
        mean = mdp.transition[state, inside].mean(0)
        np.testing.assert_allclose(
            mdp.transition[state, ~inside], mean[None].repeat((~inside).sum(), 0), atol=1e-12
        )
        assert not inside.all()


def test_ends(env):
    keys = keys_of(jax.random.key(5), 200)
    state, _, got = play_all(env, keys, jnp.full((200, 60), 3))
    ended = np.asarray(state.last.terminated)
    assert ended.mean() > 0.9
    survived = np.asarray(state.last.observation)[ended] == 714
    np.testing.assert_array_equal(np.asarray(got.reward.sum(1))[ended], survived)
    np.testing.assert_array_equal(np.asarray(state.last.info.mortality)[ended], ~survived)
    cut = SepsisEnv.icu_sepsis(max_steps=4)
    _, _, short = play_all(cut, keys, jnp.full((200, 6), 3))
    np.testing.assert_array_equal(short.truncated[:, 3], ~np.asarray(got.terminated[:, 3]))
    assert short.truncated[:, 3].any()
