"""The planner: a known advantage is found, and every search finds what is best."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.base import Policy
from policy.clinician_models import MLP
from policy.offline.algorithms import OfflineConfig
from policy.offline.data import transitions
from policy.offline.training import train_offline
from policy.planner import Planner, PlannerConfig, _predicted_effects, fit_planner, play
from policy.planner_advantage import (
    PAST,
    dose_basis,
    effects,
    fit_advantage,
    moderators,
    untrained_advantage,
)
from policy.simple import Constant, RandomPolicy
from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.models import recurrent
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.windows import encode_action
from worldmodel.models.world_model import init_world_model
from worldmodel.observation import observation_at
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import history_from_observation, observe, start_history
from worldmodel.simulate.rollout import rollout
from worldmodel.simulate.stay_unroll import predict_next

EPISODES = toy_episodes(60, 14)
SCALER = Scaler.fit(EPISODES, split=None)
KEY = jax.random.key(0)
# The reference variant answers to treatment as it is initialised.
WORLD = init_world_model(
    jax.random.key(5),
    SCALER,
    ModelConfig(variant="reference", hidden=8, layers=1, embed=4, head=4),
    members=2,
)
STEP = 5


@pytest.fixture(scope="module")
def stay():
    return EPISODES.select(np.flatnonzero(np.asarray(EPISODES.length) > STEP)[:1])


@pytest.fixture(scope="module")
def observation(stay):
    return jax.tree.map(lambda leaf: leaf[0], observation_at(stay, jnp.array([0]), STEP, past=12))


def one_step(**settings):
    """The search that scores predicted rows by an advantage."""
    return PlannerConfig(
        **{"search": "one-step", "horizon": 1, "samples": 0, "prior_weight": 0.5} | settings
    )


def made(config=None, clinician=None, **advantage) -> Planner:
    start = untrained_advantage(SCALER)
    keys = iter(jax.random.split(KEY, 3))
    filled = jax.tree.map(
        lambda leaf: jax.random.normal(next(keys), leaf.shape),
        {"doses": start.doses, "effects": start.effects, "usual": start.usual},
    )
    filled |= {name: jnp.asarray(value) for name, value in advantage.items()}
    clinician = clinician or MLP.initial(KEY, SCALER, 4)
    return Planner(WORLD, replace(start, **filled), clinician, config or one_step())


def towards(action):
    """An advantage that grows towards one of the corners of the grid of doses."""
    vasopressor, fluid = schema.action_levels(action)
    doses = np.zeros((16, 6), np.float32)
    doses[0, [0, 3]] = [1.0 if vasopressor else -1.0, 1.0 if fluid else -1.0]
    return {"doses": doses, "effects": np.zeros(8, np.float32)}


# The advantage


def test_residuals_on_residuals_find_a_known_advantage():
    rng = np.random.default_rng(0)
    rows, action_noise = 40_000, 25
    moderator = np.concatenate([np.ones((rows, 1)), rng.normal(size=(rows, 15))], 1)
    features = np.concatenate([np.ones((rows, 1)), rng.normal(size=(rows, 7)), moderator[:, 1:]], 1)
    # A clinician who treats by the very severity that lowers the value: naive fits are misled.
    severity = moderator[:, 1]
    levels = np.arange(action_noise) / 24
    logits = 2.0 * severity[:, None] * levels
    prior = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    action = (prior.cumsum(1) > rng.random((rows, 1))).argmax(1)
    effect = rng.normal(size=(rows, 8)) + severity[:, None]
    theta = rng.normal(size=(16, 6))
    gain_of_effects = rng.normal(size=8)
    basis = dose_basis()
    centred = basis[action] - prior @ basis
    gain = (moderator[:, :, None] * centred[:, None]).reshape(rows, -1) @ theta.reshape(-1)
    gain = gain + effect @ gain_of_effects - 8.0 * severity + rng.normal(size=rows)
    found = fit_advantage(features, moderator, effect, prior, action, gain, SCALER, ridge=1e-3)
    np.testing.assert_allclose(found.effects, gain_of_effects, atol=0.05)
    returns = np.einsum("rm,md,ad->ra", moderator[:500], theta - np.asarray(found.doses), basis)
    assert np.abs(returns - returns.mean(1, keepdims=True)).mean() < 0.15
    np.testing.assert_allclose(found.usual[8], np.ones(8), atol=0.05)  # by severity


def test_effects_by_hand():
    mean, std = np.asarray(SCALER.mean), np.asarray(SCALER.std)
    mu = np.zeros((2, 39), np.float32)
    at = schema.INDEX["meanbp"]
    mu[:, at] = (np.array([60.0, 90.0]) - mean[at]) / std[at]
    mu[:, schema.INDEX["lactate"]] = [1.5, -0.5]
    got = np.asarray(effects(jnp.asarray(mu), SCALER))
    np.testing.assert_allclose(got[:, :2], [[1.0, 0.0], [0.0, 1.0]], atol=1e-4)
    np.testing.assert_allclose(got[:, 3], [1.5, -0.5])


def test_moderators_by_hand(observation):
    row = np.asarray(observation.dynamic)
    got = np.asarray(moderators(observation, SCALER))
    pressure = row[schema.INDEX["meanbp"]]
    ratio = 100 * row[schema.INDEX["pao2"]] / row[schema.INDEX["fio2"]]
    np.testing.assert_allclose(got[:2], [1, (pressure - 70) / 10], rtol=1e-5)
    np.testing.assert_allclose(got[2], max(65 - pressure, 0) / 5, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[10], np.log(np.clip(ratio, 30, 700) / 200), rtol=1e-4)
    np.testing.assert_allclose(
        got[11:],
        [
            np.exp(-STEP / 3),
            STEP / 20,
            observation.vasopressor / 4,
            observation.fluid / 4,
            observation.ventilated,
        ],
        rtol=1e-5,
    )


# One step


def test_the_view_leads_back_to_the_history(stay):
    for step in (0, 3, 12):
        longest = EPISODES.select(np.argmax(np.asarray(EPISODES.length))[None])
        history = start_history(WORLD, longest, step)
        seen = jax.tree.map(lambda leaf: leaf[0], observe(WORLD, history, past=12))
        again = replace(history_from_observation(WORLD, seen), patient=history.patient)
        for want, got in zip(jax.tree.leaves(history), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-3, rtol=1e-3)


next_means = jax.jit(predict_next)
means = jax.jit(lambda world, *window: world.transitions(*window).mu)


def by_hand(planner, stay, observation):
    """J [25] of the one-step search, action by action."""
    prior = np.asarray(planner.clinician(KEY, observation))
    advantage = planner.advantage
    mu = []
    for action in range(25):
        window = start_history(WORLD, stay, STEP).window(6)
        rows = window.action.at[:, -1].set(encode_action(jnp.array([action])))
        mu.append(np.asarray(means(WORLD, window.obs, window.observed, window.static, rows)))
    mu = np.stack(mu, 1)[:, :, 0]  # [E, 25, 39]
    moderator = np.asarray(moderators(observation, SCALER))
    doses = dose_basis() @ (moderator @ np.asarray(advantage.doses))
    doses = doses - prior @ doses
    features = np.asarray(
        transitions(stay, SCALER, past=PAST).features[STEP]
    ) @ np.asarray(advantage.usual)  # fmt: skip
    gains = (np.asarray(effects(jnp.asarray(mu), SCALER)) - features) @ np.asarray(
        advantage.effects
    )
    total = doses + gains
    config = planner.config
    return total.mean(0) - config.risk * total.std(0) + config.prior_weight * np.log(prior)


def test_one_step_by_hand(stay, observation):
    planner = made(one_step(prior_weight=0.7, risk=1.3, support=0.0))
    want = by_hand(planner, stay, observation)
    np.testing.assert_allclose(planner.action_values(KEY, observation), want, rtol=1e-3, atol=5e-3)
    chosen = np.asarray(planner(KEY, observation))
    assert chosen.argmax() == want.argmax() and chosen.sum() == 1


def test_the_price_of_disagreement(stay, observation):
    bold, careful = (
        made(one_step(risk=risk, support=0.0)).action_values(KEY, observation) for risk in (0, 2.0)
    )
    assert (np.asarray(bold - careful) > 0).all()


def test_one_step_is_a_sequence_of_one(observation):
    planner = made(one_step(risk=0.5, support=0.0))
    sequences = jnp.arange(25)[:, None]
    got = play(planner, KEY, observation, sequences, 0)
    np.testing.assert_allclose(got, planner.action_values(KEY, observation), rtol=1e-3, atol=5e-3)


def test_a_rare_action_is_never_chosen(observation):
    class Timid(Policy):
        def __call__(self, key, observation):
            return jnp.full(25, 1e-4).at[6].set(1 - 24e-4)

    config = one_step(prior_weight=0.0)
    free = made(replace(config, support=0.0), Timid(), **towards(24))
    bound = made(replace(config, support=0.01), Timid(), **towards(24))
    assert free(KEY, observation).argmax() == 24
    assert bound(KEY, observation).argmax() == 6
    # The penalty of leaving the prior does the same without a bound.
    assert made(one_step(prior_weight=5.0), Timid(), **towards(24))(KEY, observation).argmax() == 6


def test_broken_rules_cost_their_penalty(observation):
    well = observation.dynamic.at[schema.INDEX["meanbp"]].set(70.0)
    poor = replace(
        observation, dynamic=well.at[schema.INDEX["lactate"]].set(3.0),
        vasopressor=jnp.int32(1), step=jnp.int32(2),
    )  # fmt: skip
    free, bound = (
        made(one_step(support=0.0, rule_penalty=penalty)).action_values(KEY, poor)
        for penalty in (0.0, 2.0)
    )
    vasopressor, fluid = np.divmod(np.arange(25), 5)
    untreated, escalated = (vasopressor == 0) & (fluid == 0), vasopressor > 1
    np.testing.assert_allclose(free - bound, 2.0 * (untreated | escalated), atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_what_the_clinician_rules_out_is_no_number_lost(observation, weight):
    planner = made(one_step(prior_weight=weight), Constant(6), **towards(24))
    assert np.isfinite(planner.action_values(KEY, observation)).all()
    assert planner(KEY, observation).argmax() == 6


# Sequences


@jax.jit
def ask(planner, key, observation):
    """Compiled once per configuration, whatever is best."""
    return planner(key, observation)


@pytest.mark.parametrize("best", [0, 4, 20, 24])
@pytest.mark.parametrize(
    "config",
    [
        one_step(prior_weight=0.0),
        PlannerConfig(
            search="cross-entropy", horizon=2, candidates=64, elites=8, iterations=4,
            prior_weight=0.0,
        ),
        PlannerConfig(
            search="sequential-halving", horizon=2, samples=1, candidates=8, prior_weight=0.0
        ),
    ],
    ids=lambda config: config.search,
)  # fmt: skip
def test_every_search_finds_the_best(observation, config, best):
    planner = made(config, RandomPolicy(), **towards(best))
    assert ask(planner, KEY, observation).argmax() == best
    soft = ask(replace(planner, config=replace(config, temperature=1.0)), KEY, observation)
    assert float(soft.sum()) == pytest.approx(1.0, abs=1e-5) and soft.argmax() == best


def test_sequences_meet_the_same_noise_and_add_up(observation):
    planner = made(PlannerConfig(search="cross-entropy", horizon=3, prior_weight=0.2))
    sequences = jnp.array([[3, 7, 7], [3, 7, 7], [4, 7, 7]])
    noisy = np.asarray(play(planner, KEY, observation, sequences, 4))
    assert noisy[0] == pytest.approx(noisy[1], abs=1e-4) and abs(noisy[0] - noisy[2]) > 1e-3
    short = np.asarray(play(planner, KEY, observation, sequences[:, :1], 0))
    longer = np.asarray(play(planner, KEY, observation, sequences[:, :2], 0))
    # Nothing that comes later is returns anything at a discount of 0.
    blind = replace(planner, config=replace(planner.config, gamma=0.0))
    np.testing.assert_allclose(play(blind, KEY, observation, sequences[:, :2], 0), short, atol=1e-3)
    assert np.abs(longer - short).max() > 1e-3


def test_minus_one_is_what_the_clinician_would_do(observation):
    planner = made(one_step(prior_weight=0.3))
    usual = int(planner.prior(observation).argmax())
    both = play(planner, KEY, observation, jnp.array([[-1], [usual]]), 0)
    assert float(both[0]) == pytest.approx(float(both[1]), abs=1e-5)


# Rollouts of the clinician


@pytest.fixture(scope="module")
def stays_world():
    model = ModelConfig(variant="recurrent", hidden=8, head=4)
    return init_world_model(jax.random.key(6), SCALER, model, members=2, stay_steps=14)


@pytest.mark.parametrize(("samples", "risk", "weight"), [(1, 0.0, 0.0), (3, 0.7, 0.4)])
def test_rollouts_are_the_models_own_answer(samples, risk, weight, stays_world, observation):
    config = PlannerConfig(horizon=3, samples=samples, risk=risk, prior_weight=weight, support=0.0)
    planner = fit_planner(EPISODES, stays_world, None, RandomPolicy(), config)
    values = planner.action_values(KEY, observation)
    seen = history_from_observation(stays_world, observation)
    plans = np.repeat(np.arange(25)[:, None], 3, axis=1)
    found = rollout(stays_world, KEY, seen, plans, samples=2 * samples)
    total = np.asarray(found.total_reward[0])
    members = np.stack([total[:, 0::2].mean(1), total[:, 1::2].mean(1)])
    wanted = members.mean(0) - risk * members.std(0) + weight * np.log(1 / 25)
    np.testing.assert_allclose(values, wanted, atol=1e-4)
    assert planner(KEY, observation).argmax() == values.argmax()


def test_rollouts_prefer_what_a_world_rewards(stays_world, observation):
    """A world in which the continuation after a vasopressor is good, and every other bad."""
    member = jax.tree.map(lambda leaf: leaf, stays_world.outcome_model)
    bias = member.later.bias[...]
    member.later.bias[...] = bias.at[:, 0].set(4.0)  # death is likely
    row = member.later_row.kernel[...]
    known = recurrent.DRAWN_WIDTH + 2 + schema.NUM_STATIC
    member.later_row.kernel[...] = row.at[:, known : known + 4, 0].set(-8.0)  # of the dose before
    world = replace(stays_world, outcome_model=member)
    config = PlannerConfig(horizon=2, support=0.0)
    chosen = fit_planner(EPISODES, world, None, RandomPolicy(), config)(KEY, observation).argmax()
    assert schema.action_levels(int(chosen))[0] == 4


# Fitting and settings


def test_fitting_end_to_end():
    config = OfflineConfig(hidden=(8,), updates=20, batch_size=32, seeds=2, past=2)
    rows = transitions(EPISODES.of_split("train"), SCALER, past=2)
    critic = train_offline(rows, SCALER, config).policy
    planner = fit_planner(EPISODES, WORLD, critic, RandomPolicy(), one_step())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(planner.advantage))
    assert np.abs(planner.advantage.doses).max() > 0
    probs = planner.action_probs(EPISODES)
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-5)
    with pytest.raises(InputError, match="trained by cql has no value"):
        wrong = train_offline(rows, SCALER, replace(config, algorithm="cql")).policy
        fit_planner(EPISODES, WORLD, wrong, RandomPolicy(), one_step())
    with pytest.raises(InputError, match="has no stays"):
        test_only = EPISODES.of_split("test")
        fit_planner(test_only, WORLD, critic, RandomPolicy(), one_step())
    with pytest.raises(InputError, match="search=one-step needs a critic"):
        fit_planner(EPISODES, WORLD, None, RandomPolicy(), one_step())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": "beam"}, "search: got 'beam'"),
        ({"search": "one-step"}, "the one-step search has 1"),
        ({"search": "cross-entropy", "horizon": 0}, "horizon: got 0"),
        ({"elites": 40}, "at most the 32 candidates"),
        ({"search": "sequential-halving", "horizon": 2}, "there are 25 first actions"),
        ({"risk": -1.0}, "risk: got -1.0"),
        ({"support": 1.5}, r"support: got 1.5, expected within \[0, 1\]"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        PlannerConfig(**settings)


@pytest.mark.parametrize("search", ["one-step", "sequential-halving"])
def test_a_recurrent_world_model_is_searched(search, stays_world, observation, stay):
    """The one-step search reads the very means that the model predicts from the record."""
    world = stays_world
    horizon = 1 if search == "one-step" else 2
    planner = made(PlannerConfig(search=search, horizon=horizon, candidates=4, elites=2, samples=2))
    planner = replace(planner, world_model=world)
    values = jax.jit(planner.action_values)(KEY, observation)
    assert np.isfinite(values).all() and (values > -1e9).any()
    every = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, 25, axis=0), start_history(world, stay, STEP)
    ).choose(jnp.arange(25))
    seen = history_from_observation(world, observation)
    again = jax.tree.map(lambda leaf: jnp.repeat(leaf, 25, axis=0), seen).choose(jnp.arange(25))
    # Observations do not hold the ventilation of earlier rows, so the two differ where it changed.
    if len(set(np.asarray(stay.ventilated)[0, : STEP + 1].tolist())) == 1:
        np.testing.assert_allclose(next_means(world, every), next_means(world, again), atol=1e-4)


def test_a_planner_is_fitted_on_a_recurrent_world_model():
    model = ModelConfig(variant="recurrent", hidden=8, head=4)
    world = init_world_model(jax.random.key(6), SCALER, model, stay_steps=14)
    stay, step = np.array([0, 1, 2]), np.array([0, 1, 0])
    found = _predicted_effects(world, EPISODES, stay, step)
    given = np.asarray(EPISODES.action)[stay, step]
    for row in range(3):
        history = start_history(world, EPISODES.select(stay[row : row + 1]), int(step[row]))
        mean = next_means(world, history.choose(jnp.asarray(given[row : row + 1])))[0]
        np.testing.assert_allclose(found[row], effects(mean, SCALER)[0], atol=1e-4)
