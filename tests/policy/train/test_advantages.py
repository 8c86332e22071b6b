"""Advantages by hand."""

import numpy as np
import pytest

from policy.train.rl.advantages import (
    gigpo,
    group_relative,
    informative,
    returns_to_go,
    step_relative,
)
from worldmodel.errors import InputError

# Group a: 1, 3, 5 (mean 3, deviation 2); b: 4, 4; c: 7 alone.
RETURNS = np.array([1.0, 4.0, 3.0, 7.0, 5.0, 4.0])
GROUPS = ["a", "b", "a", "c", "a", "b"]


def test_within_groups():
    found = group_relative(RETURNS, GROUPS, scale=False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [-2, 0, 0, 0, 2, 0])
    found = group_relative(RETURNS, GROUPS, epsilon=0.5)
    np.testing.assert_allclose(found, [-0.8, 0, 0, 0, 0.8, 0])
    # Means of the others: 4, 3, 2 for a.
    found = group_relative(RETURNS, GROUPS, scale=False, leave_one_out=True)
    np.testing.assert_allclose(found, [-3, 0, 0, 0, 3, 0])


def test_far_from_zero_nothing_is_lost():
    returns = 1e8 + np.array([0.0, 1.0])
    np.testing.assert_allclose(group_relative(returns, [0, 0], scale=False), [-0.5, 0.5])


def test_groups_without_a_difference():
    assert informative(RETURNS, GROUPS).tolist() == [True, False, True, False, True, False]
    assert informative(np.array([1.0, 1.0 + 1e-9]), [0, 0]).tolist() == [False, False]
    assert informative(np.empty(0), []).tolist() == []


def test_returns_to_go():
    # Two episodes in turns: rewards 1, 2, 4 and 8, 16, at discount 1/2.
    found = returns_to_go(np.array([1, 8, 2, 16, 4.0]), [0, 1, 0, 1, 0], discount=0.5)
    np.testing.assert_allclose(found, [3, 16, 4, 16, 4])


def test_equal_states_of_a_group():
    to_go = np.array([1.0, 3.0, 5.0, 10.0, 30.0])
    states = [(1, 2), (1, 2), (9, 9), (1, 2), (1, 2)]
    # The same state in another group is another place; a state seen once has nothing to say.
    found = step_relative(to_go, states, [0, 0, 0, 1, 1], scale=False)
    np.testing.assert_allclose(found, [-1, 1, 0, -10, 10])


def test_episodes_and_steps():
    # Episodes with returns 0 and 4 (A: -2, 2) both begin in s; only the second sees t.
    found = gigpo(
        np.array([0.0, 4.0]),
        np.array([7, 7]),
        np.array([1.0, 3.0, 5.0]),
        ["s", "s", "t"],
        np.array([0, 1, 1]),
        weight=0.5,
        scale=False,
    )
    np.testing.assert_allclose(found, [-2 - 0.5, 2 + 0.5, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_relative(np.zeros(3), [0, 0]), r"shape \(3,\) and 2 labels"),
        (lambda: group_relative(np.array([np.nan, 1.0]), [0, 0]), "1 of 2 are not finite"),
        (lambda: returns_to_go(np.zeros(1), [0], discount=1.5), "discount: got 1.5"),
        (lambda: step_relative(np.zeros(2), ["s"], [0, 0]), "anchors: got 1"),
        (
            lambda: gigpo(np.zeros(1), [0], np.zeros(1), ["s"], np.array([1])),
            "episodes: expected indices below 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
