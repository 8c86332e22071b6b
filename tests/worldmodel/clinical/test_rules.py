"""Guideline and safety rules, SIRS and the reward, by hand and at every boundary."""

import jax.numpy as jnp
import numpy as np
import pytest

from worldmodel import schema
from worldmodel.clinical import reward, rules

WELL = {"temp_c": 37.0, "heart_rate": 80.0, "resp_rate": 15.0, "paco2": 40.0, "wbc": 8.0}


@pytest.mark.parametrize(
    ("meanbp", "lactate", "expected"),
    [
        (65.0, 2.0, False),  # both at their limits: neither is broken
        (65.0, 2.001, True),
        (64.999, 2.0, True),
        (64.0, 3.0, True),
        (80.0, 1.0, False),
    ],
)
@pytest.mark.parametrize(("vasopressor", "fluid"), [(0, 0), (0, 1), (1, 0), (4, 4)])
def test_g1(meanbp, lactate, expected, vasopressor, fluid):
    assert bool(rules.hypoperfused(meanbp, lactate)) is expected
    got = rules.g1_untreated_hypoperfusion(
        jnp.array(meanbp), jnp.array(lactate), jnp.array(vasopressor), jnp.array(fluid)
    )
    assert bool(got) is (expected and vasopressor == fluid == 0)


@pytest.mark.parametrize(
    ("meanbp", "now", "previous", "step", "expected"),
    [
        (65.0, 2, 1, 1, True),
        (64.999, 2, 1, 1, False),
        (65.0, 1, 1, 1, False),
        (65.0, 0, 1, 1, False),
        (90.0, 4, 0, 0, False),  # never at t = 0
        (90.0, 4, 0, 1, True),
    ],
)
def test_g2(meanbp, now, previous, step, expected):
    got = rules.g2_unneeded_escalation(*map(jnp.array, (meanbp, now, previous, step)))
    assert bool(got) is expected


@pytest.mark.parametrize(
    ("name", "meanbp", "vasopressor", "fluid", "rate", "expected"),
    [
        ("festor_a", 54.9, 0, 1, 20.0, True),  # a rate at the limit is still little
        ("festor_a", 54.9, 0, 1, 20.1, False),
        ("festor_a", 54.9, 0, 2, 19.0, True),  # by volume, whatever the level
        ("festor_a", 55.0, 0, 0, 0.0, False),
        ("festor_a", 54.9, 1, 0, 0.0, False),
        ("map_55", 54.9, 0, 1, 99.0, True),
        ("map_55", 54.9, 0, 2, 0.0, False),
        ("map_55", 55.0, 0, 0, 0.0, False),
        ("map_60", 59.9, 0, 1, 0.0, True),
        ("map_60", 60.0, 0, 1, 0.0, False),
        ("map_65", 64.9, 0, 1, 0.0, True),
        ("map_65", 65.0, 0, 0, 0.0, False),
        ("map_65", 64.9, 2, 0, 0.0, False),
        ("map_65_untreated", 64.9, 0, 0, 0.0, True),
        ("map_65_untreated", 64.9, 0, 1, 0.0, False),
    ],
)
def test_underdosing(name, meanbp, vasopressor, fluid, rate, expected):
    got = rules.UNDERDOSING[name](*map(jnp.array, (meanbp, vasopressor, fluid, rate)))
    assert bool(got) is expected


@pytest.mark.parametrize(
    ("name", "meanbp", "vasopressor", "expected"),
    [
        ("festor_b", 95.1, 4, True),
        ("festor_b", 95.0, 4, False),
        ("festor_b", 120.0, 3, False),
        ("map_85", 85.1, 4, True),
        ("map_85", 85.0, 4, False),
        ("map_85", 90.0, 3, False),
        ("map_95_high", 95.1, 3, True),
        ("map_95_high", 95.1, 2, False),
        ("map_95_high", 95.0, 4, False),
    ],
)
def test_overdosing(name, meanbp, vasopressor, expected):
    assert bool(rules.OVERDOSING[name](jnp.array(meanbp), jnp.array(vasopressor))) is expected


