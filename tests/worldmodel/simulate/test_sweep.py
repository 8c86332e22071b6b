"""The grid of a sweep, plans for many starts, and statistics over samples."""

import jax
import numpy as np
import pytest

from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.simulate.history import start_history
from worldmodel.simulate.plans import RECORDED, plans_from, read_plan_set
from worldmodel.simulate.rollout import rollout
from worldmodel.simulate.sharded import ShardedRollout, branch_mesh, rollout_block, task_shape
from worldmodel.simulate.statistics import (
    disagreement,
    empty_summary,
    finish_summary,
    first_actions,
    fold_step,
    group_statistics,
    standard_error,
    support,
    weighted_quantiles,
)
from worldmodel.simulate.sweep import find_starts, make_grid, padded
from worldmodel.simulate.unroll import RolloutConfig, Step

# Where to start


def test_starts_after_the_end_of_a_stay_are_skipped_and_counted():
    starts = find_starts(np.array([1, 3, 5]), (4, 0, 2))
    assert list(zip(starts.stay, starts.step, strict=True)) == [
        (0, 0), (1, 0), (1, 2), (2, 0), (2, 2), (2, 4),
    ]  # fmt: skip
    assert starts.skipped == 3


def test_every_so_many_th_row():
    starts = find_starts(np.array([1, 4]), (), every=3)
    assert list(zip(starts.stay, starts.step, strict=True)) == [(0, 0), (1, 0), (1, 3)]
    assert starts.skipped == 0
    assert len(find_starts(np.array([1, 4]), (), every=1).stay) == 5


@pytest.mark.parametrize("steps", [(), (-1,), (2, 2), (5,)])
def test_impossible_starts_are_refused(steps):
    with pytest.raises(InputError, match="steps"):
        find_starts(np.array([1, 3, 5]), steps)


# Blocks


@pytest.mark.parametrize("branches", [1, 5, 64, 1000, 10**6])
@pytest.mark.parametrize(("plans", "policies"), [(7, ()), (0, (1, 25)), (25, (1,))])
def test_blocks_cover_every_group_once(plans, policies, branches):
    starts = find_starts(np.full(11, 4), (0, 3))
    grid = make_grid(
        starts, plans=plans, policies=policies, samples=6, horizon=5, branches=branches
    )
    seen = np.zeros((22, plans + len(policies)), int)
    for number, block in enumerate(grid.blocks):
        section = grid.sections[block.section]
        assert block.number == number and block.size <= section.starts
        rows = np.arange(block.first, block.first + block.size)
        seen[np.ix_(rows, section.plans)] += 1
        played = section.starts * section.width * 6 * section.cost
        assert played <= max(branches, 6 * section.cost)
    assert (seen == 1).all()
    assert sum(map(grid.branch_steps, grid.blocks)) == seen.size * 6 * 5


def test_many_starts_of_few_branches_are_cut_too():
    starts = find_starts(np.full(5000, 1), (0,))
    grid = make_grid(starts, plans=1, policies=(), samples=1, horizon=1, branches=10**6)
    assert [block.size for block in grid.blocks] == [2048, 2048, 904]


def test_padding_repeats_the_last():
    assert padded(np.array([4, 7]), 4).tolist() == [4, 7, 7, 7]


# Plans


def test_sets_of_plans():
    found = read_plan_set(["constant", "deviations", "clinician", "early=2,1;0,0"], horizon=3)
    assert len(found.names) == 52 and found.names[7] == "constant 1,2"
    assert found.actions[7].tolist() == [7, 7, 7]
    assert found.actions[25 + 7].tolist() == [7, RECORDED, RECORDED]
    assert found.actions[50].tolist() == [RECORDED] * 3
    assert found.actions[51].tolist() == [11, 0, 0]
    assert found.kinds[::26] == ("constant", "deviation") and found.kinds[51] == "sequence"


def test_deviations_may_be_followed_by_one_action():
    found = read_plan_set(["deviations"], horizon=3, then="1,0")
    assert found.actions[24].tolist() == [24, 5, 5]


@pytest.mark.parametrize(
    ("texts", "then", "words"),
    [
        (["often"], "", "or one of constant, deviations, clinician"),
        (["a=1,1", "a=2,2"], "", "two of that name"),
        (["constant", "constant"], "", "two of that name"),
        (["a=1,1;1,1;1,1"], "", "3 steps for a horizon of 2"),
        (["deviations"], "5,0", "level 5 is outside"),
    ],
)
def test_bad_plans_are_refused(texts, then, words):
    with pytest.raises(InputError, match=words):
        read_plan_set(texts, horizon=2, then=then)


