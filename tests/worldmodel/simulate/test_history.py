"""Starts, projection and plans."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldmodel import schema
from worldmodel.clinical import sofa
from worldmodel.errors import InputError
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.plans import parse_plan
from worldmodel.simulate.step import (
    WHOLE,
    draw_whole,
    in_whole_steps,
    mean_before_projection,
    project,
)

MAP, SYS, DIA = (schema.INDEX[name] for name in ("meanbp", "sysbp", "diabp"))


@pytest.fixture(scope="module")
def stay(episodes):
    long = np.flatnonzero(np.asarray(episodes.length) >= 13)[:1]
    return episodes.select(long)


def test_a_start_holds_the_rows_so_far(world, stay):
    history = start_history(world, stay, 3)
    assert not np.asarray(history.obs[0, :8]).any()
    np.testing.assert_array_equal(history.obs[0, 8:], world.scaler.normalize(stay.dynamic[0, :4]))
    np.testing.assert_array_equal(history.observed[0, 8:], stay.measured[0, :4])
    assert history.action[0].tolist() == [-1] * 8 + stay.action[0, :3].tolist() + [-1]
    np.testing.assert_array_equal(
        history.urine[0], [0, 0, *np.asarray(stay.dynamic[0, :4, schema.URINE])]
    )
    assert (history.step[0], history.patient[0]) == (3, stay.stay_id[0])


def test_a_late_start_holds_the_last_rows(world, stay):
    history = start_history(world, stay, 12)
    np.testing.assert_array_equal(history.obs[0], world.scaler.normalize(stay.dynamic[0, 1:13]))
    np.testing.assert_array_equal(history.urine[0], stay.dynamic[0, 7:13, schema.URINE])


def test_later_rows_do_not_leak_into_a_start(world, stay):
    changed = replace(stay, dynamic=stay.dynamic.at[:, 5:].add(50.0), vasopressor=stay.vasopressor
                      .at[:, 4:].set(4))  # fmt: skip
    for a, b in zip(
        vars(start_history(world, stay, 4)).values(),
        vars(start_history(world, changed, 4)).values(),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_starts_may_differ_by_patient(world, episodes):
    long = episodes.select(np.flatnonzero(np.asarray(episodes.length) >= 6)[:3])
    steps = np.array([0, 3, 5])
    together = start_history(world, long, steps)
    for i, step in enumerate(steps):
        alone = start_history(world, long.select(np.array([i])), int(step))
        np.testing.assert_array_equal(together.obs[i], alone.obs[0])
        assert together.sofa[i] == alone.sofa[0]


def test_the_start_is_scored_as_simulated_rows_are(world, stay):
    step = 4
    by_hand = sofa.standard(
        stay.dynamic[:, step],
        ventilated=stay.ventilated[:, step],
        vasopressor_dose=stay.vasopressor_dose[:, step - 1],  # what led to this row
        urine_24h=stay.dynamic[:, :5, schema.URINE].sum(-1) * 6 / 5,
    )
    assert start_history(world, stay, step).sofa[0] == by_hand.total[0]
    recorded = start_history(world, stay, step, recorded_sofa=True).sofa[0]
    assert recorded == stay.sofa[0, step]


@pytest.mark.parametrize(("step_hours", "rows"), [(1.0, 24), (2.0, 12), (4.0, 6), (8.0, 3)])
def test_urine_looks_back_a_day_at_every_step_length(world, stay, step_hours, rows):
    history = start_history(replace(world, step_hours=step_hours), stay, 12)
    urine = np.asarray(stay.dynamic[0, :13, schema.URINE], np.float64)
    steps = min(rows, 13)
    assert history.urine.shape == (1, rows)
    np.testing.assert_allclose(
        history.urine_24h()[0], urine[-steps:].sum() * rows / steps, rtol=1e-5
    )
    want = sofa.urine_24h(jnp.asarray(urine, jnp.float32), step_hours=step_hours)[12]
    np.testing.assert_allclose(history.urine_24h()[0], want, rtol=1e-4)


@pytest.mark.parametrize("step", [-1, 14, 99])
def test_a_row_that_is_not_there_is_named(world, stay, step):
    last = int(stay.length[0]) - 1
    with pytest.raises(InputError, match=f"stay {stay.stay_id[0]} has rows 0 to {last}, got"):
        start_history(world, stay, step)


def test_append_moves_on_by_one_row(world, stay):
    history = start_history(world, stay, 3).choose(jnp.array([7]))
    moved = history.append(jnp.ones((1, 39)), jnp.array([55.0]), jnp.array([True]))
    np.testing.assert_array_equal(moved.obs[0, :-1], history.obs[0, 1:])
    np.testing.assert_array_equal(moved.obs[0, -1], np.ones(39))
    np.testing.assert_array_equal(moved.observed[0, -1], history.observed[0, -1])
    assert moved.action[0, -2:].tolist() == [7, -1]
    assert (moved.urine[0, -1], moved.ventilated[0], moved.step[0]) == (55.0, True, 4)


# Projection


def possible(unit_scaler):
    """A z-row in mid-range, with blood pressures in order."""
    middle = (schema.LOW + schema.HIGH) / 2
    middle[[SYS, MAP, DIA]] = 120, 80, 60
    return np.array(unit_scaler.normalize(middle))


def test_possible_rows_are_left_alone(unit_scaler):
    row = jnp.asarray(possible(unit_scaler))
    projected, count = project(row, unit_scaler)
    np.testing.assert_array_equal(projected, row)
    assert count == 0


@pytest.mark.parametrize(
    ("changes", "expected", "count"),
    [
        ({"lactate": -3.0}, {"lactate": 0.2}, 1),
        ({"ph": 9.0, "spo2": 130.0}, {"ph": 8.0, "spo2": 100.0}, 2),
        ({"sysbp": 70.0}, {"sysbp": 80.0}, 1),  # up to the mean pressure
        ({"diabp": 90.0}, {"diabp": 80.0}, 1),
        ({"meanbp": 150.0}, {"sysbp": 150.0, "diabp": 60.0}, 1),
        ({"meanbp": 500.0}, {"meanbp": 200.0, "sysbp": 200.0}, 2),
        ({"output_4hourly": 20.0}, {"output_4hourly": np.log1p(4000.0)}, 1),  # log1p(mL)
        ({"output_4hourly": -1.0}, {"output_4hourly": 0.0}, 1),
    ],
)
def test_impossible_values_are_moved_and_counted(unit_scaler, changes, expected, count):
    row = possible(unit_scaler)
    for name, value in changes.items():
        row[schema.INDEX[name]] = value
    projected, moved = project(jnp.asarray(row), unit_scaler)
    for name, value in expected.items():
        assert projected[schema.INDEX[name]] == pytest.approx(value, rel=1e-6)
    assert moved == count
    untouched = [i for n, i in schema.INDEX.items() if n not in {*changes, *expected}]
    np.testing.assert_array_equal(projected[np.array(untouched)], row[untouched])


def test_projecting_twice_changes_nothing_more(world):
    rows = jnp.asarray(np.random.default_rng(0).normal(0, 5, (50, 39)), jnp.float32)
    once, count = project(rows, world.scaler)
    twice, more = project(once, world.scaler)
    assert int(count.sum()) > 100
    np.testing.assert_allclose(twice, once, atol=1e-5)
    assert (more <= 2).all()  # rounding of the two pressures at most


# Plans


def parsed(text, stay, horizon=3, step=0):
    return parse_plan(text, horizon=horizon, stay=stay, step=step)


@pytest.mark.parametrize(
    ("text", "name", "actions"),
    [
        ("rest=0,0", "rest", [0, 0, 0]),
        ("both=2,1;1,1", "both", [11, 6, 6]),  # the last pair goes on
        ("2,1", "2,1", [11, 11, 11]),
        (" all = 4,4 ; 0,0 ; 1,2 ", "all", [24, 0, 7]),
        ("tail=1,0;", "tail", [5, 5, 5]),
    ],
)
def test_plans_are_read(stay, text, name, actions):
    plan = parsed(text, stay)
    assert (plan.name, plan.actions.tolist()) == (name, actions)


@pytest.mark.parametrize("text", ["clinician", " Clinician "])
def test_the_clinicians_plan_is_the_record(stay, text):
    plan = parsed(text, stay, horizon=4, step=2)
    assert plan.name == "clinician"
    np.testing.assert_array_equal(plan.actions, stay.action[0, 2:6])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x=5,0", "level 5 is outside 0 to 4"),
        ("x=0,-1", "level -1 is outside 0 to 4"),
        ("x=1", "'1' is not V,F"),
        ("x=1,2,3", "is not V,F"),
        ("x=a,b", "is not V,F"),
        ("x=1.0,2", "is not V,F"),
        ("x=", "0 steps for a horizon of 3"),
        ("", "has no name"),
        ("=1,1", "has no name"),
        ("x=0,0;0,0;0,0;0,0", "4 steps for a horizon of 3"),
        ("doctor", "is not V,F"),
    ],
)
def test_bad_plans_are_named(stay, text, message):
    with pytest.raises(InputError, match=message):
        parsed(text, stay)


def test_a_record_that_ends_early_is_named(stay):
    length = int(stay.length[0])
    with pytest.raises(InputError, match=r"has 2 steps from step .* use a horizon of 2"):
        parsed("clinician", stay, step=length - 2)
    with pytest.raises(InputError, match=f"no step {length}"):
        parsed("clinician", stay, step=length)


def test_noise_at_the_edge_of_a_range_keeps_its_mean(key):
    scaler = Scaler(
        mean=jnp.asarray(schema.LOW), std=jnp.asarray(schema.HIGH - schema.LOW),
        static_mean=jnp.zeros(3), static_std=jnp.ones(3),
    )  # fmt: skip
    # z-scores of a range are 0 to 1, but for urine, a logarithm; blood pressures are ordered, too.
    masked = enumerate(schema.MASKED_NAMES)
    alone = [i for i, name in masked if not name.endswith("bp")]
    sigma = jnp.full(39, 0.1)
    for mu in (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.98):
        mean = mean_before_projection(jnp.full(39, mu), sigma, scaler)
        drawn, _ = project(mean + sigma * jax.random.normal(key, (20_000, 39)), scaler)
        np.testing.assert_allclose(drawn[:, alone].mean(0), mu, atol=0.004)
        if 0.3 < mu < 0.7:
            np.testing.assert_array_equal(np.asarray(mean)[alone], np.float32(mu))


def test_parts_of_the_gcs_are_drawn_whole_with_the_predicted_mean_and_variance(key):
    scaler = Scaler(
        mean=jnp.full(39, 2.0), std=jnp.full(39, 1.5),
        static_mean=jnp.zeros(3), static_std=jnp.ones(3),
    )  # fmt: skip
    assert [f.name for f in schema.FEATURES if f.integer] == list(schema.FEATURE_NAMES[WHOLE])
    normal = jax.random.normal(key, (40_000, 39))
    for points, sigma in ((2.5, 0.1), (3.1, 0.3), (2.9, 0.45), (2.3, 0.6), (3.5, 0.8)):
        mu, spread = jnp.full(39, (points - 2.0) / 1.5), jnp.full(39, sigma / 1.5)
        drawn = in_whole_steps(jnp.zeros((40_000, 39)).at[:, WHOLE].set(
            draw_whole(mu, mu, spread, normal, scaler) * 1.5 + 2.0
        ))[:, WHOLE]  # fmt: skip
        np.testing.assert_array_equal(drawn, np.round(drawn))
        np.testing.assert_allclose(drawn.mean(0), points, atol=0.02)
        above = points % 1
        wanted = above * (1 - above) if sigma < 0.5 else sigma**2
        np.testing.assert_allclose(drawn.var(0), wanted, rtol=0.05, atol=0.01)
