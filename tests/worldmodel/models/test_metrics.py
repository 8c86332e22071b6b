"""Metrics and baselines on numbers computed by hand."""

import numpy as np
import pytest
from scipy.stats import norm

from worldmodel.models import evaluation
from worldmodel.models.evaluation import HostPrediction, Rows


def rows(target, *, measured=None, ventilated=None, inputs=None, last=None, now=None):
    count = len(target)
    return Rows(
        last=np.zeros_like(target) if last is None else last,
        inputs=np.zeros((count, 90)) if inputs is None else inputs,
        ventilated_now=np.zeros(count, bool) if now is None else now,
        target=target,
        measured=np.ones(target.shape, bool) if measured is None else measured,
        ventilated=np.zeros(count, bool) if ventilated is None else ventilated,
    )


def prediction(mu, sigma=1.0, ventilation=None):
    ventilation = np.zeros(len(mu)) if ventilation is None else ventilation
    return HostPrediction(mu, np.full_like(mu, sigma), ventilation)


def test_errors_count_measured_entries_only():
    target = np.array([[1.0, 5.0], [3.0, 7.0]])
    measured = np.array([[True, False], [True, True]])
    got = evaluation.state_metrics(prediction(np.zeros((2, 2))), rows(target, measured=measured))
    assert got["mae"] == pytest.approx((1 + 3 + 7) / 3)
    assert got["mae_all"] == pytest.approx((1 + 5 + 3 + 7) / 4)
    want = -norm.logpdf([1.0, 3.0, 7.0]).mean()
    assert got["nll"] == pytest.approx(want)
    assert got["crps"] == pytest.approx(
        evaluation.gaussian_crps(np.array([1.0, 3.0, 7.0]), 0, 1).mean()
    )


def test_coverage_by_hand():
    # 90% interval of a standard normal: +-1.645. Two of five lie inside.
    target = np.array([[-1.7], [-1.6], [0.0], [1.65], [9.0]])
    got = evaluation.state_metrics(prediction(np.zeros((5, 1))), rows(target))
    assert got["coverage"] == pytest.approx(0.4)
    wide = evaluation.state_metrics(prediction(np.zeros((5, 1)), sigma=2.0), rows(target))
    assert wide["coverage"] == pytest.approx(0.8)


def test_coverage_of_the_true_law_is_nominal():
    rng = np.random.default_rng(0)
    target = rng.normal(2.0, 3.0, (4000, 2))
    got = evaluation.state_metrics(prediction(np.full((4000, 2), 2.0), sigma=3.0), rows(target))
    assert got["coverage"] == pytest.approx(0.9, abs=0.01)


def test_auc_by_hand_and_none_for_one_class():
    # Pairs (dead, alive): 3 of 4 are ranked right.
    label, score = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.9, 0.4, 0.5, 0.1])
    got = evaluation.outcome_metrics(score, label)
    assert got["auroc"] == pytest.approx(0.75)
    # Precision at each death: 1/1, then 2/3; recall rises by 1/2 each time.
    assert got["auprc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert got["brier"] == pytest.approx((0.01 + 0.36 + 0.25 + 0.01) / 4)
    assert got["prevalence"] == 0.5
    for label in (np.zeros(3), np.ones(3)):
        one = evaluation.outcome_metrics(np.array([0.2, 0.3, 0.4]), label)
        assert one["auroc"] is None and one["auprc"] is None
    ventilation = evaluation.state_metrics(prediction(np.zeros((2, 1))), rows(np.ones((2, 1))))
    assert ventilation["ventilation_auc"] is None


def test_calibration_error_by_hand():
    # Bin 0.2-0.3: mean p 0.25, one of two died, gap 0.25 x 2. Bin 0.9-1.0: p 0.9 and 1.0, both
    # died, gap 0.05 x 2. Over four patients: (0.5 + 0.1) / 4.
    probability = np.array([0.22, 0.28, 0.9, 1.0])
    label = np.array([0.0, 1.0, 1.0, 1.0])
    assert evaluation.expected_calibration_error(probability, label) == pytest.approx(0.15)


def test_feature_metrics_leave_absent_features_out():
    target = np.zeros((2, 39))
    target[:, 0] = 1.0, 3.0
    measured = np.zeros((2, 39), bool)
    measured[:, 0] = True
    got = evaluation.feature_metrics(prediction(np.zeros((2, 39))), rows(target, measured=measured))
    assert got == {"heart_rate": {"mae": 2.0, "coverage": 0.5, "measured": 2}}


def root_mean_square(values):
    return np.sqrt(np.square(values).mean())


@pytest.fixture(scope="module")
def linear_world():
    """A known linear law: x' = A inputs + noise of spread 0.1."""
    rng = np.random.default_rng(0)
    law = rng.normal(size=(90, 39))

    def sample(count):
        inputs = rng.normal(size=(count, 90))
        target = inputs @ law + 0.1 * rng.normal(size=(count, 39))
        ventilated = inputs[:, 0] > 0
        return rows(target, inputs=inputs, last=inputs[:, :39], ventilated=ventilated)

    return law, sample(2000), sample(300)


def test_linear_baseline_recovers_a_linear_law(linear_world):
    law, train, test = linear_world
    got = evaluation.linear_autoregression(train, test)
    assert root_mean_square(got.mu - test.inputs @ law) < 0.03  # 0.1 sqrt(90 / 2000) = 0.021
    np.testing.assert_allclose(got.sigma, 0.1, atol=0.01)
    figures = evaluation.state_metrics(got, test)
    assert figures["mae"] == pytest.approx(0.1 * np.sqrt(2 / np.pi), rel=0.1)  # E|noise|
    assert figures["ventilation_auc"] > 0.99


def test_linear_baseline_fits_measured_entries_only(linear_world):
    law, train, test = linear_world
    measured = np.random.default_rng(1).random(train.target.shape) < 0.7
    dirty = train._replace(target=np.where(measured, train.target, 99.0), measured=measured)
    got = evaluation.linear_autoregression(dirty, test)
    assert root_mean_square(got.mu - test.inputs @ law) < 0.035


def test_last_value_keeps_the_last_value():
    last = np.array([[1.0], [2.0]])
    train = rows(np.array([[4.0], [6.0]]), last=last, measured=np.array([[True], [True]]))
    test = rows(np.array([[0.0]]), last=np.array([[5.0]]), now=np.array([True]))
    got = evaluation.last_value(train, test)
    assert got.mu == [[5.0]] and got.ventilation == [1.0]
    assert got.sigma == pytest.approx(np.sqrt((3**2 + 4**2) / 2))


def test_a_rare_feature_keeps_its_last_value(linear_world):
    _, train, test = linear_world
    measured = train.measured.copy()
    measured[50:, 3] = False  # 50 values for 90 inputs
    got = evaluation.linear_autoregression(train._replace(measured=measured), test)
    np.testing.assert_array_equal(got.mu[:, 3], test.last[:, 3])


def test_logistic_of_one_class_is_its_rate():
    got = evaluation.logistic(np.zeros((4, 2)), np.ones(4, bool), np.zeros((3, 2)))
    np.testing.assert_array_equal(got, [1.0, 1.0, 1.0])
