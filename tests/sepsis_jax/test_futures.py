"""The truth benchmark of futures: a model that knows the truth gets full marks."""

import jax
import numpy as np
import pandas as pd
import pytest

from sepsis_jax.pipelines.futures import (
    Futures,
    FuturesConfig,
    agreement,
    choice,
    futures_table,
    linear_futures,
    true_futures,
)
from sepsis_jax.pipelines.policy_values import truth_metrics
from tests.toy import toy_episodes
from worldmodel.synthetic import generate

CONFIG = FuturesConfig(patients=64, step=1, held=3)


@pytest.fixture(scope="module")
def truth():
    episodes, behind = generate(jax.random.key(4), CONFIG.patients, keep_latent=False)
    reached = np.flatnonzero(np.asarray(episodes.length) > CONFIG.step)[:40]
    behind = behind.replace(patient=behind.patient[reached])
    return episodes.select(reached), *true_futures(episodes.select(reached), behind, CONFIG)


def test_a_model_that_knows_the_truth_gets_full_marks(truth):
    episodes, true, died, total = truth
    knowing = true._replace(
        support=np.ones(true.mortality.shape), disagreement=np.zeros(true.mortality.shape)
    )
    shock = np.arange(len(died)) % 2 == 0
    metrics = agreement(true, knowing, shock)
    for name in ("mortality", "mortality_supported", "reward", "lactate", "meanbp", "sofa"):
        assert metrics[name]["spearman"] == pytest.approx(1.0)
        assert metrics[name]["error"] == pytest.approx(0.0)
    assert metrics["supported_plans"] == 25
    found = choice(true, knowing, died, total)
    assert found["chosen_by_model"]["reward"] == pytest.approx(true.reward.max(1).mean())
    assert found["chosen_by_model"]["reward"] >= found["best_constant_plan"]["reward"]
    assert found["clinician"]["mortality"] == pytest.approx(np.asarray(episodes.died_90d).mean())
    table = futures_table(true, knowing)
    np.testing.assert_allclose(table["lactate_true"], table["lactate_learned"])
    assert table["meanbp_true"].iloc[0] == 0


def test_unsupported_plans_are_left_out_of_the_choice(truth):
    _, true, died, total = truth
    support = np.full(true.mortality.shape, 0.5)
    support[:, 12] = 1e-3
    rated = true.reward.copy()
    rated[:, 12] = 100.0
    tempted = Futures(true.mortality, rated, true.alive, true.values, support, 0 * support)
    found = choice(true, tempted, died, total)["chosen_by_model"]["reward"]
    allowed = np.delete(true.reward, 12, axis=1).max(1).mean()
    assert found == pytest.approx(allowed)
    assert agreement(true, tempted, np.ones(len(died), bool))["supported_plans"] == 24


def test_warnings_are_judged_by_the_plans_that_are_wrong(truth):
    _, true, _, _ = truth
    wrong = true.mortality.mean(0) > np.median(true.mortality.mean(0))
    off = true._replace(
        mortality=true.mortality + 0.2 * wrong,
        support=np.where(wrong, 0.01, 0.5) + 0 * true.mortality,
        disagreement=np.where(wrong, 0.0, 0.3) + 0 * true.mortality,
    )
    metrics = agreement(true, off, np.ones(len(true.mortality), bool))
    assert metrics["support_finds_errors"] == 1.0
    assert metrics["disagreement_finds_errors"] == 0.0
    knowing = agreement(
        true, off._replace(mortality=true.mortality), np.ones(len(true.mortality), bool)
    )
    assert knowing["support_finds_errors"] is None


def test_linear_baselines_find_a_linear_effect():
    """Fluid lowers lactate and vasopressors raise MAP in the toy world; both are found by sign."""
    records = toy_episodes(400, 9, seed=1)
    asked = toy_episodes(60, 9, seed=2)
    asked = asked.select(np.asarray(asked.length) > CONFIG.step)
    found = linear_futures(records, asked, CONFIG)
    assert found.mortality.shape == (asked.num_stays, 25)
    pressure = found.values["meanbp"].mean(0).reshape(5, 5)
    assert (np.diff(pressure.mean(1)) > 1.0).all()
    # One level more in each step raises MAP by 3 (1 + 0.9 + 0.81) mmHg at the end of three.
    assert np.polyfit(np.arange(5), pressure.mean(1), 1)[0] == pytest.approx(8.1, abs=1.5)
    assert np.polyfit(np.arange(5), found.values["lactate"].mean(0).reshape(5, 5).mean(0), 1)[0] < 0


def test_values_in_order_and_ties():
    table = pd.DataFrame(
        {"true": [0.0, 0.1, 5.0], "true_low": [-1, -1, 4.0], "true_high": [1, 1.1, 6.0]}
    )
    right = truth_metrics(table.assign(simulated=[0.5, 0.3, 4.0]))
    assert right["right_order"] and right["largest_error"] == pytest.approx(1.0)
    assert not truth_metrics(table.assign(simulated=[6.0, 0.3, 4.0]))["right_order"]


def test_vasopressors_raise_the_pressure_in_truth(truth):
    table = futures_table(truth[1], truth[1])
    by_level = table.groupby("vasopressor")["meanbp_true"].mean()
    assert by_level.is_monotonic_increasing and by_level.iloc[-1] > 10
