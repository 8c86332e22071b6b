"""Calibration: errors, temperatures and lapse rates that are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from policy.clinician_models import fit_calibration, fit_temperature, judge


def test_perfect_calibration_has_no_error():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(5), (300, 40))
    action = (probs.cumsum(-1) > rng.random((300, 40, 1))).argmax(-1)
    report, table = judge(probs, action, np.ones((300, 40), bool))
    assert report["ece"] < 0.01
    assert np.allclose(table["predicted"], table["observed"], atol=0.02)
    wrong, _ = judge(probs[::-1], action, np.ones((300, 40), bool))
    assert wrong["nll"] > report["nll"] and wrong["ece"] > 0.05


def test_a_report_by_hand():
    probs = np.array([[[0.8, 0.2], [0.6, 0.4], [0.5, 0.5]]])
    report, table = judge(probs, np.array([[0, 1, 1]]), np.array([[True, True, False]]))
    assert report["nll"] == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)
    assert report["top1"] == 0.5 and report["steps"] == 2 and report["least_taken"] == 0.4
    # Each probability is a bin of its own: 0.2 and 0.6 came out 0, 0.8 and 0.4 came out 1.
    assert report["ece"] == pytest.approx((0.2 + 0.6 + 0.2 + 0.6) / 4)
    assert table["count"].sum() == 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_the_temperature_by_hand(temperature):
    """Actions 3 : 1 and logits T log 3: dividing by T gives 3/4 and 1/4."""
    logits = jnp.tile(jnp.array([temperature * np.log(3.0), 0.0]), (4, 1))
    found = fit_temperature(logits, jnp.array([0, 0, 0, 1]))
    assert float(found) == pytest.approx(temperature, rel=1e-4)
    shifted = fit_temperature(logits + 100.0, jnp.array([0, 1, 0, 0]))
    assert float(shifted) == pytest.approx(temperature, rel=1e-3)


def test_the_temperature_is_bounded_where_no_finite_one_is_best():
    logits = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    assert float(fit_temperature(logits, jnp.array([0, 1]))) == pytest.approx(np.exp(-3), rel=1e-4)
    assert float(fit_temperature(logits, jnp.array([1, 0]))) == pytest.approx(np.exp(3), rel=1e-4)


def test_calibration_recovers_temperature_and_lapses():
    rng = np.random.default_rng(0)
    logits = 6.0 * rng.normal(size=(20_000, 5))
    probs = np.exp(logits / 2.0) / np.exp(logits / 2.0).sum(-1, keepdims=True)
    probs = 0.9 * probs + 0.1 / 5
    action = (probs.cumsum(-1) > rng.random((len(probs), 1))).argmax(-1)
    found = fit_calibration(jnp.asarray(logits), jnp.asarray(action))
    assert float(found.temperature) == pytest.approx(2.0, rel=0.05)
    assert float(found.lapse) == pytest.approx(0.1, abs=0.01)


def test_rows_without_weight_do_not_change_the_temperature():
    logits = jnp.tile(jnp.array([2 * np.log(3.0), 0.0]), (6, 1))
    action = jnp.array([0, 0, 0, 1, 1, 1])
    weight = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert float(fit_temperature(logits, action, weight)) == pytest.approx(2.0, rel=1e-4)
