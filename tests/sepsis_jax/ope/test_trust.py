"""What a "yes" rests on: intervals, controls, confounding, the error of a fitted clinician."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sepsis_jax.ope import ClinicianFit, Limits, OPEData, evaluate
from sepsis_jax.ope import intervals as iv
from sepsis_jax.ope.benchmark import sample
from sepsis_jax.ope.data import inspect
from sepsis_jax.ope.estimated_clinician import Scores, correct, from_slopes, log_excess, scores_of
from sepsis_jax.ope.estimation import prepare
from sepsis_jax.ope.estimators import ESTIMATORS, estimate
from sepsis_jax.ope.hidden_causes import (
    BETTER,
    NEITHER,
    WORSE,
    conclusions,
    habit,
    negative_controls,
    strengths,
)
from sepsis_jax.ope.robustness import confounding_table, evaluate_groups, worst_case
from sepsis_jax.report.ope import trust_words
from tests.sepsis_jax.ope.samples import random_case
from worldmodel.envs.tables import best_policy, small_mdp
from worldmodel.errors import InputError

QUICK = {"key": jax.random.key(0), "n_bootstrap": 0, "tail_levels": ()}


def normal_case(stays=400, steps=3, share=0.1, seed=0):
    """Stays of a decision process with a policy close to the clinician, who is known."""
    mdp = small_mdp()
    drawn = sample(mdp, stays, horizon=steps, seed=seed)
    policy = (1 - share) * mdp.clinician + share * best_policy(mdp)
    return drawn, {"near": drawn.probs(policy)}


# --- intervals ------------------------------------------------------------------------------------


def test_degrees_of_freedom_fall_with_the_tail():
    even = np.array([1.0, -1.0] * 50)
    assert iv.degrees_of_freedom(even) == 99  # kurtosis 1: the variance is known
    heavier = np.random.default_rng(0).laplace(size=100_000)  # kurtosis 6
    assert iv.degrees_of_freedom(heavier) == pytest.approx(8e4, rel=0.05)
    one = np.append(np.zeros(99), 1.0)  # kurtosis 100: one stay carries the error
    assert iv.degrees_of_freedom(one) == pytest.approx(400 / 99)
    low, high = iv.adaptive_t(np.array(0.0), one, 0.05)
    half = stats.t.isf(0.025, 400 / 99) * iv.standard_error(one)
    assert (low, high) == pytest.approx((-half, half))


def test_constant_returns_have_an_interval_without_width():
    data, probs = normal_case(stays=50)
    data = replace(data.data, reward=jnp.zeros_like(data.data.reward).at[:, 0].set(3.0))
    for method in ("adaptive_t", "t", "delta"):
        table = evaluate(data, probs, interval=method, estimators=["wis"], **QUICK)
        assert table[["low", "high"]].to_numpy() == pytest.approx(3.0, abs=1e-5)


# --- verdicts -------------------------------------------------------------------------------------


def test_values_alone_are_never_trusted_and_the_mean_return_is_only_the_clinicians():
    drawn, probs = normal_case()
    probs["clinician"] = np.asarray(drawn.data.behavior_probs)
    table = evaluate(drawn.data, probs, estimators=["on_policy", "wis"], **QUICK)
    rows = table.set_index(["policy", "estimator"])
    assert "not the value of this policy" in rows.loc[("near", "on_policy"), "reason"]
    assert rows.loc[("clinician", "on_policy"), "trust"]
    assert ESTIMATORS["dm"].caveat and not ESTIMATORS["wis"].caveat
    two = drawn.data.select(np.arange(2))
    few = evaluate(two, {"clinician": probs["clinician"][:2]}, estimators=["on_policy"], **QUICK)
    assert not few["trust"].any() and "2 stays" in few["reason"][0]


def test_the_expected_sample_size_counts_what_was_not_seen():
    """Every recorded action is the clinician's favourite, so all recorded weights are alike."""
    stays, steps = 300, 10
    behavior = np.full((stays, steps, 25), 0.001, np.float32)
    behavior[..., 0] = 1 - 0.024
    probs = 0.7 * behavior
    probs[..., 1] += 0.3
    data = OPEData(
        reward=jnp.asarray(np.random.default_rng(0).normal(size=(stays, steps)), jnp.float32),
        alive=jnp.ones((stays, steps), bool),
        action=jnp.zeros((stays, steps), jnp.int32),
        behavior_prob=jnp.asarray(behavior[..., 0]),
        behavior_probs=jnp.asarray(behavior),
    )
    table = evaluate(data, {"rare": probs}, estimators=["wis"], **QUICK)
    square = (probs[0, 0] ** 2 / behavior[0, 0]).sum()
    assert table["ess"][0] == pytest.approx(stays, rel=1e-3)
    assert table["expected_ess"][0] == pytest.approx(stays * square**-steps, rel=0.01)
    assert "expected effective sample size" in table["reason"][0]