@pytest.mark.parametrize(
    ("now", "previous", "step", "expected"),
    [(2, 0, 1, True), (0, 2, 1, True), (1, 0, 1, False), (4, 0, 0, False), (3, 3, 5, False)],
)
def test_dose_jump(now, previous, step, expected):
    assert bool(rules.dose_jump(*map(jnp.array, (now, previous, step)))) is expected


@pytest.mark.parametrize(
    ("now", "previous", "step", "expected"),
    [
        (0, 3, 1, True),
        (0, 4, 1, True),
        (0, 2, 1, False),
        (1, 4, 1, False),
        (0, 3, 0, False),  # never at t = 0
        (0, 0, 1, False),
    ],
)
def test_abrupt_stop(now, previous, step, expected):
    assert bool(rules.abrupt_stop(*map(jnp.array, (now, previous, step)))) is expected


@pytest.mark.parametrize(
    ("meanbp", "vasopressor", "expected"),
    [(90.1, 1, True), (90.0, 4, False), (90.1, 0, False)],
)
def test_vasopressor_at_high_map(meanbp, vasopressor, expected):
    got = rules.vasopressor_at_high_map(jnp.array(meanbp), jnp.array(vasopressor))
    assert bool(got) is expected


@pytest.mark.parametrize(
    ("meanbp", "lactate", "fluid", "step", "step_hours", "expected"),
    [
        (60.0, 1.0, 0, 0, 4.0, True),
        (60.0, 1.0, 1, 0, 4.0, False),
        (60.0, 1.0, 0, 1, 4.0, False),  # begins at hour 4
        (60.0, 1.0, 0, 2, 1.0, True),  # hour 2
        (60.0, 1.0, 0, 3, 1.0, False),  # hour 3
        (65.0, 2.0, 0, 0, 4.0, False),
    ],
)
def test_early_fluid_missed(meanbp, lactate, fluid, step, step_hours, expected):
    got = rules.early_fluid_missed(
        *map(jnp.array, (meanbp, lactate, fluid, step)), step_hours=step_hours
    )
    assert bool(got) is expected


@pytest.mark.parametrize(
    ("fluid", "total", "ratio", "expected"),
    [
        (3, 10_001.0, 400.0, True),
        (3, 10_000.0, 200.0, False),
        (3, 0.0, 199.0, True),
        (2, 20_000.0, 100.0, False),
    ],
)
def test_fluid_overload(fluid, total, ratio, expected):
    assert bool(rules.fluid_overload(*map(jnp.array, (fluid, total, ratio)))) is expected


def test_adherence_by_hand():
    # Five prescriptions (the sixth column is padding): one G1 and one G2 leave 3 of 5.
    g1 = jnp.array([[True, False, False], [False, False, True]])
    g2 = jnp.array([[False, True, False], [False, False, True]])
    valid = jnp.array([[True, True, True], [True, True, False]])
    assert rules.adherence(g1, g2, valid) == pytest.approx(60.0)


def test_hours_below_target_by_hand():
    meanbp = jnp.array([[64.0, 65.0, 50.0, 40.0], [70.0, 70.0, 70.0, 10.0]])
    valid = jnp.array([[True, True, True, False], [True, True, True, True]])
    np.testing.assert_array_equal(rules.hours_below_target(meanbp, valid), [8.0, 4.0])
    np.testing.assert_array_equal(
        rules.hours_below_target(meanbp, valid, step_hours=1.0), [2.0, 1.0]
    )


def test_area_below_target_by_hand():
    meanbp = jnp.array([[64.0, 65.0, 50.0, 40.0], [70.0, 70.0, 70.0, 10.0]])
    valid = jnp.array([[True, True, True, False], [True, True, True, True]])
    np.testing.assert_array_equal(rules.area_below_target(meanbp, valid), [64.0, 220.0])
    np.testing.assert_array_equal(
        rules.area_below_target(meanbp, valid, step_hours=1.0), [16.0, 55.0]
    )


