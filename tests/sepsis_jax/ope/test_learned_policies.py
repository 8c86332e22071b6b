"""Policies learned where part of the state is hidden: the published failure, and the verdict."""

import numpy as np
import pandas as pd
import pytest

from sepsis_jax.ope.benchmark import BenchmarkOptions, sample
from sepsis_jax.ope.hidden_state import (
    DIED,
    DISCHARGED,
    counts,
    expected_counts,
    learned,
    recorded,
    suggested,
)
from sepsis_jax.ope.learned_policies import MODEL, SETTINGS, Setting, judge
from sepsis_jax.pipelines.ope_benchmark import run_benchmark
from worldmodel.envs.tables import MDP, policy_iteration, true_value
from worldmodel.errors import InputError

WEIGHTED = ["wis", "dr", "wdr"]


def small_process():
    """Two causes that nobody records, two recorded states, death and discharge; two actions."""
    moves = np.random.default_rng(0).dirichlet(np.ones(6), (6, 2))
    terminal = np.arange(6) >= 4
    reward = np.broadcast_to(np.array([0, 0, 0, 0, -1.0, 1.0]), moves.shape)
    start = np.array([0.4, 0.3, 0.2, 0.1, 0, 0])
    clinician = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.4, 0.6], [1, 0], [1, 0]])
    return MDP(moves, reward, start, terminal, clinician)


@pytest.mark.parametrize("number", [[0, 1, 2, 3, 0, 0], [0, 1, 0, 1, 0, 0]])
def test_counts_of_stays_are_those_expected(number):
    mdp, horizon, stays = small_process(), 4, 40_000
    seen = recorded(mdp, np.array(number), max(number) + 1)
    want = expected_counts(mdp, seen, horizon=horizon)
    drawn = sample(mdp, stays, horizon=horizon, seed=0)
    found = counts(
        seen.number[drawn.state], np.asarray(drawn.data.action), np.asarray(drawn.data.alive),
        seen.number[drawn.last], (seen.states, 2),
    )  # fmt: skip
    assert found.sum() == drawn.data.alive.sum()
    assert found[:, :, [DIED, DISCHARGED]].sum() > 1000 and found[[DIED, DISCHARGED]].sum() == 0
    np.testing.assert_allclose(found / stays, want, atol=0.012)


def test_the_whole_state_suggests_the_process_itself():
    mdp = small_process()
    seen = recorded(mdp, np.arange(6), 4)
    assert seen.number.tolist() == [0, 1, 2, 3, 4, 5]
    shown = suggested(expected_counts(mdp, seen, horizon=5), mdp.start)
    np.testing.assert_allclose(shown.transition[:4], mdp.transition[:4], atol=1e-12)
    np.testing.assert_allclose(shown.clinician[:4], mdp.clinician[:4], atol=1e-12)
    value = true_value(mdp, mdp.clinician, horizon=7)
    assert true_value(shown, shown.clinician, horizon=7) == pytest.approx(value)
    # The best policy is at least as good as all 16 that take one action per state.
    best = true_value(mdp, learned(shown), horizon=500, gamma=0.99)
    each = [np.eye(2)[[*(n >> i & 1 for i in range(4)), 0, 0]] for n in range(16)]
    assert best >= max(true_value(mdp, p, horizon=500, gamma=0.99) for p in each) - 1e-9


def test_actions_never_seen_lead_to_death():
    count = np.zeros((4, 2, 4))
    count[0, 0, DISCHARGED], count[0, 0, 0] = 3.0, 1.0  # state 1 and action 1 are never seen
    shown = suggested(count, np.array([1.0, 1.0, 0, 0]))
    np.testing.assert_array_equal(shown.transition[0, 0], [0.25, 0, 0, 0.75])
    assert shown.transition[0, 1, DIED] == 1 and (shown.transition[1, :, DIED] == 1).all()
    np.testing.assert_array_equal(shown.clinician[:2], [[1, 0], [0.5, 0.5]])
    assert learned(shown)[0].tolist() == [1, 0]
    assert true_value(shown, learned(shown), horizon=1) == pytest.approx(0.5 * 0.75 - 0.5)


def test_of_equally_good_actions_the_first():
    same = np.full((3, 4, 3), 1 / 3)
    assert policy_iteration(same, np.ones((3, 4)), 0.9).argmax(1).tolist() == [0, 0, 0]


def check_published(table):
    """The truth is far below what weights, doubly robust values and the model promise."""
    rows = table.set_index("estimator")
    assert -0.65 < rows["truth"].iloc[0] < -0.3
    assert rows.loc[MODEL, "estimate"] > 0.75
    assert (rows.loc[[*WEIGHTED, "dm"], "estimate"] - rows["truth"].iloc[0] > 0.8).all()
    assert not rows["trust"].any()
    assert (rows["reason"] != "").all()


def test_the_published_failure_is_not_trusted():
    table = judge(Setting(), 0, n_bootstrap=100)
    check_published(table)
    rows = table.set_index("estimator")
    # The interval of WIS says 0.995 to 1.003; the truth is -0.41.
    assert rows.loc["wis", "low"] > 0.9 and rows.loc["wis", "estimate"] <= 1.0 + 1e-6
    assert rows.loc["wis", "habit"] > 3 and rows.loc["wis", "ess"] < 2
    assert rows["clinician_truth"].iloc[0] == pytest.approx(0.3118, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_the_published_failure_in_more_data_sets(seed):
    check_published(judge(Setting(), seed, n_bootstrap=100))


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_no_setting_is_trusted(setting):
    for seed in range(3):
        table = judge(setting, seed, n_bootstrap=100)
        assert not table["trust"].any(), table.loc[table["trust"], ["estimator", "estimate"]]
        assert table["truth"].iloc[0] < 0.1  # below the physician's 0.31 in all of them


def test_bad_settings():
    with pytest.raises(InputError, match="policy: got 'bold', expected one of greedy, soft, near"):
        Setting(policy="bold")
    with pytest.raises(InputError, match="stays: got 5"):
        Setting(stays=5)
    with pytest.raises(InputError, match="world: got 'both', expected one of synthetic"):
        BenchmarkOptions(world="both")
    with pytest.raises(InputError, match="confounding: got"):
        BenchmarkOptions(confounding=(0.5,))


def test_the_benchmark_trusts_the_simulator_only_with_its_whole_state_recorded(tmp_path):
    options = BenchmarkOptions(
        world="gumbel_max", sizes=(1000,), distances=(0.05,), horizons=(20,), repeats=2,
        n_bootstrap=50,
    )  # fmt: skip
    run_benchmark(tmp_path / "out", options)
    runs = pd.read_csv(tmp_path / "out" / "runs.csv")
    assert set(runs["world"]) == {"gumbel_max"} and set(runs["confounding"]) == {0.0, 1.0}
    weighted = runs[runs["estimator"].isin(WEIGHTED)]
    covered = (weighted["low"] <= weighted["truth"]) & (weighted["truth"] <= weighted["high"])
    open_, hidden = weighted["confounding"] == 0, weighted["confounding"] == 1
    assert weighted.loc[open_, "trust"].mean() > 0.7 and covered[open_].mean() > 0.7
    # Effective sample sizes are large there too; that choices agree beyond the records speaks.
    assert weighted.loc[hidden, "ess"].median() > 250
    assert not runs.loc[runs["confounding"] == 1, "trust"].any()
    assert (weighted["estimate"] - weighted["truth"])[hidden].mean() > 0.2
    assert covered[hidden].mean() < 0.2
