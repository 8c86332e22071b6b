"""What stays of a language model amount to, and what one model has of another."""

from dataclasses import replace

import numpy as np
import pytest

from sepsis_jax.pipelines.llm.evaluation import OF_STAYS, evaluate_stays, gains
from tests.policy.train.test_advantage_assignment import stay

UNTREATED = {"meanbp": 60.0}  # with action 0: G1 is broken


def treated(returns, broken):
    """Stays of four decisions and a return each, of which some break a rule."""
    stays = []
    for patient, (total, count) in enumerate(zip(returns, broken, strict=True)):
        one = stay(patient, [(0, 0.0)] * 3 + [(0, total)])
        one.decisions = [
            replace(decision, **(UNTREATED if n < count else {}))
            for n, decision in enumerate(one.decisions)
        ]
        one.outcome = "survival"
        stays.append(one)
    return stays


def kept(evaluation):
    return {name: getattr(evaluation, name) for name in OF_STAYS}


def test_failed_stays_count_as_deaths_and_their_prescriptions_do_not():
    found = evaluate_stays([*treated([3.0, 9.0], [1, 3]), stay(2, [(0, 5.0)], failed=True)])
    assert found.returns.tolist() == [3.0, 9.0, -15.0] and found.value == pytest.approx(-1.0)
    assert found.prescriptions.tolist() == [4, 4, 0] and found.broken.tolist() == [1, 3, 0]
    assert found.adherence == pytest.approx(50.0)
    # influences (3 - 2, 1 - 2, 0) / (8 / 3), squares add up to 0.28125, by 3 x 2: 0.2165
    half = 100 * 1.959964 * 0.28125**0.5 / 6**0.5
    assert (found.adherence_low, found.adherence_high) == pytest.approx((50 - half, 50 + half))


def test_gains_are_of_pairs():
    """Where every patient gains the same there is no doubt, however much patients differ."""
    before = kept(evaluate_stays(treated([-10.0, 0.0, 10.0], [0, 2, 3])))
    after = kept(evaluate_stays(treated([-8.0, 2.0, 12.0], [0, 2, 3])))
    assert gains(before, after) == {
        "gain": 2.0, "gain_low": 2.0, "gain_high": 2.0,
        "adherence_gain": 0.0, "adherence_gain_low": 0.0, "adherence_gain_high": 0.0,
    }  # fmt: skip
    better = kept(evaluate_stays(treated([-8.0, 2.0, 12.0], [0, 1, 3])))
    found = gains(before, better)
    # 1 of 12; influences (-1, 2, -1) / 12, by mean 4: squares add up to 6 / 9 / 16
    assert found["adherence_gain"] == pytest.approx(100 / 12)
    half = 100 * 1.959964 * (6 / 9 / 16) ** 0.5 / 6**0.5
    assert found["adherence_gain_low"] == pytest.approx(100 / 12 - half)


def test_without_a_prescription_there_is_no_adherence():
    nothing = [stay(0, [], failed=True), stay(1, [], failed=True)]
    found = gains(kept(evaluate_stays(nothing)), kept(evaluate_stays(treated([1.0, 2.0], [0, 1]))))
    assert found["gain"] == 16.5 and np.isnan(found["adherence_gain"])
