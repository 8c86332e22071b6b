"""The environment on a learned world model, against `rollout` and the recorded protocol."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worldmodel.envs.conftest import world_of
from tests.worldmodel.envs.unrolling import keys_of, play, play_all, reset
from worldmodel import SepsisEnv, schema
from worldmodel.clinical import reward
from worldmodel.errors import InputError
from worldmodel.observation import observations
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import rollout

KEY = jax.random.key(5)
PLAN = np.array([3, 24, 0, 12, 7])
HORIZON = len(PLAN)
KEYS = keys_of(KEY, 9)
PLANS = jnp.asarray(np.random.default_rng(0).integers(0, 25, (9, 15)))


def longest(episodes):
    return episodes.select(np.argmax(np.asarray(episodes.length))[None])


def plan_and_more():
    """The plan, its last treatment once more (which ends the episode), and two after the end."""
    return jnp.asarray([*PLAN, PLAN[-1], 1, 2])


def test_equals_rollout(worlds_and_mode, episodes):
    world, mode = worlds_and_mode
    stay = longest(episodes)
    env = SepsisEnv.learned(world, stay, start_step=2, horizon=HORIZON, mode=mode)
    start = start_history(world, stay, 2, recorded_sofa=mode == "reference")
    want = rollout(
        world, KEY, start, PLAN[None], samples=world.num_members, mode=mode,
        features=schema.FEATURE_NAMES,
    )  # fmt: skip
    state, first, got = play(env, KEY, plan_and_more())
    member = int(state.dynamics.member)

    def branch(name):
        return np.asarray(getattr(want, name))[0, 0, member]

    np.testing.assert_allclose(first.info.sofa, start.sofa[0])
    steps = slice(0, HORIZON)
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(
        got.observation.dynamic[steps], branch("values"), rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(got.info.sofa[steps], branch("sofa"))
    np.testing.assert_allclose(got.info.ventilation[steps], branch("ventilation"), **close)
    np.testing.assert_allclose(got.reward[steps], branch("reward"), **close)
    np.testing.assert_allclose(got.info.mortality[HORIZON], branch("mortality"), **close)
    assert int(got.info.projected.sum()) == branch("projected")
    assert (int(got.info.projected.sum()) > 0) is (mode == "corrected")
    np.testing.assert_allclose(
        got.reward.sum(), np.asarray(want.total_reward)[0, 0, member], **close
    )


@pytest.fixture(params=[("one", "corrected"), ("one", "reference"), ("ensemble", "corrected")])
def worlds_and_mode(request, world, ensemble):
    which, mode = request.param
    return {"one": world, "ensemble": ensemble}[which], mode


def test_first_observation_is_the_recorded_row(world, episodes):
    env = SepsisEnv.learned(world, episodes, start_step="random", past=3)
    recorded = observations(episodes, past=3)
    rows = set()
    for key in keys_of(KEY, 12):
        state, timestep = reset(env, key)
        history = state.dynamics.history
        stay = int(np.flatnonzero(np.asarray(episodes.stay_id) == int(history.patient[0]))[0])
        row = int(history.step[0])
        assert row < int(episodes.length[stay]) - 1
        rows.add((stay, row))
        want = jax.tree.map(lambda leaf, s=stay, r=row: leaf[s, r], recorded)
        # SOFA and urine are scored as simulated rows are.
        want = replace(
            want, sofa=timestep.observation.sofa, urine_24h=timestep.observation.urine_24h
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3),
            timestep.observation,
            want,
        )
    assert len(rows) > 6


def test_ends_where_the_record_ended(world, episodes):
    """As in the records, a stay of L rows takes L decisions; the last reward is +-15."""
    env = SepsisEnv.learned(world, episodes)
    state, first, got = play_all(env, keys_of(KEY, 20), jnp.full((20, 16), 6))
    patient = np.asarray(state.dynamics.history.patient[:, 0])
    stay = np.searchsorted(np.asarray(episodes.stay_id), patient)
    length = np.asarray(episodes.length)[stay]
    np.testing.assert_array_equal(state.taken, length)
    np.testing.assert_array_equal(np.argmax(got.terminated, 1), length - 1)
    assert len(set(stay)) > 5
    assert not got.truncated.any()

    # Every reward by the formula for recorded trajectories.
    lactate = schema.INDEX["lactate"]
    sofa = np.concatenate([first.info.sofa[:, None], got.info.sofa], 1)[:, :16]
    lactates = np.concatenate([first.observation.dynamic[:, None], got.observation.dynamic], 1)[
        :, :16, lactate
    ]
    end = np.asarray(got.info.mortality)[np.arange(20), length - 1]
    want = reward.trajectory_rewards(
        jnp.asarray(sofa), jnp.asarray(lactates), jnp.asarray(length), jnp.asarray(end)
    )
    np.testing.assert_allclose(got.reward, want, atol=1e-4)
    np.testing.assert_allclose(got.info.reward_terms.sum(-1), got.reward, atol=1e-5)
    assert (np.asarray(got.info.reward_terms)[..., :3] != 0).any((0, 1)).all()
    assert (np.abs(want) > 0.1).sum() > 40


def test_terminal_reward_by_outcome(world, episodes):
    stay = longest(episodes)

    def ends(outcome, mode="corrected"):
        env = SepsisEnv.learned(world, stay, horizon=1, outcome=outcome, mode=mode)
        _, _, got = play_all(env, keys_of(KEY, 300), jnp.zeros((300, 2), jnp.int32))
        return np.asarray(got.reward[:, 1]), np.asarray(got.info.mortality[:, 1])

    expected, mortality = ends(None)
    np.testing.assert_allclose(expected, 15 * (1 - 2 * mortality), rtol=1e-5)
    sampled, mortality = ends("sampled")
    assert set(sampled) == {-15.0, 15.0}
    share = (sampled < 0).mean()
    assert abs(share - mortality.mean()) < 4 * np.sqrt(0.25 / 300)
    threshold, mortality = ends(None, "reference")
    np.testing.assert_array_equal(threshold, np.where(mortality > 0.5, -15.0, 15.0))


def test_mortality_at_the_end_only(ensemble, episodes):
    """The same episodes, with mortality only where an episode ends."""
    every, once = (
        play_all(SepsisEnv.learned(ensemble, episodes, mortality_each_step=each), KEYS, PLANS)
        for each in (True, False)
    )
    np.testing.assert_allclose(once[2].reward, every[2].reward, rtol=1e-4, atol=1e-4)
    ended = np.asarray(once[2].terminated)
    np.testing.assert_array_equal(np.isnan(once[2].info.mortality), ~ended)
    np.testing.assert_allclose(
        np.asarray(once[2].info.mortality)[ended],
        np.asarray(every[2].info.mortality)[ended],
        rtol=1e-4,
    )
    assert len(set(ended.argmax(1))) > 3 and ended[:, -1].all()


def test_truncation_earns_no_terminal_reward(world, episodes):
    stay = longest(episodes)
    free = play(SepsisEnv.learned(world, stay, horizon=9), KEY, plan_and_more())[2]
    cut = play(SepsisEnv.learned(world, stay, horizon=9, max_steps=3), KEY, plan_and_more())[2]
    np.testing.assert_array_equal(cut.truncated, [False, False, True, True, True, True, True, True])
    assert not cut.terminated.any()
    np.testing.assert_allclose(cut.reward[:3], free.reward[:3], rtol=1e-5)
    np.testing.assert_allclose(
        cut.observation.dynamic[2], free.observation.dynamic[2], rtol=1e-4, atol=1e-3
    )
    # Where the outcome comes with the last step allowed, it counts.
    short = SepsisEnv.learned(world, stay, horizon=2, max_steps=3)
    both = play(short, KEY, plan_and_more())[2]
    assert bool(both.terminated[2]) and not both.truncated.any()
    assert float(both.info.reward_terms[2, 3]) != 0


def test_nothing_happens_after_the_end(world, episodes):
    stay = longest(episodes)
    for limit, flag in (
        ({"horizon": 2}, "terminated"),
        ({"horizon": 9, "max_steps": 3}, "truncated"),
    ):
        state, _, got = play(SepsisEnv.learned(world, stay, **limit), KEY, plan_and_more())
        assert int(state.taken) == 3
        assert bool(getattr(got, flag)[2]) and float(got.reward[2]) != 0
        for t in range(3, 8):
            earned = (got.reward[t], got.info.reward_terms[t], got.info.projected[t])
            assert not any(np.asarray(value).any() for value in earned)
            kept = (got.observation, got.terminated, got.truncated, got.info.sofa)
            jax.tree.map(lambda x, t=t: np.testing.assert_array_equal(x[t], x[2]), kept)


def test_a_patient_is_the_same_alone_and_in_a_batch(ensemble, episodes):
    env = SepsisEnv.learned(ensemble, episodes)
    together = play_all(env, KEYS, PLANS)
    others = play_all(env, KEYS[::-1], PLANS[::-1])
    for i in range(len(KEYS)):
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert_close(play(env, KEYS[i], PLANS[i]), mine)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[len(KEYS) - 1 - i], others), mine)


def assert_close(a, b):
    a, b = (jax.tree.leaves((x[1], x[2])) for x in (a, b))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-4, atol=2e-3)


def test_members_take_turns_and_disagree(ensemble, world, episodes):
    longest_stay = int(np.argmax(np.asarray(episodes.length)))
    copies = episodes.select(np.full(12, longest_stay))
    state, _, got = play_all(SepsisEnv.learned(ensemble, copies), KEYS, PLANS)
    assert set(np.asarray(state.dynamics.member)) == {0, 1, 2}
    assert (np.asarray(got.info.disagreement) > 1e-3).all()
    start = start_history(ensemble, copies.select(slice(0, len(KEYS))), 0).choose(PLANS[:, 0])
    mu = jax.jit(lambda model, window: model.transitions(*window).mu)(
        ensemble, start.window(schema.STATE_WINDOW)
    )
    np.testing.assert_allclose(got.info.disagreement[:, 0], np.std(mu, 0).mean(-1), rtol=1e-4)
    alone = play(SepsisEnv.learned(world, longest(episodes), horizon=9), KEY, plan_and_more())[2]
    np.testing.assert_array_equal(alone.info.disagreement, 0)
    assert np.isnan(alone.info.support).all()


def test_support_is_the_behaviour_policys(world, episodes):
    def behaviour(key, observation):
        raised = jnp.zeros(25).at[7].set(1.0 + observation.step)
        return jax.nn.softmax(raised)

    env = SepsisEnv.learned(world, longest(episodes), behavior=behaviour)
    got = play(env, KEY, jnp.asarray([7, 7, 0]))[2]
    raised = np.exp([1.0, 2.0, 3.0])
    want = np.array([raised[0], raised[1], 1.0]) / (raised + 24)
    np.testing.assert_allclose(got.info.support, want, rtol=1e-5)


def test_new_weights_need_no_new_compilation(world, episodes):
    compiled = []

    @jax.jit
    def first_reward(env, key):
        compiled.append(1)
        state, _ = env.reset(key)
        return env.step(state, jnp.int32(3))[1].reward

    rewards = {
        float(first_reward(SepsisEnv.learned(w, episodes), KEY))
        for w in (world, world_of(episodes, 8), world_of(episodes, 9))
    }
    assert len(compiled) == 1 and len(rewards) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "wrong"}, "mode: got 'wrong'"),
        ({"outcome": "maybe"}, "outcome: got 'maybe'"),
        ({"past": 13}, "past: got 13"),
        ({"horizon": 0}, "horizon: got 0"),
        ({"max_steps": 0}, "max_steps: got 0"),
        ({"start_step": -1}, "start_step: got -1"),
        ({"start_step": "last"}, "start_step: got 'last'"),
        ({"start_step": 13}, "has no row 13"),
    ],
)
def test_bad_settings(world, episodes, settings, message):
    with pytest.raises(InputError, match=message):
        SepsisEnv.learned(world, episodes, **settings)


def test_no_stays(world, episodes):
    with pytest.raises(InputError, match="no stay"):
        SepsisEnv.learned(world, episodes.select(slice(0, 0)))
