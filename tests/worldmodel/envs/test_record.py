"""Following the record until the first difference, as the published protocol does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worldmodel.envs.unrolling import reset, step
from worldmodel import SepsisEnv, schema
from worldmodel.clinical.reward import episode_rewards
from worldmodel.errors import InputError

KEY = jax.random.key(11)
STAYS = jnp.arange(12)


@jax.jit
def play_stays(env, actions):
    """Episodes of all stays [N] under actions [N, T]."""

    def one(stay, plan):
        state, first = env.reset(KEY, stay)
        return first, jax.lax.scan(env.step, state, plan)[1]

    return jax.vmap(one)(STAYS, actions)


@pytest.fixture(params=["corrected", "reference"])
def mode(request):
    return request.param


def test_the_recorded_treatments_give_the_record(world, episodes, mode):
    env = SepsisEnv.learned(world, episodes, follow_record=True, mode=mode)
    first, got = play_stays(env, episodes.action)
    length = np.asarray(episodes.length)
    for stay in range(12):
        rows = np.concatenate(
            [first.observation.dynamic[stay][None], got.observation.dynamic[stay]]
        )[: length[stay]]
        np.testing.assert_allclose(
            rows, episodes.dynamic[stay, : length[stay]], rtol=1e-3, atol=2e-3
        )
        assert int(np.argmax(got.terminated[stay])) == length[stay] - 1
    ends = np.asarray(got.reward)[np.arange(12), length - 1]
    np.testing.assert_array_equal(ends, np.where(episodes.died_90d, -15.0, 15.0))
    if mode == "reference":  # whose SOFA is the recorded one
        want = np.asarray(episode_rewards(episodes)).sum(1)
        np.testing.assert_allclose(np.asarray(got.reward).sum(1), want, atol=2e-3)


def test_from_the_first_difference_on_the_model_plays(world, episodes, mode):
    """One other treatment, then the recorded ones again: the rows stay simulated."""
    changed = 2
    plans = episodes.action.at[:, changed].set((episodes.action[:, changed] + 1) % 25)
    make = partial(SepsisEnv.learned, world, mode=mode)
    _, got = play_stays(make(episodes, follow_record=True), plans)
    long = np.flatnonzero(np.asarray(episodes.length) > changed + 2)
    for stay in long:
        # The same stay, played by the model from the changed row on.
        single = episodes.select(np.array([stay]))
        env = make(single, start_step=changed)
        state, _ = reset(env, KEY, jnp.int32(0))
        for row in range(changed, int(episodes.length[stay])):
            state, want = step(env, state, plans[stay, row])
            close = {"rtol": 1e-4, "atol": 1e-3}
            found = jax.tree.map(lambda leaf, i=(stay, row): leaf[i], got)
            np.testing.assert_allclose(found.observation.dynamic, want.observation.dynamic, **close)
            np.testing.assert_allclose(found.reward, want.reward, **close)
    assert len(long) > 3


def test_no_record_is_followed_unless_asked(world, episodes):
    _, got = play_stays(SepsisEnv.learned(world, episodes), episodes.action)
    meanbp = schema.INDEX["meanbp"]
    recorded = np.asarray(episodes.dynamic)[:, 1, meanbp]
    assert (np.abs(np.asarray(got.observation.dynamic)[:, 0, meanbp] - recorded) > 0.1).all()


def test_stays_need_a_learned_world(world, episodes):
    with pytest.raises(InputError, match="stay"):
        SepsisEnv.synthetic().reset(KEY, jnp.int32(0))
    with pytest.raises(InputError, match="follow_record"):
        SepsisEnv.learned(world, episodes, follow_record=True, horizon=3)