def test_the_record_is_filled_in_and_its_last_treatment_goes_on(episodes):
    actions = read_plan_set(["clinician", "deviations", "a=0,1"], horizon=6).actions
    length = np.asarray(episodes.length)
    stay = np.array([0, 1, 2])
    step = np.array([0, length[1] - 1, length[2] - 4])
    plans, within = plans_from(actions, episodes, stay, step)
    given = np.asarray(episodes.action)
    for p in range(3):
        rows = np.minimum(step[p] + np.arange(6), length[stay[p]] - 1)
        want = given[stay[p], rows]
        assert plans[p, 0].tolist() == want.tolist()
        assert plans[p, 1 + 13].tolist() == [13, *want[1:]]
        assert plans[p, 26].tolist() == [1] * 6
        assert within[p, 0] == within[p, 5] == min(6, length[stay[p]] - step[p])
        assert np.isnan(within[p, 26])


# Statistics

KEY = jax.random.key(2)
PLANS = np.array([[0, 0, 0], [24, 7, 3]])
FEATURES = ("meanbp", "lactate", "creatinine")


@pytest.fixture(scope="module")
def start(ensemble, episodes):
    return start_history(ensemble, episodes.select(np.array([0, 3])), np.array([1, 0]))


@pytest.fixture(scope="module")
def summary(ensemble, start):
    plans = np.broadcast_to(PLANS, (2, *PLANS.shape)).astype(np.int32)
    shape = task_shape(2, 2, 8, 2, branches=100)
    sharded_rollout = ShardedRollout(ensemble, branch_mesh(), shape, RolloutConfig(3, FEATURES))
    return rollout_block(sharded_rollout, KEY, start, plans, 8)


@pytest.fixture(scope="module")
def values(episodes):
    rows = np.asarray(episodes.dynamic)[[0, 3], [1, 0]]
    return rows[:, [schema.INDEX[name] for name in FEATURES]]


def statistics(summary, start, values, **settings):
    return group_statistics(
        summary, values, np.asarray(start.sofa), features=FEATURES, members=2, horizon=3, **settings
    )


