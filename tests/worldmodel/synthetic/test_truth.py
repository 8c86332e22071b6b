"""Counterfactuals, true values and action effects."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from tests.worldmodel.synthetic.conftest import WORLD, assert_same
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.synthetic import (
    FOLLOW_POLICY,
    Config,
    Params,
    counterfactual,
    generate,
    maximum_treatment,
    no_treatment,
    patient_key,
    random_policy,
    reset,
    step,
    titration,
    true_action_effects,
    true_value,
)
from worldmodel.synthetic.clinician import ClinicianParams, probabilities


def clinician(key, observation):
    """The recorded clinician, who ignores frailty unless confounding is set."""
    del key
    return probabilities(observation, jnp.float32(0), Params().clinician)


POLICIES = (no_treatment, random_policy, maximum_treatment, titration, clinician)


def choose(which, key, observation):
    """One of POLICIES, picked inside the graph: one compilation for all."""
    return jnp.stack([policy(key, observation) for policy in POLICIES])[which]


def value(policy, count=4000, **kwargs):
    which = jnp.int32(POLICIES.index(policy))
    return true_value(WORLD, jax.tree_util.Partial(choose, which), count, **kwargs)


def constant(episodes, action):
    return np.full(episodes.action.shape, action)


def test_recorded_treatment_gives_back_the_recorded_stay(world):
    assert_same(counterfactual(world[1], np.asarray(world[0].action)), world)


def test_steps_beyond_the_plan_are_left_to_the_clinician(world):
    episodes, truth = world
    plans = np.asarray(episodes.action)[:, :4].copy()
    plans[::2, 2] = FOLLOW_POLICY
    assert_same(counterfactual(truth, plans)[0], episodes)


def test_equal_rows_until_the_treatment_differs(world):
    episodes, truth = world
    plans = np.asarray(episodes.action).copy()
    plans[:, 3] = (plans[:, 3] + 7) % 25
    other, _ = counterfactual(truth, plans)
    np.testing.assert_array_equal(other.dynamic[:, :4], episodes.dynamic[:, :4])
    lasting = np.asarray(episodes.length) > 4
    assert (np.asarray(other.dynamic != episodes.dynamic)[lasting, 4]).any(-1).mean() > 0.9


def test_errors_of_measurement_do_not_depend_on_the_treatment(world):
    """Heart rate, respiration: recorded less underlying value is the same under other plans."""
    config, params = Config(), Params()
    keys = jax.vmap(partial(patient_key, WORLD))(jnp.arange(8))
    state = jax.jit(jax.vmap(lambda k: reset(k, params, config=config)))(keys)
    play = jax.jit(jax.vmap(lambda k, s, a: step(k, s, a, params, config=config)))
    treated = untreated = state
    for _ in range(3):
        treated, _ = play(keys, treated, jnp.full(8, 14))
        untreated, _ = play(keys, untreated, jnp.zeros(8, jnp.int32))
    assert_same(treated.record.error, untreated.record.error)
    assert not np.allclose(treated.latent.heart_rate, untreated.latent.heart_rate)
    at, gap = schema.INDEX["heart_rate"], []
    for played in (treated, untreated):
        gap.append(played.record.value[:, at] - played.latent.heart_rate)
    np.testing.assert_allclose(*gap, atol=1.01)  # displayed in whole beats


def test_untreated_shock_is_worse_than_care(world):
    episodes, truth = world
    lactate = np.asarray(truth.latent.lactate)
    shocked = (np.asarray(truth.latent.map)[:, 0] < 58) & (lactate[:, 0] > 2)
    untreated, bare = counterfactual(truth, constant(episodes, 0))
    both = shocked & (np.minimum(untreated.length, episodes.length) > 3)
    assert both.sum() > 100
    assert np.asarray(bare.latent.lactate)[both, 3].mean() > lactate[both, 3].mean() + 0.5
    died = np.asarray(untreated.died_90d)[shocked].mean()
    assert died > np.asarray(episodes.died_90d)[shocked].mean() + 0.2


def test_fluid_overload_harms_the_lungs_and_dilutes(world):
    episodes, truth = world
    (dry, light), (wet, heavy) = (counterfactual(truth, constant(episodes, a)) for a in (1, 4))
    both = np.minimum(dry.length, wet.length) > 6
    lung = [np.asarray(t.latent.lung)[both, 6].mean() for t in (light, heavy)]
    assert lung[1] > lung[0] + 0.1
    blood = schema.INDEX["hemoglobin"]
    assert np.asarray(wet.dynamic)[both, 6, blood].mean() < (
        np.asarray(dry.dynamic)[both, 6, blood].mean() - 0.2
    )


@pytest.fixture(scope="module")
def effects(world):
    """Effects of the 25 actions in every row of the world, [B, 5, 5], with the rows' MAP."""
    stay, row = np.nonzero(np.asarray(world[0].valid))
    result = true_action_effects(world[1], stay, row)
    shaped = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, 5, 5), result)
    return shaped, np.asarray(world[1].latent.map)[stay, row]


