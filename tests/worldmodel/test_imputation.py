"""Sample-and-hold, then medians."""

import numpy as np
import pytest

from worldmodel import schema
from worldmodel.imputation import impute, training_medians

HEART, TEMP, FIO2, LACTATE, BILIRUBIN, GLUCOSE = (
    schema.INDEX[name]
    for name in ("heart_rate", "temp_c", "fio2", "lactate", "bilirubin_total", "glucose")
)
MEDIANS = np.arange(39.0) + 500


def one_measurement(feature, steps=40, value=7.0, at=2):
    values = np.full((1, steps, 39), np.nan)
    values[0, at, feature] = value
    return values


@pytest.mark.parametrize(
    ("step_hours", "feature", "hours", "later_steps"),
    [
        # Steps a value is carried on after its own: hold time / step, rounded up, at least one.
        (1.0, HEART, 2, 2),
        (2.0, HEART, 2, 1),
        (4.0, HEART, 2, 1),
        (8.0, HEART, 2, 1),
        (1.0, TEMP, 6, 6),
        (2.0, TEMP, 6, 3),
        (4.0, TEMP, 6, 2),
        (8.0, TEMP, 6, 1),
        (4.0, FIO2, 12, 3),
        (4.0, LACTATE, 8, 2),
        (8.0, LACTATE, 8, 1),
        (2.0, GLUCOSE, 14, 7),
        (4.0, GLUCOSE, 14, 4),
        (1.0, BILIRUBIN, 28, 28),
        (4.0, BILIRUBIN, 28, 7),
        (8.0, BILIRUBIN, 28, 4),
    ],
)
def test_hold_times_at_every_step_length(step_hours, feature, hours, later_steps):
    assert schema.HOLD_HOURS[feature] == hours
    filled, counts = impute(
        one_measurement(feature), np.array([40]), MEDIANS, step_hours=step_hours
    )
    median = MEDIANS[feature]
    expected = [median] * 2 + [7.0] * (1 + later_steps)
    expected += [median] * (40 - len(expected))
    np.testing.assert_array_equal(filled[0, :, feature], expected)
    assert (counts.measured, counts.held) == (1, later_steps)
    assert counts.measured + counts.held + counts.filled == 40 * 39


def test_a_table_by_hand():
    # Temperature: 4 h steps, held for 2 steps. Two stays, the second of 3 steps.
    values = np.full((2, 6, 39), np.nan)
    values[0, [0, 1, 4], TEMP] = 36.0, 37.0, 38.0
    values[1, 1, TEMP] = 40.0
    filled, counts = impute(values, np.array([6, 3]), MEDIANS)
    median = MEDIANS[TEMP]
    np.testing.assert_array_equal(filled[0, :, TEMP], [36, 37, 37, 37, 38, 38])
    np.testing.assert_array_equal(filled[1, :, TEMP], [median, 40, 40, 0, 0, 0])
    assert filled.dtype == np.float32
    assert (counts.measured, counts.held) == (4, 4)
    assert counts.filled == 9 * 39 - 8  # 6 + 3 recorded rows of 39 entries


def test_a_value_never_crosses_to_another_stay():
    values = np.full((2, 3, 39), np.nan)
    values[0] = 1.0
    filled, _ = impute(values, np.array([3, 3]), MEDIANS, carry_forever=True)
    np.testing.assert_array_equal(filled[1], np.broadcast_to(MEDIANS, (3, 39)))


def test_carry_forever_never_lets_go():
    filled, counts = impute(one_measurement(HEART), np.array([40]), MEDIANS, carry_forever=True)
    np.testing.assert_array_equal(filled[0, 2:, HEART], 7.0)
    np.testing.assert_array_equal(filled[0, :2, HEART], MEDIANS[HEART])
    assert counts.held == 37


def test_rows_after_the_stay_are_zero():
    filled, counts = impute(np.full((1, 4, 39), 3.0), np.array([2]), MEDIANS)
    assert (filled[0, :2] == 3).all() and not filled[0, 2:].any()
    assert counts.measured == 2 * 39


def test_input_is_left_alone():
    values = one_measurement(HEART)
    before = values.copy()
    impute(values, np.array([40]), MEDIANS)
    np.testing.assert_array_equal(values, before)


def test_medians_are_of_training_measurements():
    values = np.full((3, 3, 39), np.nan)
    values[0, :, TEMP] = 36.0, 38.0, np.nan
    values[1, 0, TEMP] = 41.0
    values[2, :, TEMP] = 25.0  # not a training stay
    values[2, :, HEART] = 200.0  # measured there only
    medians = training_medians(values, np.array([True, True, False]), MEDIANS)
    assert medians[TEMP] == 38.0  # of 36, 38, 41
    assert medians[HEART] == MEDIANS[HEART]  # the fallback
    assert MEDIANS[TEMP] == 500 + TEMP  # not overwritten
