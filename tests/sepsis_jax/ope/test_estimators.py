"""Estimators against slow references, identities, invariances, and long horizons."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepsis_jax.ope import ESTIMATORS, Clip, OPEData, check, estimate, make_batch, weigh
from sepsis_jax.ope.bootstrap import tail_statistics
from sepsis_jax.ope.data import pad
from sepsis_jax.ope.estimators import recursive_dr
from sepsis_jax.ope.fitted import blend, partial_returns, with_magic
from sepsis_jax.ope.weights import cumulate, drug_weights, log_ratio, scaled
from tests.sepsis_jax.ope.reference import Reference
from tests.sepsis_jax.ope.samples import random_case

FROZEN = ("is", "wis", "pdis", "wpdis", "dr", "wdr", "factored_is", "decomposed_is", "mrdr")
PLAIN = tuple(name for name in ESTIMATORS if name != "magic")


def batch_of(data, probs, fitted, *, gamma=0.97, clip=None):
    stacked = jnp.stack([jnp.asarray(p) for p in probs.values()])
    weights = weigh(data, stacked, clip)
    drugs = drug_weights(data, stacked, clip)
    batch = make_batch(data, weights.log_weight, gamma=gamma, drug_log_weight=drugs)
    return fitted.into(batch), weights


@pytest.fixture(scope="module")
def case():
    data, probs, fitted = random_case()
    batch, weights = batch_of(data, probs, fitted)
    references = [
        Reference(
            data, p, [x[k] for x in fitted.values], [x[k] for x in fitted.mrdr_values],
            fitted.marginal[k], gamma=0.97,
        )
        for k, p in enumerate(probs.values())
    ]  # fmt: skip
    return data, probs, fitted, batch, weights, references


@pytest.mark.parametrize("name", PLAIN)
def test_equals_slow_reference(case, name):
    *_, batch, _, references = case
    found = np.asarray(jax.jit(lambda b: estimate(b, [name]))(batch)[name])
    for value, reference in zip(found, references, strict=True):
        expected = getattr(reference, "is_" if name == "is" else name)()
        scale = max(abs(expected), np.abs(reference.returns).mean())
        assert abs(value - expected) < 2e-6 * scale


@pytest.mark.parametrize("name", PLAIN)
def test_equals_slow_reference_to_1e6_in_double(name):
    with jax.enable_x64(True):
        data, probs, fitted = random_case(seed=3)
        double = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, (data, probs, fitted)
        )
        batch, _ = batch_of(*double)
        for k, p in enumerate(probs.values()):
            reference = Reference(
                data, p, [x[k] for x in fitted.values], [x[k] for x in fitted.mrdr_values],
                fitted.marginal[k], gamma=0.97,
            )  # fmt: skip
            expected = getattr(reference, "is_" if name == "is" else name)()
            assert float(estimate(batch, [name])[name][k]) == pytest.approx(expected, abs=1e-6)


def test_magic_blends_j_step_returns(case):
    *_, batch, _, references = case
    values, covariance = partial_returns(batch)
    weights = blend(values, covariance)
    assert np.allclose(weights.sum(1), 1) and (weights >= 0).all()
    found = estimate(with_magic(batch), ["magic"])["magic"]
    for k, reference in enumerate(references):
        steps = [reference.j_step(j) for j in range(-1, reference.steps)]
        assert np.allclose(values[k], steps, atol=1e-5)
        assert steps[0] == pytest.approx(reference.dm())
        assert steps[-1] == pytest.approx(reference.wdr())
        assert float(found[k]) == pytest.approx(weights[k] @ steps, abs=1e-5)


def test_blend_is_the_minimum():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 4))
    omega, g = root.T @ root, rng.normal(size=4)
    x = blend(g[None], omega[None])[0]
    half = 0.6744897501960817 * np.sqrt(omega[-1, -1])
    bias = np.maximum(np.abs(g - g[-1]) - half, 0)
    objective = omega + np.outer(bias, bias)
    others = rng.dirichlet(np.ones(4), 20_000)
    assert x @ objective @ x <= np.einsum("ni,ij,nj->n", others, objective, others).min() + 1e-9


def test_sum_and_recursive_dr_agree(case):
    *_, batch, weights, _ = case
    recursive = recursive_dr(batch, weights.log_ratio)
    assert np.allclose(recursive, estimate(batch, ["dr"])["dr"], atol=2e-5)


def test_behavior_policy_gets_the_mean_return(case):
    data, _, fitted, *_ = case
    probs = {f"b{k}": data.behavior_probs for k in range(3)}
    batch, _ = batch_of(data, probs, fitted, gamma=1.0)
    # With pi = b any Q cancels in DR and WDR once V(s) = Q(s, a).
    same = batch.values._replace(v=batch.values.q)
    batch = replace(batch, values=same, mrdr_values=same)
    mean = float(np.asarray(data.returns()).mean())
    for name, value in estimate(batch, FROZEN).items():
        assert np.allclose(value, mean, atol=2e-6 * max(1, abs(mean))), name


def test_alive_only_convention_by_hand():
    # Two stays, all ratios 1: rewards (1, 1) and (4). Frozen: 1/2 (1 + 4) + 1/2 (1) = 3 = the mean
    # return. Alive-only: (1 + 4) / 2 + 1 / 1 = 3.5.
    data = OPEData(
        reward=jnp.array([[1.0, 1.0], [4.0, 0.0]]),
        alive=jnp.array([[True, True], [True, False]]),
        action=jnp.zeros((2, 2), jnp.int32),
        behavior_prob=jnp.full((2, 2), 0.5),
    )
    probs = jnp.full((1, 2, 2, 2), 0.5)
    batch = make_batch(data, weigh(data, probs).log_weight)
    found = estimate(batch, ["wpdis", "wpdis_alive"])
    assert float(found["wpdis"][0]) == pytest.approx(3.0)
    assert float(found["wpdis_alive"][0]) == pytest.approx(3.5)


def test_padding_and_order_change_nothing(case):
    data, probs, fitted, batch, *_ = case
    plain = estimate(batch, PLAIN)
    order = np.random.default_rng(1).permutation(data.num_stays)
    shuffled, _ = batch_of(
        data.select(order), {k: p[order] for k, p in probs.items()}, fitted.select(order, 9)
    )
    widths = ((0, 0), (0, 4), (0, 0))
    longer = {k: np.pad(p, widths, constant_values=0.04) for k, p in probs.items()}
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 4))), fitted)
    padded, _ = batch_of(pad(data, 4), longer, wide)
    for other in (shuffled, padded):
        for name, value in estimate(other, PLAIN).items():
            assert np.allclose(value, plain[name], rtol=2e-5, atol=2e-6), name


@pytest.mark.parametrize("tiny", [1e-10, 1e-30, 1e-37])
def test_finite_at_500_steps_with_tiny_probabilities(tiny):
    rng = np.random.default_rng(0)
    stays, steps = 6, 500
    behavior = jnp.asarray(np.exp(rng.uniform(np.log(tiny), -1, (stays, steps))), jnp.float32)
    target = jnp.asarray(np.exp(rng.uniform(np.log(tiny), -1, (2, stays, steps, 2))), jnp.float32)
    data = OPEData(
        reward=jnp.asarray(rng.normal(size=(stays, steps)), jnp.float32),
        alive=jnp.ones((stays, steps), bool),
        action=jnp.zeros((stays, steps), jnp.int32),
        behavior_prob=behavior,
    )
    batch = make_batch(data, weigh(data, target).log_weight)
    for name, value in estimate(batch, ("is", "wis", "pdis", "wpdis", "wpdis_alive")).items():
        assert np.isfinite(value).all(), name


def test_clipping_is_counted(case):
    data, probs, fitted, *_ = case
    _, free = batch_of(data, probs, fitted)
    assert np.allclose(free.clipped_share, 0)
    _, held = batch_of(data, probs, fitted, clip=Clip(step=(0.5, 2.0), cumulative=(0.1, 5.0)))
    ratio, weight = np.asarray(free.log_ratio), np.asarray(held.log_weight)
    assert weight.max() <= np.log(5.0) + 1e-6 and weight.min() >= np.log(0.1) - 1e-6
    outside = (np.abs(ratio) > np.log(2.0)) & np.asarray(data.alive)
    clipped = np.asarray(held.clipped_share) * np.asarray(data.alive).sum()
    assert (clipped > outside.sum((1, 2)) - 0.01).all() and clipped[-1] > 0


def test_values_follow_a_change_of_scale(case):
    data, probs, fitted, batch, *_ = case
    tripled, _ = batch_of(replace(data, reward=3 * data.reward), probs, fitted)
    names = ("is", "wis", "pdis", "wpdis", "wpdis_alive")
    for name in names:
        assert np.allclose(estimate(tripled, [name])[name], 3 * estimate(batch, [name])[name],
                           rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("level", [0.05, 0.1, 0.5, 1.0])
def test_tail_equals_slow_reference(case, level):
    *_, batch, _, references = case
    order = np.argsort(np.asarray(batch.returns), kind="stable")
    weights = scaled(batch.log_weight[..., -1], -1)[:, order]
    quantile, cvar = tail_statistics(
        batch.returns[order], weights, jnp.ones((1, len(order))), (level,)
    )
    for k, reference in enumerate(references):
        expected = reference.tail(level)
        assert float(cvar[0, k, 0]) == pytest.approx(expected[1], abs=1e-4)
        if level < 1:
            assert float(quantile[0, k, 0]) == pytest.approx(expected[0], abs=1e-5)


def test_check_then_estimate_trims_padding(case):
    data, probs, *_ = case
    cleaned, kept, counts = check(pad(data, 5), {
        name: np.pad(p, ((0, 0), (0, 5), (0, 0))) for name, p in probs.items()
    })  # fmt: skip
    assert cleaned.num_steps == data.num_steps and set(counts.values()) == {0}
    assert np.array_equal(cleaned.reward, data.reward)
    assert next(iter(kept.values())).shape == next(iter(probs.values())).shape


SEEDS = st.integers(0, 2**32 - 1)


def ragged(seed, stays=5, steps=4):
    """Log ratios [2, N, T] and whether a step was recorded [N, T]."""
    draw = np.random.default_rng(seed)
    alive = np.arange(steps) < draw.integers(1, steps + 1, (stays, 1))
    return np.where(alive, draw.normal(size=(2, stays, steps)), 0).astype(np.float32), alive


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_weights_of_the_clinician_are_one(seed):
    draw = np.random.default_rng(seed)
    alive = ragged(seed)[1]
    behavior = draw.uniform(0.01, 1.0, alive.shape).astype(np.float32)
    weights = cumulate(log_ratio(behavior[None], behavior, alive), alive)
    np.testing.assert_allclose(weights.log_weight, 0.0, atol=1e-5)
    assert float(weights.clipped_share[0]) == 0.0


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_weights_are_products_of_ratios_and_stay_after_the_end(seed):
    ratios, alive = ragged(seed)
    weights = cumulate(ratios, alive)
    np.testing.assert_allclose(
        np.exp(weights.log_weight), np.cumprod(np.exp(ratios), -1), rtol=1e-4
    )
    last = alive.sum(-1) - 1
    ends = np.take_along_axis(np.asarray(weights.log_weight), last[None, :, None], -1)[..., 0]
    np.testing.assert_allclose(weights.log_weight[..., -1], ends, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(0.1, 1.0), st.floats(1.0, 10.0))
def test_clipped_weights_lie_within_the_bounds(seed, low, high):
    ratios, alive = ragged(seed)
    weights = cumulate(ratios, alive, Clip(step=(low, high), cumulative=(low, high)))
    for values in (weights.log_weight, weights.log_ratio):
        assert (np.asarray(values) >= np.log(low) - 1e-5).all()
        assert (np.asarray(values) <= np.log(high) + 1e-5).all()
    share = np.asarray(weights.clipped_share)
    assert ((share >= 0) & (share <= 1)).all()


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(-50, 50))
def test_scaled_weights_are_at_most_one_whatever_all_are_multiplied_by(seed, shift):
    ratios, _ = ragged(seed)
    weights = np.asarray(scaled(jnp.asarray(ratios)))
    np.testing.assert_allclose(weights.max(-2), 1.0, rtol=1e-6)
    np.testing.assert_allclose(scaled(jnp.asarray(ratios + np.float32(shift))), weights, rtol=1e-4)