def test_vasopressors_raise_pressure_with_diminishing_returns(effects):
    dose = np.array(schema.level_doses(schema.DEFAULT_DOSE_EDGES.vasopressor))
    rise = effects[0].meanbp.mean(0)[:, 1]
    assert (np.diff(rise) > 1.5).all()
    per_dose = np.diff(rise) / np.diff(dose)
    assert (np.diff(per_dose) < 0).all()


def test_fluid_raises_pressure(effects):
    assert (np.diff(effects[0].meanbp.mean(0), axis=1) > 0).all()
    assert (effects[0].meanbp[:, 0, 4] - effects[0].meanbp[:, 0, 0]).mean() > 3


def test_effect_on_lactate_depends_on_the_state(effects):
    (_, lactate), before = effects
    low, high = lactate[before < 60].mean(0), lactate[before > 85].mean(0)
    assert low[2, 2] < low[0, 0] - 0.5
    assert low[0, 4] < low[0, 0] - 0.15
    assert high[3, 2] > high[0, 2] + 0.15


def test_effect_on_pressure_can_be_learned_from_the_records(world, effects):
    """A linear fit on records, adjusted for two rows, ranks the actions as the truth does."""
    before, now, after, one_hot, previous, _ = _triples(world[0])
    x = np.concatenate([before, now, np.eye(25)[previous], np.eye(25)[one_hot][:, 1:]], 1)
    y = after[:, schema.INDEX["meanbp"]]
    fitted = np.linalg.lstsq(x.T @ x, x.T @ y, rcond=None)[0][-24:]
    true = effects[0].meanbp.mean(0).ravel()
    assert spearmanr(np.concatenate([[0.0], fitted]), true).statistic > 0.95


@pytest.mark.slow
def test_effect_on_lactate_can_be_learned_from_the_records(effects):
    """A flexible learner of what was measured next, averaged over states for each action."""
    learner = pytest.importorskip("sklearn.ensemble").HistGradientBoostingRegressor
    episodes, _ = generate(WORLD, 8000, keep_latent=False)
    before, now, after, action, previous, measured = _triples(episodes)
    target = schema.INDEX["lactate"]

    def inputs(given):
        levels = [np.stack(schema.action_levels(a), 1) for a in (previous, given)]
        return np.concatenate([before, now, *levels], 1)

    seen = measured[:, target]
    model = learner(max_iter=150, random_state=0).fit(inputs(action)[seen], after[seen, target])
    fitted = [model.predict(inputs(np.full_like(action, a))).mean() for a in range(25)]
    true = effects[0].lactate.mean(0).ravel()
    assert spearmanr(fitted, true).statistic > 0.9