def test_statistics_are_those_of_whole_rollouts(ensemble, start, summary, values):
    found = statistics(summary, start, values)
    paths = rollout(ensemble, KEY, start, PLANS, samples=8, features=FEATURES)
    want = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), paths)
    meanbp, lactate = want.values[..., 0], want.values[..., 1]
    mortality = want.mortality
    reward = want.reward.sum(-1) + 15 * (1 - 2 * mortality)
    cleared = 1 - lactate[..., -1] / values[:, 1][:, None, None]
    sofa = np.asarray(start.sofa)[:, None]
    expected = {
        "meanbp_start": np.repeat(values[:, :1], 2, 1),
        "meanbp_mean": meanbp[..., -1].mean(-1),
        "lactate_q95": np.quantile(lactate[..., -1], 0.95, axis=-1),
        "creatinine_mean": want.values[..., -1, 2].mean(-1),
        "sofa_q50": np.median(want.sofa[..., -1], axis=-1),
        "sofa_change": want.sofa[..., -1].mean(-1) - sofa,
        "mortality_mean": mortality.mean(-1),
        "mortality_disagreement":
            np.abs(mortality[..., ::2].mean(-1) - mortality[..., 1::2].mean(-1)) / np.sqrt(2),
        "reward_mean": reward.mean(-1),
        "reward_q05": np.quantile(reward, 0.05, axis=-1),
        "map_below_65": (meanbp < 65).mean((-2, -1)),
        "map_ever_below_65": (meanbp < 65).any(-1).mean(-1),
        "lactate_clearance": cleared.mean(-1),
        "lactate_cleared_20": (cleared >= 0.2).mean(-1),
        "ventilation": want.ventilation.mean((-2, -1)),
        "vasopressor_level": (want.action // 5).mean((-2, -1)),
        "fluid_level": (want.action % 5).mean((-2, -1)),
        "projected_share": want.projected.mean(-1) / (3 * 39),
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert all(value.shape == (2, 2) for value in found.values())
    assert all(value.dtype == np.float64 for value in found.values())


def test_in_reference_mode_a_probable_death_is_death(start, summary, values):
    odds = np.linspace(0.2, 0.9, summary.mortality.size).reshape(summary.mortality.shape)
    found = statistics(summary.replace(mortality=odds), start, values, mode="reference")
    want = np.asarray(summary.shaping) + 15.0 * np.where(odds > 0.5, -1, 1)
    np.testing.assert_allclose(found["reward_mean"], want.mean(-1), rtol=1e-6)


def test_one_member_cannot_disagree():
    assert np.isnan(disagreement(np.ones((2, 3, 4)), 1)).all()
    assert disagreement(np.ones((2, 3, 4)), 2).tolist() == [[0.0] * 3] * 2


def test_the_standard_error_is_that_of_repeated_sampling():
    rng = np.random.default_rng(0)
    # Members differ in mean; that difference is no noise of sampling.
    draws = rng.normal(size=(1, 4000, 30)) + np.tile([0.0, 5.0, 9.0], 10)
    assert draws.mean(-1).std() == pytest.approx(standard_error(draws, 3).mean(), rel=0.05)
    assert np.isnan(standard_error(draws[..., :3], 3)).all()


def test_support_is_that_of_the_first_action(summary):
    probs = np.random.default_rng(0).dirichlet(np.ones(25), size=2)
    np.testing.assert_allclose(support(probs, summary), probs[:, [0, 24]])
    assert np.isnan(support(None, summary)).all()
    assert first_actions(summary).tolist() == [[0, 24], [0, 24]]
    mixed = summary.first_action.copy()
    mixed[0, 1, ::2] = 3
    changed = summary.replace(first_action=mixed)
    assert np.isnan(first_actions(changed)[0, 1])
    assert support(probs, changed)[0, 1] == pytest.approx((probs[0, 3] + probs[0, 24]) / 2)


def test_weighted_quantiles_are_those_of_repeated_samples():
    rng = np.random.default_rng(0)
    values, count = rng.normal(size=(2, 3, 40)), rng.integers(0, 5, (2, 3, 40))
    found = weighted_quantiles(values, count.astype(float))
    for p, k in np.ndindex(2, 3):
        repeated = np.sort(np.repeat(values[p, k], count[p, k]))
        expected = np.quantile(repeated, (0.05, 0.25, 0.5, 0.75, 0.95), method="inverted_cdf")
        np.testing.assert_array_equal(found[:, p, k], expected)


def test_samples_of_a_recurrent_model_count_as_far_as_the_stay_goes_on():
    """Half of one branch leaves in the first step, so its second row counts half."""
    shape, at = (1, 1, 2), schema.INDEX["meanbp"]
    summary = empty_summary(shape, ("meanbp",))
    for pressure, alive, level in (([50, 80], [0.5, 1.0], 10), ([60, 90], [0.5, 1.0], 0)):
        dynamic = np.zeros((*shape, schema.NUM_FEATURES), np.float32)
        dynamic[..., at] = pressure
        zero = np.zeros(shape, np.float32)
        step = Step(
            obs=dynamic, dynamic=dynamic, action=np.full(shape, level), sofa=dynamic[..., at] / 10,
            ventilation=zero, reward=zero, projected=zero.astype(int),
            alive=np.asarray([[alive]], np.float32), support=np.asarray([[[0.2, level / 100]]]),
        )  # fmt: skip
        summary = fold_step(summary, step, ("meanbp",))
    done = jax.tree.map(np.asarray, finish_summary(summary, np.zeros(shape)))
    np.testing.assert_allclose(done.below_target[0, 0], [1.0, 0.0])
    # Levels 2 and 0: the second treatment of the first branch counts half.
    np.testing.assert_allclose(done.vasopressor[0, 0], [2 / 1.5, 1.0])
    np.testing.assert_allclose(done.support[0, 0], [0.2, 0.0], atol=1e-7)
    found = group_statistics(
        done, np.zeros((1, 1)), np.zeros(1), features=("meanbp",), members=1, horizon=2
    )
    assert found["meanbp_mean"][0, 0] == pytest.approx((0.5 * 60 + 90) / 1.5)
    assert found["sofa_mean"][0, 0] == pytest.approx((0.5 * 6 + 9) / 1.5)
    assert found["meanbp_q50"][0, 0] == 90
