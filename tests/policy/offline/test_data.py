"""Features and transitions by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.base import decision_features
from policy.offline.algorithms import OfflineConfig
from policy.offline.data import Transitions, transitions
from policy.offline.training import draw_batch
from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.clinical.reward import trajectory_rewards
from worldmodel.observation import NUM_STATE_FEATURES, observation_at, state_features

BLOCK = schema.NUM_FEATURES + 3  # of one earlier row: changes, two levels, whether it is
EPISODES = toy_episodes(25, 8)
LENGTH = np.asarray(EPISODES.length)
STARTS = np.concatenate([[0], np.cumsum(LENGTH)])


def scores(stay, step):
    """z-scores of `unit_scaler`."""
    values = np.array(EPISODES.dynamic[stay, step])
    values[schema.URINE] = np.log1p(values[schema.URINE])
    return values


def features_at(step, past, scaler, stay=0):
    return decision_features(observation_at(EPISODES, stay, step, past=past), scaler)


def test_features_are_the_state_then_the_earlier_rows(unit_scaler):
    got = np.asarray(features_at(5, 3, unit_scaler))
    assert got.shape == (NUM_STATE_FEATURES + 2 * BLOCK,)
    state = state_features(observation_at(EPISODES, 0, 5), unit_scaler)
    np.testing.assert_array_equal(got[:NUM_STATE_FEATURES], state)
    for number, step in enumerate((3, 4)):
        block = got[NUM_STATE_FEATURES:].reshape(2, BLOCK)[number]
        change = np.clip(scores(0, 5) - scores(0, step), -5, 5)
        np.testing.assert_allclose(block[: schema.NUM_FEATURES], change, atol=1e-4)
        levels = [EPISODES.vasopressor[0, step] / 4, EPISODES.fluid[0, step] / 4]
        np.testing.assert_allclose(block[schema.NUM_FEATURES : -1], levels)
        assert block[-1] == 1
    assert (np.abs(got[NUM_STATE_FEATURES:]) == 5).any()  # the clip is seen at work


@pytest.mark.parametrize("step", [0, 1])
def test_rows_before_admission_are_zero(step, unit_scaler):
    blocks = features_at(step, 4, unit_scaler)[NUM_STATE_FEATURES:].reshape(3, BLOCK)
    assert not blocks[: 3 - step].any()
    assert blocks[3 - step :].any(-1).all()
    assert blocks[:, -1].tolist() == [0.0] * (3 - step) + [1.0] * step


def test_the_newest_row_has_no_block_of_its_own(unit_scaler):
    for past in (0, 1):
        assert features_at(4, past, unit_scaler).shape == (NUM_STATE_FEATURES,)


@pytest.mark.parametrize("past", [0, 3])
def test_the_treatment_of_the_row_itself_is_not_seen(past, unit_scaler):
    given = EPISODES.replace(
        vasopressor=EPISODES.vasopressor.at[0, 5].add(1), fluid=EPISODES.fluid.at[0, 5].add(1)
    )
    after = decision_features(observation_at(given, 0, 5, past=past), unit_scaler)
    np.testing.assert_array_equal(after, features_at(5, past, unit_scaler))


@pytest.mark.parametrize("block", [4096, 16])
def test_transitions_row_by_row(block, unit_scaler):
    got = transitions(EPISODES, unit_scaler, past=3, block=block)
    assert got.num_rows == LENGTH.sum()
    lactate = EPISODES.dynamic[..., schema.INDEX["lactate"]]
    reward = trajectory_rewards(EPISODES.sofa, lactate, EPISODES.length, EPISODES.died_90d)
    for stay, length in enumerate(LENGTH):
        for step in range(length):
            row = STARTS[stay] + step
            assert (
                got.action[row]
                == 5 * EPISODES.vasopressor[stay, step] + (EPISODES.fluid[stay, step])
            )
            assert got.sofa[row] == EPISODES.sofa[stay, step]
            assert got.last[row] == (step == length - 1)
            assert got.reward[row] == reward[stay, step]
    for stay, step in ((0, 0), (0, 7), (7, 1), (24, LENGTH[24] - 1)):
        want = features_at(step, 3, unit_scaler, stay)
        np.testing.assert_allclose(got.features[STARTS[stay] + step], want, atol=1e-4)


def test_rewards_by_hand(unit_scaler):
    got = transitions(EPISODES, unit_scaler, past=0)
    lactate = np.asarray(EPISODES.dynamic[..., schema.INDEX["lactate"]])
    sofa = np.asarray(EPISODES.sofa)
    for stay in range(5):
        end = LENGTH[stay] - 1
        assert got.reward[STARTS[stay] + end] == (-15 if EPISODES.died_90d[stay] else 15)
        for step in range(end):
            change = sofa[stay, step + 1] - sofa[stay, step]
            want = -0.125 * change - 2 * np.tanh(lactate[stay, step + 1] - lactate[stay, step])
            if change == 0 and sofa[stay, step] > 0:
                want -= 0.025
            np.testing.assert_allclose(got.reward[STARTS[stay] + step], want, atol=1e-5)


def test_padding_never_appears(unit_scaler):
    rows = np.asarray(EPISODES.valid)

    def poison(leaf):
        if leaf.shape[:2] != rows.shape or leaf.dtype != jnp.float32:
            return leaf
        mask = rows.reshape(rows.shape + (1,) * (leaf.ndim - 2))
        return jnp.where(mask, leaf, jnp.nan)

    got = transitions(jax.tree.map(poison, EPISODES), unit_scaler, past=3)
    want = transitions(EPISODES, unit_scaler, past=3)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.isfinite(got.features).all() and np.isfinite(got.reward).all()


def test_batches_follow_a_stay_to_its_end_and_no_further():
    last = jnp.asarray([False, False, True, True, False, True])
    data = Transitions(
        features=10.0 + jnp.arange(6.0)[:, None],
        action=jnp.arange(6, dtype=jnp.int32),
        reward=jnp.arange(6) / 2,
        last=last,
        sofa=20.0 + jnp.arange(6),
    )
    batch = draw_batch(jax.random.key(0), data, OfflineConfig(batch_size=400, gamma=0.9))
    row = np.asarray(batch.action)
    assert np.unique(row).tolist() == list(range(6))
    np.testing.assert_array_equal(batch.features[:, 0], 10 + row)
    np.testing.assert_array_equal(batch.reward, row / 2)
    ends = np.asarray(last)[row]
    np.testing.assert_array_equal(batch.discount, np.where(ends, 0, np.float32(0.9)))
    np.testing.assert_array_equal(batch.next_features[~ends, 0], 11 + row[~ends])
    np.testing.assert_array_equal(batch.next_action[~ends], 1 + row[~ends])
    np.testing.assert_array_equal(batch.next_sofa[~ends], 21 + row[~ends])
