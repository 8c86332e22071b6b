"""Advantages computed by hand, and the tokens that get them."""

from dataclasses import replace

import numpy as np
import pytest

from policy.agent.dialogue import COMPLETED, FAILED, TOO_MANY_INVALID, Decision, Stay, Turn
from policy.serving.backend import Reply
from policy.train.rl.advantages import AdvantageConfig, assign_advantages, penalties, rewards
from policy.train.rl.minibatch_update import decision_of_turns, pack_trajectories, trajectories
from worldmodel.errors import InputError


def decision(action, reward, turn, invalid=0, values=None):
    return Decision(
        step=0, action=action, reward=reward, sofa=5.0, meanbp=70.0, lactate=1.0, pao2=90.0,
        fio2=40.0, previous_vasopressor=0, simulations=1, invalid=invalid, values=values, turn=turn,
    )  # fmt: skip


def stay(patient, steps, *, failed=False, values=None):
    """Steps are (action, reward); every decision takes a simulation and a prescription."""
    decisions = [
        decision(action, reward, 2 * n + 1, values=values)
        for n, (action, reward) in enumerate(steps)
    ]
    turns, read = [], ()
    for number in range(2 * len(steps) + failed):
        if number % 2 == 0:
            read = ()  # a new conversation
        prompt = (*read, 100 + number, 50)
        said = (number, 7)
        reply = Reply("", prompt_ids=prompt, token_ids=said, logprobs=(-0.5, -0.25 * number))
        turns.append(Turn((), reply, 0, number % 2 == 0))
        read = (*prompt, *said)
    return Stay(
        patient, FAILED if failed else COMPLETED, TOO_MANY_INVALID if failed else None,
        decisions=decisions, turns=turns,
    )  # fmt: skip


def test_rewards_of_a_failed_stay_end_with_its_price():
    one = stay(0, [(3, 1.0), (4, -2.0)], failed=True)
    one.invalid.update(no_call=3)
    one.decisions[0] = decision(3, 1.0, 1, invalid=1)
    found = rewards(one, AdvantageConfig(failure=-15.0, refusal=-0.5))
    assert found.tolist() == [0.5, -2.0, -16.0]  # the two refusals after the last decision too
    assert decision_of_turns(one).tolist() == [0, 0, 1, 1, 2]


def test_broken_rules_have_a_price():
    """MAP 60 untreated breaks G1; MAP 70 and level 2 after 1 breaks G2, but not on admission."""
    broken = [
        replace(decision(0, 0.0, 1), meanbp=60.0),
        replace(decision(10, 0.0, 3), previous_vasopressor=1, step=4),
        replace(decision(10, 0.0, 3), previous_vasopressor=1, step=0),
        replace(decision(1, 0.0, 3), meanbp=60.0, step=4),
    ]
    assert penalties(broken, AdvantageConfig(violation=-2.0)).tolist() == [-2.0, -2.0, 0.0, 0.0]
    assert penalties([], AdvantageConfig(violation=-2.0)).shape == (0,)


def test_episode_advantages_by_hand():
    """Returns of patient 1 are 1 and 3: mean 2, sample SD sqrt(2); patient 2 twice the same."""
    stays = [
        stay(1, [(0, 1.0)]), stay(1, [(1, 1.0), (2, 2.0)]), stay(2, [(0, 5.0)]), stay(2, [(9, 5.0)])
    ]  # fmt: skip
    found = assign_advantages(stays, AdvantageConfig(kind="episode", scale=False))
    assert [one.tolist() for one in found.of_decisions] == [[-1.0], [1.0, 1.0], [0.0], [0.0]]
    assert found.kept.tolist() == [True, True, False, False]
    scaled = assign_advantages(stays, AdvantageConfig(kind="episode")).of_decisions
    np.testing.assert_allclose(scaled[1], 1 / np.sqrt(2), rtol=1e-3)