def test_a_yes_names_the_confounding_it_withstands():
    drawn, probs = normal_case(stays=1500)
    options = {"estimators": ["wis"], **QUICK}
    row = evaluate(drawn.data, probs, **options).iloc[0]
    assert row["trust"] and row["confounding"] > 1.0
    assert trust_words(row.to_dict()) == f"yes, to Gamma {row['confounding']:.2f}"
    limits = Limits(confounding=row["confounding"] + 0.01)
    strict = evaluate(drawn.data, probs, limits=limits, **options).iloc[0]
    assert not strict["trust"] and "confounding" in strict["reason"]
    assert trust_words(strict.to_dict()) == "no"


def test_the_strength_is_where_the_bounds_reach_the_conclusion():
    rng = np.random.default_rng(0)
    returns, log_weight = np.sort(rng.normal(size=300)), rng.normal(size=(1, 300))
    weight = np.exp(log_weight[0])
    value = (weight * returns).sum() / weight.sum()
    ends = pd.DataFrame(
        {
            "policy": "p", "estimator": "wis", "estimate": value, "low": value - 0.3,
            "high": value + 0.4, "difference_low": [0.25, -0.5, -0.1],
            "difference_high": [0.9, -0.2, 0.2],
        }
    )  # fmt: skip
    assert conclusions(ends) == [BETTER, WORSE, NEITHER]
    found = strengths(ends, returns, log_weight)
    for gamma, margin, side in zip(found, (0.25, 0.2, 0.3), (0, 1, 0), strict=True):
        bound = float(worst_case(jnp.asarray(returns), jnp.asarray(log_weight), gamma)[side][0])
        assert abs(bound - value) == pytest.approx(margin, rel=0.02)


def test_tables_say_nothing_decisive_of_what_is_not_trusted():
    rng = np.random.default_rng(0)
    returns, weights = jnp.asarray(rng.normal(size=50)), jnp.asarray(rng.normal(size=(2, 50)) * 9)
    table = confounding_table(["a", "b"], returns, weights, trusted=[False, True])
    said = table.groupby("policy")["differs_from_clinician"].apply(lambda s: s.notna().all())
    assert not said["a"] and said["b"]
    data, probs, _ = random_case(stays=80, policies=1, distance=0.99)
    groups = evaluate_groups(
        data, probs, {"all": np.ones(80, bool)}, key=jax.random.key(0), estimators=["wis"],
        n_bootstrap=0, interval="delta",
    )  # fmt: skip
    assert not groups["trust"].any()
    assert groups[["differs", "differs_adjusted"]].isna().all(axis=None)


# --- hidden state ---------------------------------------------------------------------------------


def hidden_case(depends, stays=300, steps=8, seed=0):
    """Two actions; the clinician follows a lasting trait that is not in the state, or does not."""
    rng = np.random.default_rng(seed)
    trait = rng.choice([-1, 1], stays)
    chance = 0.5 + 0.15 * depends * trait
    action = (rng.random((stays, steps)) < chance[:, None]).astype(np.int32)
    behavior = np.full((stays, steps, 2), 0.5, np.float32)
    return OPEData(
        reward=jnp.asarray(trait[:, None] * np.ones((1, steps)), jnp.float32),
        alive=jnp.ones((stays, steps), bool),
        action=jnp.asarray(action),
        behavior_prob=jnp.full((stays, steps), 0.5, jnp.float32),
        behavior_probs=jnp.asarray(behavior),
    )


def test_a_lasting_hidden_cause_shows_in_the_clinicians_habits():
    found = []
    for seed in range(20):
        data = hidden_case(False, seed=seed)
        checked = inspect(data, {"same": np.asarray(data.behavior_probs)})
        found.append(habit(checked, np.arange(300)))
    assert abs(np.mean(found)) < 0.8 and 0.6 < np.std(found) < 1.5
    for seed in range(5):
        data = hidden_case(True, seed=seed)
        clone = {"clone": np.asarray(data.behavior_probs)}
        table = evaluate(data, clone, estimators=["wis"], **QUICK)
        assert not table["trust"].any() and "is hidden" in table["reason"][0]