def test_lactate_clearance_by_hand():
    got = rules.lactate_clearance(jnp.array([4.0, 2.0]), jnp.array([3.0, 3.0]))
    np.testing.assert_allclose(got, [0.25, -0.5])


@pytest.mark.parametrize(
    ("changes", "score"),
    [
        ({}, 0),
        ({"temp_c": 36.0}, 0),
        ({"temp_c": 35.9}, 1),
        ({"temp_c": 38.0}, 0),
        ({"temp_c": 38.1}, 1),
        ({"heart_rate": 90.0}, 0),
        ({"heart_rate": 91.0}, 1),
        ({"resp_rate": 20.0}, 0),
        ({"resp_rate": 21.0}, 1),
        ({"paco2": 32.0}, 0),
        ({"paco2": 31.0}, 1),
        ({"resp_rate": 30.0, "paco2": 20.0}, 1),  # one criterion
        ({"wbc": 12.0}, 0),
        ({"wbc": 12.1}, 1),
        ({"wbc": 4.0}, 0),
        ({"wbc": 3.9}, 1),
        ({"temp_c": 40.0, "heart_rate": 120.0, "resp_rate": 30.0, "wbc": 20.0}, 4),
    ],
)
def test_sirs(changes, score):
    dynamic = np.zeros((2, 39), np.float32)
    for name, value in {**WELL, **changes}.items():
        dynamic[1, schema.INDEX[name]] = value
    assert rules.sirs_score(jnp.asarray(dynamic))[1] == score


@pytest.mark.parametrize(
    ("sofa", "lactate", "expected"),
    [
        ((5, 5), (2.0, 2.0), -0.025),  # unchanged
        ((0, 0), (2.0, 2.0), 0.0),  # unchanged at 0 is no fault
        ((5, 7), (2.0, 2.0), -0.25),  # -0.125 * 2
        ((5, 3), (2.0, 2.0), 0.25),
        ((4, 4), (1.0, 2.0), -0.025 - 2 * 0.7615941559557649),  # tanh(1)
        ((4, 3), (3.0, 2.5), 0.125 + 2 * 0.46211715726000973),  # tanh(0.5)
        ((1, 0), (2.0, 2.0), 0.125),
    ],
)
def test_step_reward(sofa, lactate, expected):
    got = reward.step_reward(*map(jnp.array, (*map(float, sofa), *lactate)))
    assert got == pytest.approx(expected, abs=1e-6)


def test_terminal_reward():
    np.testing.assert_allclose(reward.terminal_reward(jnp.array([True, False])), [-15, 15])
    assert reward.terminal_reward(jnp.array(0.25)) == 7.5


def test_trajectory_rewards_of_padded_stays():
    # Stay 0: three rows, survives. Stay 1: one row, dies. Zeros pad both.
    sofa = jnp.array([[6.0, 4.0, 4.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    lactate = jnp.array([[3.0, 3.0, 3.0, 0.0], [8.0, 0.0, 0.0, 0.0]])
    got = reward.trajectory_rewards(sofa, lactate, jnp.array([3, 1]), jnp.array([False, True]))
    np.testing.assert_allclose(got, [[0.25, -0.025, 15.0, 0.0], [-15.0, 0.0, 0.0, 0.0]], atol=1e-7)


def test_more_padding_changes_no_reward():
    rng = np.random.default_rng(0)
    sofa = jnp.asarray(rng.integers(0, 10, (3, 5)).astype(np.float32))
    lactate = jnp.asarray(rng.uniform(1, 5, (3, 5)), jnp.float32)
    length, died = jnp.array([5, 2, 4]), jnp.array([True, False, False])
    plain = reward.trajectory_rewards(sofa, lactate, length, died)
    wide = reward.trajectory_rewards(
        *(jnp.pad(x, ((0, 0), (0, 4)), constant_values=7.0) for x in (sofa, lactate)), length, died
    )
    np.testing.assert_array_equal(wide[:, :5], plain)
    assert not wide[:, 5:].any()