def test_step_advantages_meet_where_the_actions_so_far_are_equal():
    """Both begin in one state and go on in one after action 4; the third took another action.

    Returns 6, 2, 1: mean 3. First decisions: to go 6, 2, 1, the same. Second: after action 4 to go
    5 and 1, mean 3; after action 8 alone: 0.
    """
    stays = [
        stay(1, [(4, 1.0), (5, 5.0)]), stay(1, [(4, 1.0), (6, 1.0)]), stay(1, [(8, 0.0), (5, 1.0)])
    ]  # fmt: skip
    found = assign_advantages(stays, AdvantageConfig(kind="step", scale=False, step_weight=0.5))
    expected = [[3 + 1.5, 3 + 1.0], [-1 - 0.5, -1 - 1.0], [-2 - 1.0, -2 + 0.0]]
    for one, by_hand in zip(found.of_decisions, expected, strict=True):
        np.testing.assert_allclose(one, by_hand, atol=1e-5)


def test_counterfactual_advantage_is_the_value_of_the_action():
    values = tuple(float(action) - 12.0 for action in range(25))
    stays = [stay(1, [(4, 1.0), (20, 5.0)], values=values), stay(2, [(12, 0.0)], values=values)]
    stays[1].decisions[0] = decision(12, 0.0, 1, invalid=2, values=values)
    config = AdvantageConfig(kind="counterfactual", scale=False, refusal=-1.0)
    found = assign_advantages(stays, config)
    assert [one.tolist() for one in found.of_decisions] == [[-8.0, 8.0], [-2.0]]
    assert found.kept.all()
    center, spread = -2.0 / 3.0, np.std([-8.0, 8.0, -2.0])
    scaled = assign_advantages(
        stays, AdvantageConfig(kind="counterfactual", refusal=-1.0)
    ).of_decisions
    np.testing.assert_allclose(scaled[0], (np.array([-8.0, 8.0]) - center) / spread, rtol=1e-5)
    bounded = assign_advantages(
        stays, AdvantageConfig(kind="counterfactual", refusal=-1.0, bound=0.5)
    )
    last = (-2.0 - center) / spread  # -0.2, which is within the bound
    assert [one.tolist() for one in bounded.of_decisions] == [[-0.5, 0.5], [pytest.approx(last)]]
    with pytest.raises(InputError, match="state scorer"):
        assign_advantages([stay(1, [(0, 1.0)])], AdvantageConfig())


def test_a_batch_in_which_all_failed_alike_is_not_blown_up():
    """Nothing to tell apart: a division by their spread of nearly 0 would make the loss huge."""
    stays = [stay(patient, [], failed=True) for patient in range(3)]
    scaled = assign_advantages(stays, AdvantageConfig(kind="counterfactual")).of_decisions
    assert all(np.abs(one).max() < 1.0 for one in scaled)


def test_every_sampled_token_gets_the_advantage_of_its_decision():
    one = stay(1, [(4, 1.0), (20, 5.0)], failed=True)
    first, second, last = trajectories(one, [0.5, -2.0, -15.0])
    assert first.dialogue.ids.tolist() == [100, 50, 0, 7, 101, 50, 1, 7]
    assert first.dialogue.own.tolist() == [False, False, True, True] * 2
    assert first.advantage.tolist() == [0, 0, 0.5, 0.5] * 2
    assert first.sampler_logprobs.tolist() == [0, 0, -0.5, 0.0, 0, 0, -0.5, -0.25]
    assert second.advantage.tolist() == [0, 0, -2.0, -2.0] * 2
    assert last.advantage.tolist() == [0, 0, -15.0, -15.0]

    rows, _ = pack_trajectories([first, second, last], 13, seed=1)
    assert rows.ids.shape == (2, 13)
    assert rows.advantage[rows.mask].sum() == 4 * 0.5 - 4 * 2.0 - 2 * 15.0
    np.testing.assert_array_equal(rows.old_logprobs, rows.sampler_logprobs)
    assert not rows.advantage[~rows.mask].any() and not rows.sampler_logprobs[~rows.mask].any()
    for leaf in (rows.ids, rows.advantage, rows.sampler_logprobs):
        assert not leaf[rows.segments == 0].any()
