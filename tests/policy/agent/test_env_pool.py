"""The pool gives what the world model and the environment give, however questions arrive."""

import asyncio
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.agent.forecast import ForecastConfig, Forecaster
from policy.simple import GuidelineRules, RandomPolicy
from worldmodel import schema, struct
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import published_scaler
from worldmodel.simulate.history import history_from_observation
from worldmodel.simulate.rollout import rollout
from worldmodel.synthetic import patient_key

ACTIONS = (0, 7, 24)


reset = jax.jit(lambda env, key: env.reset(key))
step = jax.jit(lambda env, state, action: env.step(state, action))


def seen(env, patient):
    """The first observation of a synthetic patient."""
    return reset(env, patient_key(jax.random.key(3), patient))


def ask(pool, *questions):
    async def together():
        return await asyncio.gather(*questions)

    return asyncio.run(together())


def test_a_forecast_is_the_statistics_of_a_rollout(env, forecaster, world_model, make_ward):
    (found,) = ask(pool := make_ward(), pool.simulate(5, ACTIONS))
    _, first = seen(env, 5)
    history = history_from_observation(world_model, first.observation)
    history = history.replace(patient=jnp.array([5]))
    played = rollout(
        world_model, jax.random.key(2), history, np.array(ACTIONS)[:, None], samples=8,
        features=schema.FEATURE_NAMES,
    )  # fmt: skip
    values = np.asarray(played.values)[0, :, :, 0]
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(found.mean, values.mean(1))
    close(found.low, np.quantile(values, 0.05, axis=1))
    close(found.high, np.quantile(values, 0.95, axis=1))
    close(found.sofa, np.asarray(played.sofa)[0, ..., 0].mean(1))
    close(found.ventilation, np.asarray(played.ventilation)[0, ..., 0].mean(1))
    z = np.asarray(world_model.scaler.normalize(values.reshape(3, 4, 2, 39).mean(1)))
    close(found.disagreement, z.std(1).mean(-1), atol=1e-3)
    assert np.isnan(found.support).all()


def test_answers_do_not_depend_on_who_else_asks(make_ward):
    pool = make_ward(np.roll(np.arange(8), 3))
    alone = [ask(pool, pool.simulate((p + 3) % 8, ACTIONS[: 1 + p % 3]))[0] for p in range(7)]
    pool = make_ward()
    asked = [pool.simulate(slot, ACTIONS[: 1 + slot % 3]) for slot in reversed(range(7))]
    together = ask(pool, *asked)[::-1]
    for one, other in zip(alone, together, strict=True):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), one, other)


def test_prescriptions_are_steps_of_the_environment(env, make_ward):
    pool = make_ward()
    state, first = seen(env, 4)
    np.testing.assert_array_equal(pool.initial(4).observation.dynamic, first.observation.dynamic)
    for action in (3, 0, 12, 24):
        orders = [pool.prescribe(slot, action if slot == 4 else 6) for slot in range(6)]
        moved = ask(pool, *orders)[4]
        state, want = step(env, state, action)
        np.testing.assert_allclose(moved.observation.dynamic, want.observation.dynamic, rtol=1e-5)
        np.testing.assert_allclose(moved.reward, want.reward, rtol=1e-5)
        assert bool(moved.done) == bool(want.done)
        if want.done:
            break
        (asked,) = ask(pool, pool.simulate(4, (action,)))
        assert np.isfinite(asked.mean).all()
    assert want.done


def test_a_prescription_moves_nobody_else(make_ward):
    pool, still = make_ward(), make_ward()
    ask(pool, pool.prescribe(5, 24), pool.prescribe(0, 24))
    for slot in range(1, 5):
        one, other = (ask(w, w.simulate(slot, (6,)))[0] for w in (pool, still))
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5)


def test_support_is_the_clinicians_probability(env, world_model):
    observations = [seen(env, patient)[1].observation for patient in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *observations)
    policy = GuidelineRules()
    forecaster = Forecaster(
        world_model, jax.random.key(0), ForecastConfig(samples=2), behavior=policy
    )
    found = forecaster(batch, np.arange(3), np.tile(np.arange(3), (3, 1)))
    want = [policy(jax.random.key(0), observation)[:3] for observation in observations]
    np.testing.assert_allclose(found.support, want)


def test_support_is_what_a_recurrent_model_knows_of_the_clinicians(env):
    config = ModelConfig(variant="recurrent", hidden=8, head=4)
    model = init_world_model(jax.random.key(1), published_scaler(), config, members=2)
    observations = [seen(env, patient)[1].observation for patient in range(2)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *observations)
    forecaster = Forecaster(model, jax.random.key(0), ForecastConfig(samples=2))
    found = forecaster(batch, np.arange(2), np.tile(np.arange(25), (2, 1)))
    np.testing.assert_allclose(found.support.sum(1), 1, atol=1e-5)
    assert (found.support > 0).all()


@struct.dataclass
class Ramp(RandomPolicy):
    """Every action has a probability of its own."""

    def __call__(self, key, observation):
        return jnp.arange(1.0, 26.0) / 325.0


def test_a_shuffled_simulator_answers_for_other_treatments(env, world_model):
    """Which, is drawn by patient and row: the same whenever it is asked."""
    observations = [seen(env, patient)[1].observation for patient in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *observations)
    patients, every = np.arange(3), np.tile(np.arange(25), (3, 1))
    config = ForecastConfig(samples=2, shuffled=True)
    wrong = Forecaster(world_model, jax.random.key(0), config, behavior=Ramp())
    found = wrong(batch, patients, every)
    answered = np.rint(325 * found.support).astype(int) - 1
    assert not (answered == every).any() and len(np.unique(answered)) > 15
    right = Forecaster(world_model, jax.random.key(0), ForecastConfig(samples=2))
    np.testing.assert_allclose(found.sofa, right(batch, patients, answered).sofa, atol=1e-5)
    np.testing.assert_array_equal(found.support, wrong(batch, patients, every).support)


def test_reference_mode_tells_one_noisy_future(env, world_model):
    observations = jax.tree.map(lambda leaf: leaf[None], seen(env, 0)[1].observation)
    forecaster = Forecaster(world_model, jax.random.key(0), ForecastConfig(mode="reference"))
    found = forecaster(observations, np.zeros(1, np.int32), np.array([[6, 6]]))
    np.testing.assert_array_equal(found.mean, found.low)
    np.testing.assert_array_equal(found.mean, found.high)
    assert (found.mean[0, 0] != found.mean[0, 1]).any()  # independent noise


def test_samples_that_do_not_fit_the_ensemble(world_model):
    with pytest.raises(InputError, match="multiple of 2"):
        Forecaster(world_model, jax.random.key(0), ForecastConfig(samples=7))
    with pytest.raises(InputError, match="mode"):
        ForecastConfig(mode="wild")


def test_an_error_reaches_everybody_who_waits(make_ward):
    pool = make_ward()
    with pytest.raises(IndexError):
        ask(pool, pool.simulate(0, (6,)), pool.simulate(9, (6,)))