def _triples(episodes):
    """Three consecutive rows: [M, 39] each, the last two treatments [M], what was measured last."""
    rows, three = np.asarray(episodes.dynamic, np.float64), np.asarray(episodes.valid)[:, 2:]
    rows = rows / rows[np.asarray(episodes.valid)].std(0)
    action = np.asarray(episodes.action)
    return (
        rows[:, :-2][three],
        rows[:, 1:-1][three],
        rows[:, 2:][three],
        action[:, 1:-1][three],
        action[:, :-2][three],
        np.asarray(episodes.measured)[:, 2:][three],
    )


def test_good_treatment_beats_the_clinician_beats_chance(world):
    truth = world[1]
    total = np.asarray(truth.reward).sum(1)
    half = 1.96 * total.std(ddof=1) / np.sqrt(len(total))
    clinician = total.mean() - half, total.mean() + half
    assert value(titration).interval[0] > clinician[1]
    assert value(random_policy).interval[1] < clinician[0]
    assert value(no_treatment).interval[1] < clinician[0]
    assert value(maximum_treatment).interval[1] < value(random_policy).interval[0]


def test_value_is_the_mean_of_the_rewards(world):
    """The clinician's value over the recorded patients is the mean recorded return."""
    episodes, truth = world
    found = value(clinician, 3000, discount=0.9)
    reward = np.asarray(truth.reward, np.float64)
    np.testing.assert_allclose(found.total, reward.sum(1), atol=1e-3)
    assert found.value == pytest.approx(reward.sum(1).mean(), abs=1e-4)
    discounted = (reward * 0.9 ** np.arange(reward.shape[1])).sum(1)
    assert found.discounted == pytest.approx(discounted.mean(), abs=1e-4)
    assert found.discounted_se == pytest.approx(discounted.std(ddof=1) / 3000**0.5, rel=1e-3)
    assert found.mortality == pytest.approx(np.asarray(episodes.died_90d).mean(), abs=1e-6)
    assert found.length == pytest.approx(np.asarray(episodes.length).mean(), rel=1e-5)


def test_confounding_leaves_the_value_of_other_policies_alone():
    dialled = Params(clinician=ClinicianParams(confounding=0.8))
    np.testing.assert_array_equal(
        value(titration, 1000, params=dialled).total, value(titration, 1000).total
    )


def test_reset_and_step_play_the_recorded_stays(world):
    """The environment gives the rows of the episodes, with the history of the windows."""
    episodes, truth = world
    config, params = Config(past=3), Params()
    keys = jax.vmap(partial(patient_key, WORLD))(jnp.arange(16))
    state = jax.jit(jax.vmap(lambda k: reset(k, params, config=config)))(keys)
    play = jax.jit(jax.vmap(lambda k, s, a: step(k, s, a, params, config=config)))
    for t in range(4):
        alive = np.asarray(episodes.valid)[:16, t]
        np.testing.assert_allclose(
            state.observation.dynamic[alive], episodes.dynamic[:16, t][alive], atol=1e-3
        )
        state, transition = play(keys, state, episodes.action[:16, t])
        np.testing.assert_allclose(transition.reward, truth.reward[:16, t], atol=1e-3)
    history = state.observation.past
    lasting = np.asarray(episodes.length)[:16] > 4
    np.testing.assert_array_equal(
        history.vasopressor[lasting, :2], episodes.vasopressor[:16][lasting, 2:4]
    )
    np.testing.assert_allclose(
        history.dynamic[lasting], episodes.dynamic[:16][lasting, 2:5], atol=1e-3
    )
    assert np.asarray(history.valid).all()


def test_bad_questions_are_refused(world):
    with pytest.raises(InputError, match="actions must be 0 to 24"):
        counterfactual(world[1], constant(world[0], 25))
    with pytest.raises(InputError, match="one row of actions per patient"):
        counterfactual(world[1], np.zeros((2, 3)))
    with pytest.raises(InputError, match="at least 2"):
        true_value(WORLD, None, 1)
    bare = world[1].replace(latent=None)
    with pytest.raises(InputError, match="keep_latent"):
        true_action_effects(bare, np.array([0]), np.array([0]))