def test_weights_that_move_the_first_row_are_refused():
    rng = np.random.default_rng(0)
    data, probs, _ = random_case(stays=400, policies=1, distance=0.1)
    checked, order = inspect(data, probs), np.arange(400)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    weights = 0.1 * rng.normal(size=(1, 400))
    plain = negative_controls(checked, order, weights, x)
    moved = negative_controls(checked, order, weights + 0.3 * x[:, 0], x)
    assert plain.baseline[0] < 3.5 < 4.0 < moved.baseline[0] and plain.features == 5


# --- a fitted clinician ---------------------------------------------------------------------------


def test_the_correction_is_the_slope_along_the_clinician():
    """Moving log b along one direction moves each estimate by the slope that is used."""
    drawn, probs = normal_case(stays=150)
    data = drawn.data
    features = np.ones((*data.reward.shape, 1), np.float32)
    found, order = inspect(data, probs), np.arange(150)
    batch, _ = prepare(found, order)
    features = features[:, : found.steps]
    fit = ClinicianFit(200)
    scores = scores_of(found, order, features)
    extra = correct(scores, batch, fit, ("is", "wis")).variance[0]
    levels = np.stack(np.divmod(np.arange(25), 5), 1)
    basis = (levels[:, :, None] == np.arange(1, 5)).reshape(25, 8).astype(np.float64)
    b = np.asarray(data.behavior_probs, np.float64)[:, : found.steps]
    alive = np.asarray(data.alive)[:, : found.steps]
    mean = b @ basis
    cov = np.einsum("nta,ai,aj->ntij", b, basis, basis) - mean[..., None] * mean[..., None, :]
    info = (cov * alive[..., None, None]).sum((0, 1)) / 150
    info += 1e-3 * np.trace(info) / len(info) * np.eye(len(info))
    step, slopes = 1e-3, []
    for j in range(basis.shape[1]):
        ends = []
        for sign in (-1, 1):
            tilted = b * np.exp(sign * step * basis[:, j])
            tilted /= tilted.sum(-1, keepdims=True)
            ratio = np.asarray(data.action)[:, : found.steps, None]
            log_b = np.take_along_axis(np.log(tilted / b), ratio, -1)[..., 0] * alive
            moved = batch.replace(log_weight=batch.log_weight - jnp.asarray(log_b.cumsum(1)))
            ends.append([float(v[0]) for v in estimate(moved, ("is", "wis")).values()])
        slopes.append((np.array(ends[1]) - ends[0]) / (2 * step))
    slope = np.array(slopes)  # [J, E]
    expected = (slope * np.linalg.solve(info, slope)).sum(0) / 200
    assert extra == pytest.approx(expected, rel=0.05)


def test_an_estimated_clinician_widens_or_narrows_the_interval():
    drawn, probs = normal_case(stays=300)
    data = replace(drawn.data, features=jnp.ones((*drawn.data.reward.shape, 1)))
    options = {"estimators": ["wis"], **QUICK}
    known = evaluate(data, probs, **options).iloc[0]
    few = evaluate(data, probs, clinician=ClinicianFit(50), **options).iloc[0]
    many = evaluate(data, probs, clinician=ClinicianFit(10**9), **options).iloc[0]
    same = evaluate(data, probs, clinician=ClinicianFit(300, shared=True), **options).iloc[0]
    assert many["se"] == pytest.approx(known["se"], rel=1e-4)
    assert few["se"] > known["se"] and few["clinician_share"] > 0
    assert same["se"] < known["se"]  # an estimated propensity helps where the model is right
    with pytest.raises(InputError, match="needs `features`"):
        evaluate(drawn.data, probs, clinician=ClinicianFit(50), **options)


def test_influences_after_a_fit_are_as_large_as_those_of_new_stays():
    """What is left of noise after P directions were fitted to it has the noise's variance."""
    rng = np.random.default_rng(0)
    stays, size = 120, 30
    steps = rng.normal(size=(stays, 1, size)).astype(np.float32)
    scores = Scores(steps, np.eye(size), np.zeros((stays, 1)))
    noise = rng.normal(size=stays)
    slope = (noise / stays)[None, None, :, None]  # of a weighted mean of the noise
    found = from_slopes(scores, slope, ClinicianFit(stays, shared=True))
    with_error = found.of(noise[:, None, None])[:, 0, 0]
    plain = noise + found.added[:, 0, 0]
    np.testing.assert_allclose(with_error, plain / np.sqrt(1 - size / stays))
    left = plain - plain.mean()
    assert left.var() < 0.85 and abs(with_error.var() - 1) < 0.25
    none = from_slopes(scores, 0 * slope, ClinicianFit(stays, shared=True))
    np.testing.assert_array_equal(none.of(noise[:, None, None])[:, 0, 0], noise)


