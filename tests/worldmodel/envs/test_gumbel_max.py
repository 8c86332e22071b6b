"""The gumbel-max simulator against its description, by hand and by simulation, and its values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worldmodel.envs.unrolling import keys_of, play_all, play_table
from worldmodel import SepsisEnv
from worldmodel.envs import gumbel_max as simulator
from worldmodel.envs.tables import best_policy, policy_iteration, true_value
from worldmodel.errors import InputError

LEVELS = tuple(simulator.LEVELS.values())
STEPS = 20


@pytest.fixture(scope="module")
def mdp():
    return simulator.gumbel_max()


@pytest.fixture(scope="module")
def env():
    return SepsisEnv.gumbel_max()


def number(diabetes=0, heart=1, pressure=1, oxygen=1, glucose=2, anti=0, vaso=0, vent=0):
    return int(
        np.ravel_multi_index((diabetes, heart, pressure, oxygen, glucose, anti, vaso, vent), LEVELS)
    )


def simulate(state, action, rng, count, capped=True):
    """Numbers of `count` next states: one treatment after the other, then fluctuations."""
    d, hr, bp, o2, gl, ab, va, ve = (
        np.full(count, v) for v in np.unravel_index(state, LEVELS)
    )  # fmt: skip
    a, e, v = action >> 2, action >> 1 & 1, action & 1
    had_ab, had_va, had_ve, diabetic = ab[0], va[0], ve[0], d[0]

    def chance(p):
        return rng.random(count) < p

    if a:
        hr[(hr == 2) & chance(0.5)] = 1
        bp[(bp == 2) & chance(0.5)] = 1
    elif had_ab:
        hr[(hr == 1) & chance(0.1)] = 2
        bp[(bp == 1) & chance(0.1)] = 2
    if e:
        o2[chance(0.7)] = 1
    elif had_ve:
        o2[chance(0.1)] = 0
    if v and diabetic:
        draw, low, mid = rng.random(count), bp == 0, bp == 1
        bp[low] += (draw < 0.9).astype(int)[low] + (draw < 0.4)[low]
        bp[mid] += (draw < 0.9)[mid]
        gl = np.minimum(gl + chance(0.5), 4)
    elif v:
        bp = np.minimum(bp + chance(0.7), 2)
    elif had_va:
        bp = np.maximum(bp - chance(0.05 if diabetic else 0.1), 0)

    def fluctuate(x, p, top, cap):
        draw = rng.random(count)
        x = np.where(draw < p, np.maximum(x - 1, 0), x)
        return np.where((draw >= p) & (draw < 2 * p), np.minimum(x + 1, cap), x)

    if not (a or had_ab):
        hr = fluctuate(hr, 0.1, 2, 2)
        if not (v or had_va):
            bp = fluctuate(bp, 0.1, 2, 2)
    if not (e or had_ve):
        o2 = fluctuate(o2, 0.1, 1, 1)
    if not v:
        cap = 4 if diabetic or not capped else 1
        gl = fluctuate(gl, 0.3 if diabetic else 0.1, 4, cap)
    return np.ravel_multi_index(
        (d, hr, bp, o2, gl, np.full(count, a), np.full(count, v), np.full(count, e)), LEVELS
    )


@pytest.mark.parametrize("capped", [True, False])
def test_tables_are_what_a_simulation_step_by_step_gives(capped):
    tables = simulator.transitions(simulator.factors(capped_glucose=capped))
    rng, count = np.random.default_rng(0), 20_000
    for state, action in zip(rng.integers(1440, size=60), rng.integers(8, size=60), strict=True):
        drawn = simulate(state, action, rng, count, capped)
        share = np.bincount(drawn, minlength=1440) / count
        want = tables[state, action]
        assert (np.abs(share - want) < 5 * np.sqrt(want * (1 - want) / count) + 1e-12).all()


def test_rows_are_distributions(mdp):
    assert mdp.transition.shape == (1440, 8, 1440)
    assert (mdp.transition >= 0).all()
    np.testing.assert_allclose(mdp.transition.sum(-1), 1.0, atol=1e-12)
    np.testing.assert_allclose(mdp.clinician.sum(-1), 1.0, atol=1e-12)
    # Diabetes stays, and the treatments are those chosen.
    assert mdp.transition[:720, :, 720:].sum() == mdp.transition[720:, :, :720].sum() == 0
    treated = np.unravel_index(np.arange(1440), LEVELS)[5:]
    assert mdp.transition[:, 6][:, treated[0] * treated[2] * (1 - treated[1]) == 0].sum() == 0


@pytest.mark.parametrize(
    ("before", "action", "after", "want"),
    [
        # Nothing was on or is: all four signs fluctuate, and stay with 0.8, 0.8, 0.9, 0.8.
        (number(), 0, number(), 0.8 * 0.8 * 0.9 * 0.8),
        (number(diabetes=1), 0, number(diabetes=1), 0.8 * 0.8 * 0.9 * 0.4),
        # Antibiotics: high heart rate and pressure fall to normal by one half each.
        (number(heart=2, pressure=2), 4, number(anti=1), 0.5 * 0.5 * 0.9 * 0.8),
        # Stopping them: normal rises to high with 0.1.
        (number(anti=1), 0, number(heart=2), 0.1 * 0.9 * 0.9 * 0.8),
        # Ventilation mends low oxygen with 0.7; stopping it loses it with 0.1.
        (number(oxygen=0), 2, number(vent=1), 0.8 * 0.8 * 0.7 * 0.8),
        (number(vent=1), 0, number(oxygen=0), 0.8 * 0.8 * 0.1 * 0.8),
        # A vasopressor: low to normal 0.7; with diabetes low to high 0.4, glucose up by one half.
        (number(pressure=0), 1, number(vaso=1), 0.8 * 0.7 * 0.9),
        (number(1, pressure=0), 1, number(1, pressure=2, glucose=3, vaso=1), 0.8 * 0.4 * 0.9 * 0.5),
        # Stopping it: pressure falls with 0.1, with diabetes 0.05, and glucose fluctuates again.
        (number(vaso=1), 0, number(pressure=0), 0.8 * 0.1 * 0.9 * 0.8),
        (number(1, vaso=1), 0, number(1, pressure=0, glucose=3), 0.8 * 0.05 * 0.9 * 0.3),
        # Antibiotics act before the vasopressor: high stays (0.5), or falls and rises again.
        (number(pressure=2), 5, number(pressure=2, anti=1, vaso=1), (0.5 + 0.5 * 0.7) * 0.9),
        # Without diabetes glucose that rises is low at most: 2 -> 1 with 0.1 and 0.1.
        (number(), 0, number(glucose=1), 0.8 * 0.8 * 0.9 * 0.2),
        (number(), 0, number(glucose=3), 0.0),
        (number(1), 0, number(1, glucose=4), 0.0),
    ],
)  # fmt: skip
def test_probabilities_by_hand(mdp, before, action, after, want):
    assert mdp.transition[before, action, after] == pytest.approx(want, abs=1e-12)


def test_ends_and_start(mdp):
    reached = mdp.reward[0, 0]
    assert reached[number()] == 1 and reached[number(1)] == 1
    assert reached[number(vent=1)] == reached[number(glucose=1)] == 0  # treated; abnormal
    assert reached[number(heart=0, pressure=0, oxygen=0)] == -1
    assert reached[number(heart=0, pressure=0, oxygen=0, vaso=1)] == -1
    assert reached[number(heart=0, pressure=0)] == 0
    np.testing.assert_array_equal(mdp.terminal, reached != 0)
    assert mdp.start.sum() == pytest.approx(1) and mdp.start[mdp.terminal].sum() == 0
    assert mdp.start[number(vaso=1, oxygen=0)] == 0
    ratio = mdp.start[number(1, oxygen=0)] / mdp.start[number(oxygen=0)]
    assert ratio == pytest.approx(0.2 * 0.15 / (0.8 * 0.6))


def policies(mdp):
    best = np.eye(8)[mdp.clinician.argmax(1)]
    return {"random": np.full((1440, 8), 1 / 8), "physician": mdp.clinician, "optimal": best}


@pytest.mark.parametrize(
    ("name", "value", "published"),
    [("random", -0.7588, -0.759), ("physician", 0.3118, 0.307), ("optimal", 0.4130, 0.408)],
)
def test_values_over_20_steps(mdp, name, value, published):
    """The published physician follows the best policy of tables drawn 10,000 times per row."""
    found = true_value(mdp, policies(mdp)[name], horizon=STEPS)
    assert found == pytest.approx(value, abs=5e-5)
    assert found == pytest.approx(published, abs=0.0005 if name == "random" else 0.006)


@pytest.mark.slow
def test_the_drawn_tables_explain_what_is_left(mdp):
    """Policies of such tables are worth less; the published ones lie among them."""
    rng, reached, values = np.random.default_rng(3), simulator.outcome(), []
    for _ in range(6):
        drawn = np.zeros_like(mdp.transition)
        for state, action in np.ndindex(1440, 8):
            row = mdp.transition[state, action]
            to = np.flatnonzero(row)
            drawn[state, action, to] = rng.multinomial(10_000, row[to] / row[to].sum()) / 10_000
        best = policy_iteration(drawn, drawn @ reached, simulator.PUBLISHED_GAMMA)
        soft = np.where(best > 0, 0.95, 0.05 / 7)
        values.append([true_value(mdp, each, horizon=STEPS) for each in (soft, best)])
    low, high = np.min(values, 0), np.max(values, 0)
    assert (low < [0.3075, 0.4085]).all() and (high > [0.3065, 0.4075]).all()
    assert (high < [0.320, 0.420]).all()


def test_what_the_description_says_of_glucose_is_worth_more():
    mdp = simulator.gumbel_max(capped_glucose=False)
    found = [true_value(mdp, each, horizon=STEPS) for each in policies(mdp).values()]
    assert found == pytest.approx([-0.7164, 0.4334, 0.5218], abs=5e-5)


def test_the_physicians_policy_is_not_the_best_of_the_process(mdp):
    """Published policies are made where death and discharge end nothing."""
    best = best_policy(mdp, horizon=100, gamma=0.99)
    assert true_value(mdp, best, horizon=STEPS) == pytest.approx(0.4297, abs=5e-4)


@pytest.mark.parametrize("name", ["random", "physician", "optimal"])
def test_the_environment_has_the_exact_values(env, mdp, name):
    policy = policies(mdp)[name]
    keys = keys_of(jax.random.key(1), 20_000)
    total, length, done = play_table(env, keys, jnp.asarray(policy, jnp.float32), STEPS)
    want = true_value(mdp, policy, horizon=STEPS)
    assert abs(float(total.mean()) - want) < 4 * float(total.std()) / 20_000**0.5
    steps = mdp._replace(reward=np.broadcast_to(1.0, mdp.transition.shape))
    long = true_value(steps, policy, horizon=STEPS)
    assert abs(float(length.mean()) - long) < 4 * float(length.std()) / 20_000**0.5
    assert done.all()


@pytest.mark.parametrize(
    ("state", "action"), [(number(), 0), (number(1, 1, 0), 1), (number(1, 2, 2, 0, 3, 1), 3)]
)
def test_the_environment_has_the_tables(env, mdp, state, action):
    count = 40_000
    start, _ = env.reset(jax.random.key(0))

    @jax.jit
    def after(keys):
        def one(key):
            inner = start.dynamics.replace(number=jnp.int32(state), key=key)
            return env.step(start.replace(dynamics=inner), jnp.int32(action))[1].observation

        return jax.vmap(one)(keys)

    share = np.bincount(after(keys_of(jax.random.key(3), count)), minlength=1440) / count
    want = mdp.transition[state, action]
    assert (np.abs(share - want) < 5 * np.sqrt(want / count) + 1e-7).all()
    assert (want > 0.01).sum() > 3


def test_hidden_variables(env):
    assert simulator.visible()[1] == 1440
    seen, count = simulator.visible(("diabetes",))
    assert count == 720 and (seen == np.arange(1440) % 720).all()
    seen, count = simulator.visible(("diabetes", "glucose"))
    assert count == 144 and (np.bincount(seen) == 10).all()
    partly = SepsisEnv.gumbel_max(hidden=("diabetes", "glucose"))
    keys, actions = keys_of(jax.random.key(5), 50), jnp.full((50, STEPS), 4)
    _, _, full = play_all(env, keys, actions)
    _, _, got = play_all(partly, keys, actions)
    np.testing.assert_array_equal(got.observation, seen[np.asarray(full.observation)])
    np.testing.assert_array_equal(got.reward, full.reward)
    with pytest.raises(InputError, match="hidden: got 'age', expected among diabetes, heart_rate"):
        SepsisEnv.gumbel_max(hidden=("age",))
    with pytest.raises(InputError, match="exploration: got 2"):
        simulator.gumbel_max(exploration=2)


def test_what_a_step_tells(env, mdp):
    keys, actions = keys_of(jax.random.key(6), 300), jnp.full((300, STEPS), 1)
    state, first, got = play_all(env, keys, actions)
    np.testing.assert_allclose(
        got.info.support[:, 0], mdp.clinician[np.asarray(first.observation), 1], rtol=1e-6
    )
    earned, last = np.asarray(got.reward.sum(1)), np.asarray(state.last.info.mortality)
    ended = np.asarray(state.last.terminated)
    assert set(earned[ended]) <= {-1.0, 1.0} and (earned[~ended] == 0).all()
    np.testing.assert_array_equal(last[ended], (1 - earned[ended]) / 2)
    assert np.isnan(last[~ended]).all() and (state.last.terminated | state.last.truncated).all()
    assert np.isnan(np.asarray(first.info.sofa)).all()


def test_its_own_actions(env):
    assert env.num_actions == 8 and SepsisEnv.synthetic().num_actions == 25
    state, _ = env.reset(jax.random.key(0))
    assert np.isnan(env.step(state, 8)[1].reward) and not np.isnan(env.step(state, 7)[1].reward)
    uniform = jnp.full((1440, 25), 1 / 25)
    with pytest.raises(InputError, match=r"expected \(8,\)"):
        play_table(env, keys_of(jax.random.key(0), 2), uniform, 2)
