"""Cloned clinicians: they recover a known rule, calibrated, and see what they should see."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.clinician import MODELS, BehaviorConfig, fit_behavior
from policy.clinician_models import GRU
from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.observation import as_pytree, observation_at
from worldmodel.scaling import Scaler

QUICK = BehaviorConfig(hidden=24, epochs=5, updates=400, batch=192)
MAP = schema.INDEX["meanbp"]


def ruled(lag):
    """Stays whose dose follows MAP `lag` rows before and the last dose; its probabilities."""
    episodes = toy_episodes(num_stays=2500, seed=1)
    rng = np.random.default_rng(0)
    meanbp = np.asarray(episodes.dynamic)[..., MAP]
    valid = np.asarray(episodes.valid)
    z = (meanbp - meanbp[valid].mean()) / meanbp[valid].std()
    level = np.zeros(meanbp.shape, np.int32)
    probs = np.zeros((*meanbp.shape, 25))
    for t in range(meanbp.shape[1]):
        before = level[:, t - 1] if t else np.zeros(len(level))
        seen = z[:, t - lag] if t >= lag else np.zeros(len(level))
        wanted = np.clip(1.0 + 0.5 * before - 1.5 * seen, 0, 4)
        logits = -((np.arange(5) - wanted[:, None]) ** 2) / (2 * 0.7**2)
        rule = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        level[:, t] = (rule.cumsum(-1) > rng.random((len(rule), 1))).argmax(-1)
        probs[:, t, ::5] = rule
    episodes = episodes.replace(
        vasopressor=jnp.asarray(np.where(valid, level, 0)), fluid=jnp.zeros_like(episodes.fluid)
    )
    return episodes, probs


@cache
def fitted(lag):
    episodes, probs = ruled(lag)
    models = ("mlp", "gru") if lag else MODELS
    fits = fit_behavior(jax.random.key(0), episodes, models=models, config=QUICK)
    return episodes, probs, {fit.name: fit for fit in fits}


def divergence(truth, probs):
    return (truth * np.log(np.where(truth > 0, truth, 1) / np.maximum(probs, 1e-12))).sum(-1).mean()


def test_networks_recover_a_known_rule():
    episodes, truth, fits = fitted(0)
    held_out = np.asarray(episodes.valid) & (np.asarray(episodes.split) == 2)[:, None]
    far = divergence(truth[held_out], fits["marginal"].probs[held_out])
    for name in ("logistic", "mlp", "gru"):
        assert divergence(truth[held_out], fits[name].probs[held_out]) < 0.25 * far, name
        assert fits[name].report["ece"] < 0.01
    assert divergence(truth[held_out], fits["clusters"].probs[held_out]) < far
    order = [fit.report["nll"] for fit in fits.values()]
    assert order == sorted(order)


def test_only_the_gru_sees_the_rows_before():
    _, _, fits = fitted(2)
    nll = {name: fit.report["nll"] for name, fit in fits.items()}
    assert nll["gru"] < nll["mlp"] - 0.05


def test_calibration_on_other_stays_does_no_harm():
    _, _, fits = fitted(0)
    for fit in fits.values():
        assert 0.5 < fit.report["temperature"] < 2.0
        assert fit.report["nll"] < fit.uncalibrated_report["nll"] + 0.01
    # Counts in clusters are smoothed towards all actions: calibration changes them the most.
    before, after = fits["clusters"].uncalibrated_report, fits["clusters"].report
    assert after["nll"] != before["nll"]
    assert fits["clusters"].uncalibrated_reliability["count"].sum() == 25 * after["steps"]


def test_every_model_is_a_policy_that_gives_the_probabilities_it_reports():
    episodes, _, fits = fitted(0)
    valid = np.asarray(episodes.valid)
    for fit in (fits[name] for name in ("mlp", "gru", "clusters")):
        np.testing.assert_allclose(fit.probs.sum(-1), 1, atol=1e-5)
        np.testing.assert_array_equal(fit.probs[~valid], np.float32(1 / 25))
        observation = observation_at(episodes, jnp.int32(0), jnp.int32(7), past=fit.policy.past)
        alone = jax.jit(as_pytree(fit.policy))(jax.random.key(0), observation)
        np.testing.assert_allclose(alone, fit.probs[0, 7], rtol=1e-4, atol=1e-7)


def test_a_gru_looks_back_on_six_rows_and_on_no_padding():
    episodes = toy_episodes(4, 12)
    policy = GRU.initial(jax.random.key(0), Scaler.fit(episodes, split=None), 8)
    assert policy.past == schema.STATE_WINDOW == 6
    probs = policy.action_probs(episodes)

    def changed(rows):
        other = episodes.replace(
            dynamic=episodes.dynamic.at[:, rows].multiply(1.3),
            fluid=episodes.fluid.at[:, rows].set(4 - episodes.fluid[:, rows]),
        )
        return policy.action_probs(other)

    # Row 11 looks back to row 6; rows 0 to 5 are out of sight.
    np.testing.assert_array_equal(changed(slice(0, 6))[0, 11], probs[0, 11])
    assert np.abs(changed(slice(6, 7))[0, 11] - probs[0, 11]).max() > 1e-5
    assert np.abs(changed(slice(5, 6))[0, 10] - probs[0, 10]).max() > 1e-5

    observation = observation_at(episodes, jnp.int32(0), jnp.int32(2), past=6)
    garbage = observation.past.dynamic.at[:3].set(1e6)
    odd = observation.replace(
        past=observation.past.replace(dynamic=garbage, fluid=observation.past.fluid.at[:3].set(4))
    )
    ask = jax.jit(as_pytree(policy))
    np.testing.assert_array_equal(ask(None, odd), ask(None, observation))
    np.testing.assert_allclose(ask(None, observation), probs[0, 2], rtol=1e-4)


def test_bad_input_is_refused():
    episodes = toy_episodes(20)
    with pytest.raises(InputError, match="logistic, mlp, gru, clusters, marginal"):
        fit_behavior(jax.random.key(0), episodes, models=("forest",))
    with pytest.raises(InputError, match="'validation' has no stays"):
        fit_behavior(jax.random.key(0), episodes.replace(split=jnp.zeros(20, jnp.int32)))