def test_weights_are_freed_of_the_mean_error_of_the_clinician():
    drawn, probs = normal_case(stays=150)
    data = replace(drawn.data, features=jnp.ones((*drawn.data.reward.shape, 1)))
    found = inspect(data, probs)
    features = np.asarray(data.features)[:, : found.steps]
    scores, fit = scores_of(found, np.arange(150), features), ClinicianFit(80)
    excess = log_excess(scores, fit)
    # Clinicians that err so much, by simulation: logits moved along the levels of both drugs.
    rng = np.random.default_rng(0)
    errors = rng.multivariate_normal(np.zeros(8), np.linalg.inv(scores.information) / 80, 2000)
    levels = np.stack(np.divmod(np.arange(25), 5), 1)
    basis = (levels[:, :, None] == np.arange(1, 5)).reshape(25, 8)
    true = np.asarray(data.behavior_probs, np.float64)[:, : found.steps]
    action = np.asarray(data.action)[:, : found.steps, None]
    alive = np.asarray(data.alive)[:, : found.steps]
    sums = 0.0
    for tilt in np.exp(errors @ basis.T):
        wrong = true * tilt / (true * tilt).sum(-1, keepdims=True)
        ratio = np.take_along_axis(true / wrong, action, -1)[..., 0]
        sums = sums + np.where(alive, ratio, 1.0).prod(1)
    np.testing.assert_allclose(excess[:, -1], np.log(sums / 2000), rtol=0.15, atol=0.03)
    assert (excess >= 0).all()
    options = {"estimators": ["is"], **QUICK}
    known = evaluate(data, probs, **options).iloc[0]
    few = evaluate(data, probs, clinician=fit, **options).iloc[0]
    many = evaluate(data, probs, clinician=ClinicianFit(10**9), **options).iloc[0]
    assert few["mean_ratio"] < known["mean_ratio"] == pytest.approx(many["mean_ratio"], rel=1e-5)


def test_the_estimated_clinician_itself_is_worth_the_mean_return():
    drawn, probs = normal_case(stays=300)
    data = replace(drawn.data, features=jnp.ones((*drawn.data.reward.shape, 1)))
    both = probs | {"same": np.asarray(data.behavior_probs)}
    options = {"estimators": ["on_policy", "is", "wis"], **QUICK}
    for fit in (ClinicianFit(50), ClinicianFit(300, shared=True)):
        table = evaluate(data, both, clinician=fit, **options)
        own = table[table["policy"] == "same"].set_index("estimator")
        for column in ("estimate", "se", "low", "high"):
            wanted = own.loc["on_policy", column]
            assert own.loc[["is", "wis"], column].to_numpy() == pytest.approx(wanted, rel=1e-5)
        assert own.loc["wis", "ess"] == pytest.approx(300)
        assert (table.loc[table["policy"] != "same", "ess"] < 299).all()


# --- coverage -------------------------------------------------------------------------------------

needs_icu = pytest.mark.skipif(
    find_spec("icu_sepsis") is None, reason="the package icu-sepsis is not installed"
)


@pytest.mark.parametrize(
    ("world", "dial"),
    [pytest.param("icu_sepsis", 0.0, marks=needs_icu), ("gumbel_max", 0.0), ("gumbel_max", 1.0)],
)
def test_counts_of_coverage_ask_the_verdict_of_evaluate(world, dial):
    from sepsis_jax.ope.coverage import judged
    from sepsis_jax.ope.coverage_worlds import Cell, draw

    cell = Cell(world, "true", 300, dial)
    drawn = draw(cell, 0, 1, (0.05,), seed=0)
    rows = judged(cell, drawn, seed=0).query("estimator == 'wis'")
    table = evaluate(drawn.data, drawn.probs, estimators=["wis"], **QUICK)
    for column in ("estimate", "se", "low", "high", "difference_low", "difference_high", "ess",
                   "expected_ess", "confounding", "habit", "mean_ratio_z"):  # fmt: skip
        assert rows[column].to_numpy() == pytest.approx(table[column].to_numpy(), rel=2e-3), column
    assert rows["reason"].tolist() == table["reason"].tolist()


