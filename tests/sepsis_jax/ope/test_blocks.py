"""Work in blocks of stays gives what work on all stays at once gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepsis_jax.ope import Clip, InputPolicy, check, diagnose, evaluate, weigh
from sepsis_jax.ope.bootstrap import draw_counts, generator, join, resample, tail_statistics
from sepsis_jax.ope.data import BLOCK, inspect
from sepsis_jax.ope.estimation import prepare
from sepsis_jax.ope.estimators import estimate
from sepsis_jax.ope.weights import SIZE, drug_weights
from tests.sepsis_jax.ope.samples import random_case
from tests.sepsis_jax.ope.test_estimators import batch_of
from worldmodel.errors import InputError

STAYS = max(BLOCK, SIZE) + 77
NAMES = ("wis", "wpdis", "dr")


@pytest.fixture(scope="module")
def case():
    return random_case(stays=STAYS, steps=5, policies=2, seed=3)


@pytest.mark.parametrize("known", [True, False])
def test_weights_and_diagnostics_equal_those_of_all_stays(case, known):
    data, probs, _ = case
    if not known:
        data = data.replace(behavior_probs=None)
    clip = Clip(cumulative=(0.0, 1.5))
    order = np.random.default_rng(0).permutation(STAYS)
    batch, found = prepare(inspect(data, probs), order, clip=clip)
    whole, tables, _ = check(data, probs)
    whole = whole.select(order)
    target = jnp.stack([p[order] for p in tables.values()])
    weights = weigh(whole, target, clip)
    assert np.allclose(batch.log_weight, weights.log_weight, atol=1e-6)
    assert np.array_equal(batch.reward, whole.reward)
    if known:
        assert np.allclose(batch.drug_log_weight, drug_weights(whole, target, clip), atol=1e-5)
    for name, value in diagnose(whole, target, weights)._asdict().items():
        assert np.allclose(getattr(found, name), value, rtol=1e-4, atol=1e-6), name
    assert found.clipped[1] > 0


def test_resamples_and_tails_equal_those_of_all_stays(case):
    data, probs, fitted = case
    batch, _ = batch_of(data, probs, fitted)
    order = np.argsort(np.asarray(batch.returns), kind="stable")
    batch, _ = batch_of(data.select(order), probs_of(probs, order), fitted.select(order, 5))
    table, widths = join(batch, NAMES)
    key = jax.random.key(0)
    values, _ = resample(key, batch, table, widths, NAMES, resamples=3)
    counts = draw_counts(generator(key), 3, STAYS)
    weight = np.exp(np.asarray(batch.log_weight[..., -1], np.float64))
    quantile, cvar = tail_statistics(
        batch.returns, jnp.asarray(weight), jnp.asarray(counts), (0.1, 0.999)
    )
    returns = np.asarray(batch.returns, np.float64)
    for b in range(3):
        drawn = np.repeat(np.arange(STAYS), counts[b])
        other, _ = batch_of(
            data.select(order[drawn]), probs_of(probs, order[drawn]),
            fitted.select(order[drawn], 5),
        )  # fmt: skip
        for e, expected in enumerate(estimate(other, NAMES).values()):
            assert np.allclose(values[b, :, e], expected, atol=2e-5)
        for k in range(2):
            mass = (counts[b] * weight[k]).cumsum()
            for place, level in enumerate((0.1, 0.999)):
                goal = level * mass[-1]
                at = np.searchsorted(mass, goal)
                assert np.isclose(quantile[b, k, place], returns[at])
                held = np.diff(np.minimum(mass, goal), prepend=0.0)
                assert np.isclose(cvar[b, k, place], held @ returns / goal, atol=1e-4)


def probs_of(probs, index):
    return {name: p[index] for name, p in probs.items()}


def test_a_flaw_in_the_last_block_is_found(case):
    data, probs, _ = case
    flawed = {name: np.array(p) for name, p in probs.items()}
    flawed["policy 1"][STAYS - 1, 0, 3] = 2.0
    with pytest.raises(InputError, match=f"policy 1.*in 1 places.*stay number {STAYS - 1};"):
        evaluate(data, flawed, key=jax.random.key(0), n_bootstrap=0, interval="delta")


def test_dropped_stays_leave_no_trace(case):
    data, probs, _ = case
    reward = np.array(data.reward)
    reward[5, 0] = np.nan
    flawed = data.replace(reward=jnp.asarray(reward))

    options = {"key": jax.random.key(0), "n_bootstrap": 0, "interval": "delta"}
    table = evaluate(flawed, probs, input_policy=InputPolicy(missing_reward="drop"), **options)
    keep = np.arange(STAYS) != 5
    expected = evaluate(data.select(keep), probs_of(probs, keep), **options)
    assert np.allclose(table["estimate"], expected["estimate"], atol=1e-6)
    assert table.attrs["stays"] == STAYS - 1 and table.attrs["stays_given"] == STAYS
