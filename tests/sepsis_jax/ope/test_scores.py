"""Scores of the truth benchmark against their definitions."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from sepsis_jax.pipelines.ope_benchmark import accuracy, ranking, summary

TRUTH = {"a": 1.0, "b": 2.0, "c": 4.0}
REPEATS = 40


@pytest.fixture(scope="module")
def runs():
    rng = np.random.default_rng(0)
    rows = []
    for size in (100, 300):
        for repeat in range(REPEATS):
            for policy, truth in TRUTH.items():
                for name, noise in (("noisy", rng.normal(0.5, 2.0)), ("flat", 3.0 - truth)):
                    value = truth + noise
                    rows.append(
                        {"policy": policy, "estimator": name, "estimate": value, "low": value - 2,
                         "high": value + 2, "ess": 50.0, "trust": True, "size": size,
                         "repeat": repeat, "world": "w", "confounding": 0.0, "horizon": 9,
                         "truth": truth, "distance": 0.1}
                    )  # fmt: skip
    return pd.DataFrame(rows)


def test_accuracy_with_its_monte_carlo_error(runs):
    found = accuracy(runs).set_index(["size", "estimator"]).loc[(300, "noisy")]
    part = runs[(runs["size"] == 300) & (runs["estimator"] == "noisy")]
    error = part["estimate"] - part["truth"]
    assert found["bias"] == pytest.approx(error.mean())
    assert found["rmse"] == pytest.approx(np.sqrt((error**2).mean()))
    assert found["coverage"] == pytest.approx((error.abs() <= 2).mean())
    by_data_set = error.groupby(part["repeat"])
    assert found["bias_se"] == pytest.approx(by_data_set.mean().std() / np.sqrt(REPEATS))
    # Leaving out one data set at a time gives the error of a root of a mean.
    squares = (error**2).groupby(part["repeat"]).mean().to_numpy()
    left_out = np.sqrt((squares.sum() - squares) / (REPEATS - 1))
    jackknife = np.sqrt((REPEATS - 1) * left_out.var())
    assert found["rmse_se"] == pytest.approx(jackknife, rel=0.1)


def test_ranking_against_scipy(runs):
    found = ranking(runs).set_index(["size", "estimator"])
    part = runs[(runs["size"] == 100) & (runs["estimator"] == "noisy")]
    rank, regret = [], []
    for _, group in part.groupby("repeat"):
        rank.append(spearmanr(group["estimate"], group["truth"]).statistic)
        best = group.loc[group["estimate"].idxmax(), "truth"]
        regret.append((4.0 - best) / 3.0)
    assert found.loc[(100, "noisy"), "rank"] == pytest.approx(np.mean(rank))
    assert found.loc[(100, "noisy"), "regret"] == pytest.approx(np.mean(regret))
    # One that gives every policy the same value chooses by chance.
    assert found.loc[(100, "flat"), "rank"] == 0
    assert found.loc[(100, "flat"), "regret"] == pytest.approx((4 - np.mean([1, 2, 4])) / 3)


def test_summary_is_the_mean_over_settings(runs):
    found = summary(runs).set_index("estimator").loc["noisy"]
    each = accuracy(runs).set_index("estimator").loc["noisy"]
    for name in ("bias", "rmse", "coverage"):
        assert found[name] == pytest.approx(each[name].mean())
    ranks = ranking(runs).set_index("estimator").loc["noisy"]
    assert found["rank_correlation"] == pytest.approx(ranks["rank"].mean())