def test_counts_of_coverage_of_a_fitted_clinician_ask_evaluate_too():
    from sepsis_jax.ope.coverage import judged
    from sepsis_jax.ope.coverage_worlds import Cell, cross_fit, draw, fitted_stays

    cell = Cell("synthetic", "fitted", 400)
    drawn = draw(cell, 0, 1, (0.1,), seed=0)
    rows = judged(cell, drawn, seed=0).query("estimator == 'wis'")
    given = cross_fit(cell, drawn, np.random.default_rng(0))
    taken = np.take_along_axis(given, np.asarray(drawn.data.action)[..., None], -1)[..., 0]
    taken = np.where(np.asarray(drawn.data.alive), taken, 1.0)
    data = replace(drawn.data, behavior_probs=given, behavior_prob=taken, features=drawn.inputs)
    fit = ClinicianFit(fitted_stays(400), shared=True)
    assert fit.stays == 320
    table = evaluate(data, drawn.probs, estimators=["wis"], clinician=fit, **QUICK)
    for column in ("estimate", "se", "low", "high", "difference_low", "difference_high", "ess",
                   "mean_ratio", "clinician_share"):  # fmt: skip
        wanted = pytest.approx(table[column].to_numpy(), rel=5e-3, abs=5e-3)
        assert rows[column].to_numpy() == wanted, column


def test_what_is_hidden_in_the_simulator_is_not_fitted_either():
    from sepsis_jax.ope.coverage import judged
    from sepsis_jax.ope.coverage_worlds import Cell, cross_fit, draw, truth

    cell = Cell("gumbel_max", "fitted", 1000, 1.0)
    drawn = draw(cell, 0, 1, (0.05,), seed=0)
    assert drawn.inputs.shape[-1] == 1 + 2 + 2 + 1 + 3  # neither diabetes nor glucose
    found = cross_fit(cell, drawn, np.random.default_rng(0))
    alive = np.asarray(drawn.data.alive)
    near = np.abs(found - np.asarray(drawn.data.behavior_probs))[alive]
    assert found.shape[-1] == 8 and near.mean() < 0.02
    rows = judged(cell, drawn, seed=0)
    known = truth(cell, (0.05,), patients=0, seed=0)
    assert known.clinician == pytest.approx(0.3118, abs=1e-4)
    assert (rows["reason"] != "").all()


def test_the_fitted_clinician_comes_as_near_to_the_truth_as_its_size_allows():
    from sepsis_jax.ope.coverage_worlds import Cell, draw, fit_levels, joint_probabilities

    drawn = draw(Cell("synthetic", "fitted", 3000), 0, 1, (0.1,), seed=0)
    alive, action = np.asarray(drawn.data.alive), np.asarray(drawn.data.action)
    true = np.asarray(drawn.data.behavior_probs, np.float64)
    kept, other = slice(0, 1500), slice(1500, None)
    fitted = fit_levels(drawn.inputs[kept][alive[kept]], action[kept][alive[kept]])
    found = joint_probabilities(drawn.inputs[other], *fitted)[alive[other]]
    assert found.sum(-1) == pytest.approx(1, abs=1e-6)
    divergence = (true[other][alive[other]] * np.log(true[other][alive[other]] / found)).sum(-1)
    coefficients = 2 * 4 * drawn.inputs.shape[-1]
    assert divergence.mean() < 1.3 * coefficients / (2 * alive[kept].sum())


@pytest.mark.slow
@needs_icu
def test_trusted_intervals_cover_in_a_cell(tmp_path):
    out = tmp_path / "coverage.json"
    command = [
        sys.executable, "scripts/bench_coverage.py", "--out", str(tmp_path / "parts"), "--json",
        str(out), "--world", "icu_sepsis", "--clinician", "true", "--stays", "300",
        "--distances", "0.05", "0.3", "--data-sets", "60",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    cells = pd.DataFrame(json.loads(out.read_text())["cells"])
    near = cells[(cells["policy"] == "uniform 0.05") & (cells["estimator"] == "wis")].iloc[0]
    assert near["trusted"] > 0.9
    assert 0.88 <= near["value"] <= 1 and 0.88 <= near["difference"] <= 1
    far = cells[cells["policy"] == "better 0.3"]
    assert (far["trusted"] == 0).all() and far["against"].str.contains("sample size").all()
    assert "3/3" in again.stdout and len(list((tmp_path / "parts").glob("*.parquet"))) == 3
