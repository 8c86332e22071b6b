"""Estimators where the truth is known exactly."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepsis_jax.ope import Fitted, estimate, evaluate, fit, make_batch, weigh
from sepsis_jax.ope.benchmark import exact_values, sample
from sepsis_jax.ope.estimators import columns
from worldmodel.envs.icu_sepsis import icu_sepsis
from worldmodel.envs.tables import best_policy, small_mdp, true_value

HORIZON = 8


def mixtures(mdp, shares):
    best = best_policy(mdp)
    return [(1 - share) * mdp.clinician + share * best for share in shares]


def batch_of(drawn, policies, values):
    probs = jnp.asarray(np.stack([drawn.probs(p) for p in policies]))
    return make_batch(drawn.data, weigh(drawn.data, probs).log_weight, values=values)


def check_unbiased(mdp, *, shares, stays, horizon, repeats=1):
    policies = mixtures(mdp, shares)
    truth = np.array([true_value(mdp, p, horizon=horizon) for p in policies])
    for seed in range(repeats):
        drawn = sample(mdp, stays, horizon=horizon, seed=seed)
        batch = batch_of(drawn, policies, exact_values(mdp, drawn, policies))
        terms = Fitted(values=batch.values)
        assert terms.values is not None
        found = estimate(batch, ["dr", "pdis", "is"])
        for name, value in found.items():
            spread = np.asarray(columns(batch, [name])[name][..., 0]).std(1, ddof=1)
            z = (np.asarray(value) - truth) / (spread / np.sqrt(stays))
            assert (np.abs(z) < 4).all(), (name, z)


def test_doubly_robust_with_exact_values_is_unbiased():
    check_unbiased(small_mdp(), shares=(0.0, 0.2, 0.5), stays=20_000, horizon=HORIZON)


def test_doubly_robust_with_exact_values_is_unbiased_on_icu_sepsis():
    if find_spec("icu_sepsis") is None:  # its tables are enough: importing it asks for gym
        pytest.skip("the package icu-sepsis is not installed")
    check_unbiased(icu_sepsis(), shares=(0.0, 0.2, 0.5), stays=5_000, horizon=20)


def test_exact_values_lower_the_spread():
    mdp = small_mdp()
    policies = mixtures(mdp, (0.3,))
    drawn = sample(mdp, 4_000, horizon=HORIZON, seed=1)
    batch = batch_of(drawn, policies, exact_values(mdp, drawn, policies))
    parts = columns(batch, ["dr", "pdis"])
    assert parts["dr"].std() < 0.8 * parts["pdis"].std()


@pytest.mark.parametrize("method", ["tabular", "linear", "neural"])
def test_fitted_values_find_the_truth(method):
    mdp = small_mdp()
    policies = mixtures(mdp, (0.0, 0.2))
    drawn = sample(mdp, 4_000, horizon=HORIZON, seed=2)
    data = drawn.data.replace(
        features=jnp.concatenate([jnp.ones((*drawn.state.shape, 1)), jnp.eye(6)[drawn.state]], -1)
        * drawn.data.alive[..., None]
    )
    probs = {str(k): drawn.probs(p) for k, p in enumerate(policies)}
    fitted = fit(
        jax.random.key(0), data, probs, method=method, state=jnp.asarray(drawn.state), num_states=6
    )
    table = evaluate(data, probs, key=jax.random.key(1), fitted=fitted, n_bootstrap=0,
                     interval="delta", tail_levels=())  # fmt: skip
    for k, policy in enumerate(policies):
        truth = true_value(mdp, policy, horizon=HORIZON)
        rows = table[table["policy"] == str(k)].set_index("estimator")
        for name in ("dr", "wdr", "drl", "mis", "wpdis"):
            assert abs(rows.loc[name, "estimate"] - truth) < 4 * rows.loc[name, "se"] + 0.02, name
        # Few features of the dose cannot tell 25 arbitrary actions apart.
        bound = {"tabular": 0.2, "linear": 1.0, "neural": 0.5}[method]
        assert abs(rows.loc["dm", "estimate"] - truth) < bound


def test_least_variance_values_lower_the_variance_they_are_made_for():
    mdp = small_mdp()
    policies = mixtures(mdp, (0.4,))
    drawn = sample(mdp, 6_000, horizon=5, seed=3)
    data = drawn.data.replace(features=jnp.eye(6)[drawn.state] * drawn.data.alive[..., None])
    probs = {"p": drawn.probs(policies[0])}
    fitted = fit(jax.random.key(0), data, probs)
    table = evaluate(data, probs, key=jax.random.key(1), fitted=fitted, n_bootstrap=0,
                     interval="delta", tail_levels=())  # fmt: skip
    se = table.set_index("estimator")["se"]
    assert se["mrdr"] < se["pdis"]


@pytest.mark.parametrize(
    "name",
    ["bca", *(pytest.param(n, marks=pytest.mark.slow) for n in ("percentile", "delta", "t"))],
)
def test_intervals_cover_in_a_small_world(name):
    """A quick version of the slow coverage test: 200 data sets of 300 stays."""
    mdp = small_mdp()
    policy = mixtures(mdp, (0.05,))[0]
    truth = true_value(mdp, policy, horizon=5)
    drawn = sample(mdp, 200 * 300, horizon=5, seed=4)
    values = exact_values(mdp, drawn, [policy])
    probs, covered = drawn.probs(policy), {name: 0 for name in ("wis", "wpdis", "dr", "wdr")}
    for d in range(200):
        rows = slice(300 * d, 300 * (d + 1))
        own = Fitted(values=jax.tree.map(lambda x, rows=rows: 0.7 * x[:, rows], values))
        table = evaluate(
            drawn.data.select(rows), {"p": probs[rows]}, key=jax.random.key(d), fitted=own,
            estimators=tuple(covered), n_bootstrap=400, interval=name, tail_levels=(),
        )  # fmt: skip
        for row in table.itertuples():
            covered[row.estimator] += row.low <= truth <= row.high
    for estimator, count in covered.items():
        assert 0.90 <= count / 200 <= 0.985, (estimator, count / 200)
