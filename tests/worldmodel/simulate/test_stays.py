"""The recurrent variant: packed against plain, simulated rows against the rule of records."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.envs.env import SepsisEnv
from worldmodel.errors import InputError
from worldmodel.imputation import impute
from worldmodel.models.checkpoint import load_world_model, save_world_model
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.gru import gates
from worldmodel.models.recurrent import CODES, StayRow, code_of, residual_code, row_inputs
from worldmodel.models.recurrent_training import (
    ages,
    fill_values,
    history_weights,
    log_likelihood,
    recurrent_loss,
    to_stay_rows,
)
from worldmodel.models.world_model import init_world_model
from worldmodel.observation import observation_at
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import history_from_observation, start_history
from worldmodel.simulate.rollout import rollout
from worldmodel.simulate.stay_unroll import predict_next
from worldmodel.simulate.stays import (
    FOLLOW_CLINICIAN,
    encode_past,
    pack_stays,
    start_state,
    step_stay,
)

CONFIG = ModelConfig(variant="recurrent", hidden=6, head=5)
STEPS = 14


@pytest.fixture(scope="module")
def stays():
    return toy_episodes(12, STEPS)


def random_world(stays, seed, members=1, stay_steps=STEPS):
    """Every parameter is drawn, so that no zero hides a mistake."""
    scaler = Scaler.fit(stays, split=None)
    key = jax.random.key(seed)
    world = init_world_model(key, scaler, CONFIG, members=members, stay_steps=stay_steps)
    models = (world.state_model, world.outcome_model)
    leaves, structure = jax.tree.flatten(models)
    keys = jax.random.split(key, len(leaves))
    drawn = [0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    state_model, outcome_model = jax.tree.unflatten(structure, drawn)
    state_model.noise_factor[...] = jnp.broadcast_to(jnp.eye(39), (members, 39, 39))
    state_model.fill[...] = jnp.broadcast_to(fill_values(stays, scaler, 4.0), (members, 39))
    return replace(world, state_model=state_model, outcome_model=outcome_model)


@pytest.fixture(scope="module")
def world(stays):
    return random_world(stays, 1)


@pytest.fixture(scope="module")
def ensemble(stays):
    return random_world(stays, 2, members=2)


def member_of(world, index=0):
    return jax.tree.map(lambda leaf: leaf[index], (world.state_model, world.outcome_model))


def test_packed_steps_equal_the_plain_model_on_records(world, stays):
    state_model, risks = member_of(world)
    rows = to_stay_rows(stays, world.scaler, world.dose_edges)

    @jax.jit
    def plainly(state_model, risks, rows):
        hidden = state_model.encode(rows.inputs)
        choice = state_model.propensity(hidden, rows.inputs)
        residual = residual_code(choice, rows.action)
        plain = state_model.predict(hidden, rows.inputs, rows.obs, residual)
        return hidden, choice, plain, jax.nn.sigmoid(risks.risks(hidden, rows.inputs, residual))

    @jax.jit
    def packed(world, history, action):
        kernel = pack_stays(world)
        before = encode_past(kernel, history.memory)
        quiet = jnp.zeros((action.shape[0], world.noise_width))
        state = start_state(history, before)
        _, found = step_stay(world, kernel, state, history.static, history.step, action, quiet)
        return before, found

    hidden, choice, plain, plain_risks = plainly(state_model, risks, rows)
    for step in (0, 1, 5):
        has_row = np.flatnonzero(np.asarray(stays.length) > step)
        history = start_history(world, stays.select(has_row), step)
        before, found = packed(world, history, rows.action[has_row, step])
        if step:
            np.testing.assert_allclose(before, hidden[has_row, step - 1], atol=1e-6)
        for one, other in zip(found.prediction, plain, strict=True):
            np.testing.assert_allclose(one, other[has_row, step], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(found.risks, plain_risks[has_row, step], atol=1e-6)
        chosen = jax.nn.softmax(choice[has_row, step])
        chosen = np.take_along_axis(np.asarray(chosen), rows.action[has_row, step][:, None], 1)
        np.testing.assert_allclose(found.support, chosen[:, 0], atol=1e-6)


def test_mean_predictions_of_an_ensemble_are_its_members(ensemble, stays):
    history = start_history(ensemble, stays.select(np.arange(3)), 1).choose(jnp.array([0, 7, 24]))
    together = predict_next(ensemble, history)
    for index in range(2):
        alone = predict_next(ensemble.member(index), history)
        np.testing.assert_allclose(together[index], alone[0], atol=1e-6)


def test_simulated_rows_follow_the_rule_of_records(world, stays):
    """Filling what was measured by the rule of the cohort gives the simulated rows back."""
    count, steps = 5, 12
    start = start_history(world, stays.select(np.arange(count)), 0)

    @jax.jit
    def play(world, start):
        kernel = pack_stays(world)

        def step(state, inputs):
            number, noise = inputs
            action = jnp.full(count, 7)
            after, _ = step_stay(world, kernel, state, start.static, number, action, noise)
            return after, (after.obs, after.measured)

        noise = jax.random.normal(jax.random.key(0), (steps, count, world.noise_width))
        first = start_state(start, encode_past(kernel, start.memory))
        _, found = jax.lax.scan(step, first, (jnp.arange(steps), noise))
        return found

    obs, measured = (np.moveaxis(np.asarray(leaf), 0, 1) for leaf in play(world, start))
    obs = np.concatenate([start.obs[:, -1:], obs], axis=1)
    measured = np.concatenate([start.memory.measured[:, None], measured], axis=1)
    assert 0.2 < measured[:, 1:].mean() < 0.8
    fill = np.asarray(member_of(world)[0].fill[...])
    again, _ = impute(np.where(measured, obs, np.nan), np.full(count, steps + 1), fill)
    masked = slice(0, schema.NUM_MASKED)
    # The toy's first rows hold values where nothing was measured; records hold the filling.
    started = np.maximum.accumulate(measured, axis=1)
    same = np.isclose(again, obs, atol=1e-5) | ~started
    assert same[..., masked].all()
    urine = obs[..., schema.URINE][:, 1:]
    np.testing.assert_allclose(urine[~measured[:, 1:, schema.URINE]], fill[schema.URINE], atol=1e-6)


def test_what_a_stay_does_has_probability_one():
    logits = jax.random.normal(jax.random.key(0), (4, 6, 3))
    ends = jnp.full(4, 3)
    dead = jnp.exp(log_likelihood(logits, ends, jnp.ones((4, 1), bool)))[:, 2]
    alive = jnp.exp(log_likelihood(logits, ends, jnp.zeros((4, 1), bool)))[:, 2]
    goes_on = jnp.exp(log_likelihood(logits, ends + 1, jnp.zeros((4, 1), bool)))[:, 2]
    np.testing.assert_allclose(dead + alive + goes_on, 1.0, atol=1e-6)
    d, r, q = jnp.moveaxis(jax.nn.sigmoid(logits[:, 2]), -1, 0)
    np.testing.assert_allclose(dead, d + (1 - d) * r * q, atol=1e-6)
    last = [
        log_likelihood(logits, jnp.full(4, 6), jnp.full((4, 1), died)) for died in (True, False)
    ]
    np.testing.assert_allclose(sum(jnp.exp(one[:, 5]) for one in last), 1.0, atol=1e-6)


def test_residual_codes_have_mean_zero_under_the_propensity():
    logits = jax.random.normal(jax.random.key(1), (7, 25))
    every = jax.vmap(lambda action: residual_code(logits, jnp.full(7, action)))(jnp.arange(25))
    mean = jnp.einsum("anc,na->nc", every, jax.nn.softmax(logits))
    np.testing.assert_allclose(mean, 0.0, atol=1e-6)
    vasopressor, fluid = schema.action_levels(np.arange(25))
    np.testing.assert_array_equal(CODES[:, :4].sum(1), vasopressor)
    np.testing.assert_array_equal(code_of(jnp.arange(25))[:, 4:].sum(1), fluid)


def test_rows_know_nothing_of_what_comes_later(stays, world):
    changed = replace(
        stays,
        dynamic=stays.dynamic.at[:, 5:].multiply(1.1),
        vasopressor=stays.vasopressor.at[:, 4:].set(4),
        ventilated=stays.ventilated.at[:, 5:].set(True),
        died_90d=~stays.died_90d,
    )
    one, other = (to_stay_rows(which, world.scaler, world.dose_edges) for which in (stays, changed))
    np.testing.assert_array_equal(one.inputs[:, :5], other.inputs[:, :5])
    assert not np.array_equal(one.inputs[:, 5], other.inputs[:, 5])


def test_every_stay_ends_with_the_window(world, stays):
    # Smaller risks, so that no stay ends for certain before.
    world = replace(world, outcome_model=jax.tree.map(lambda leaf: leaf / 8, world.outcome_model))
    start = start_history(world, stays.select(np.arange(4)), 0)
    plans = np.full((2, STEPS), 6)
    found = rollout(world, jax.random.key(3), start, plans, samples=5)
    alive = np.asarray(found.alive)
    assert (np.diff(alive, axis=-1) <= 1e-7).all()
    assert (alive[..., -2] > 0).all()
    np.testing.assert_array_equal(alive[..., -1], 0.0)
    assert ((found.mortality > 0) & (found.mortality < 1)).all()
    np.testing.assert_allclose(found.later_reward, 0.0, atol=1e-6)


def test_deaths_of_a_rollout_are_the_hazards_of_its_steps(world, stays):
    start = start_history(world, stays.select(np.arange(3)), 1)
    plans = np.array([[0, 3, 7, 7], [24, 0, 0, 1]])
    found = rollout(world, jax.random.key(4), start, plans, samples=3)
    death, alive = np.asarray(found.death), np.asarray(found.alive)
    # The first hazards depend on the row and the treatment alone, not on what is drawn.
    member = world.with_models(member_of(world))
    kernel = pack_stays(member)
    state = start_state(start, encode_past(kernel, start.memory))
    quiet = jnp.zeros((3, world.noise_width))
    for k, first in enumerate(plans[:, 0]):
        _, step = step_stay(
            member, kernel, state, start.static, start.step, jnp.full(3, first), quiet
        )
        risk, leaves = np.asarray(step.risks[:, 0]), np.asarray(step.risks[:, 1])
        for s in range(3):
            np.testing.assert_allclose(death[:, k, s, 0], risk, atol=1e-6)
            np.testing.assert_allclose(alive[:, k, s, 0], (1 - risk) * (1 - leaves), atol=1e-6)
    dead = death.cumsum(-1)
    assert (death > 0).all() and (dead + alive < 1).all()
    assert (np.asarray(found.mortality) > dead[..., -1]).all()


def test_what_follows_one_step_is_read_from_the_whole_row_of_each_branch(world, stays):
    """One step shares what branches have in common; here every branch is on its own."""
    start = start_history(world, stays.select(np.arange(2)), 1)
    plans, samples = np.array([[0], [7], [24]]), 4
    noise = np.random.default_rng(0).normal(size=(2, samples, 1, world.noise_width))
    noise = noise.astype(np.float32)
    found = rollout(world, jax.random.key(0), start, plans, samples=samples, noise=noise)
    member = world.with_models(member_of(world))
    _, risks = member_of(world)

    @jax.jit
    def alone(start, action, eps):
        kernel = pack_stays(member)
        state = start_state(start, encode_past(kernel, start.memory))
        after, _ = step_stay(member, kernel, state, start.static, start.step, action, eps)
        inputs = row_inputs(
            StayRow(
                after.obs, after.measured, after.ventilated, start.step + 1, start.static,
                after.before, after.sums,
            )
        )  # fmt: skip
        recurrent = after.hidden @ kernel.recurrent + kernel.recurrent_bias
        width = 3 * kernel.width
        read = inputs @ kernel.row[:, :width] + kernel.row_bias[:width]
        hidden = gates(read, recurrent, after.hidden)
        later = risks.later(jax.nn.relu(risks.later_hidden(hidden))) + risks.later_row(inputs)
        mortality = after.dead + after.alive * jax.nn.sigmoid(later[..., 0])
        return after.obs, mortality, after.alive * later[..., 1]

    for k, action in enumerate(plans[:, 0]):
        for s in range(samples):
            obs, mortality, reward = alone(start, jnp.full(2, action), noise[:, s, 0])
            meanbp = world.scaler.denormalize(obs)[:, schema.INDEX["meanbp"]]
            np.testing.assert_allclose(found.values[:, k, s, 0, 0], meanbp, rtol=1e-5)
            np.testing.assert_allclose(found.mortality[:, k, s], mortality, atol=1e-6)
            np.testing.assert_allclose(found.later_reward[:, k, s], reward, rtol=1e-5, atol=1e-5)


def test_branches_do_not_depend_on_the_batch_and_share_noise(ensemble, stays):
    start = start_history(ensemble, stays.select(np.arange(6)), 1)
    plans = np.array([[0, 0, 0], [0, 0, 0], [24, 3, 3]])
    whole = rollout(ensemble, jax.random.key(5), start, plans, samples=4)
    np.testing.assert_array_equal(whole.values[:, 0], whole.values[:, 1])
    part = jax.tree.map(lambda leaf: leaf[2:4], start)
    again = rollout(ensemble, jax.random.key(5), part, plans, samples=4, max_branches=6)
    np.testing.assert_allclose(again.mortality, whole.mortality[2:4], atol=1e-5)
    np.testing.assert_allclose(again.values, whole.values[2:4], rtol=1e-4, atol=1e-3)


def test_the_clinician_of_the_model_chooses_by_its_propensity(world, stays):
    start = start_history(world, stays.select(np.arange(1)), 0)
    plans = np.full((1, 1), FOLLOW_CLINICIAN)
    found = rollout(world, jax.random.key(7), start, plans, samples=4000)
    rows = to_stay_rows(stays.select(np.arange(1)), world.scaler, world.dose_edges)
    state_model, _ = member_of(world)
    wanted = jax.nn.softmax(
        state_model.propensity(state_model.encode(rows.inputs), rows.inputs)[0, 0]
    )
    share = np.bincount(np.asarray(found.action).ravel(), minlength=25) / 4000
    assert np.abs(share - wanted).max() < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_a_policy_sees_what_is_measured(world, stays):
    """The treatment is vasopressor 1 where lactate is measured, so both must agree."""
    lactate = schema.INDEX["lactate"]

    def policy(key, observation):
        return jax.nn.one_hot(5 * observation.measured[lactate], 25)

    start = start_history(world, stays.select(np.arange(4)), 0)
    found = rollout(world, jax.random.key(1), start, policy, horizon=6, samples=8)
    share = np.asarray(found.action == 5)[..., 1:].mean()
    assert 0.05 < share < 0.95
    np.testing.assert_array_equal(
        found.action[:, 0, :, 0] == 5,
        np.broadcast_to(np.asarray(stays.measured)[:4, 0, lactate, None], (4, 8)),
    )


def test_memory_from_an_observation_equals_that_from_the_record(world, stays):
    short = np.flatnonzero(np.asarray(stays.length) > 6)[0]
    never = replace(stays, ventilated=jnp.zeros_like(stays.ventilated))
    history = start_history(world, never.select(slice(short, short + 1)), 6)
    observation = jax.tree.map(
        lambda leaf: leaf, observation_at(never, jnp.int32(short), jnp.int32(6), past=12)
    )
    other = history_from_observation(world, observation)
    kernel = pack_stays(world)
    np.testing.assert_allclose(
        encode_past(kernel, history.memory), encode_past(kernel, other.memory), atol=1e-5
    )
    for name in ("value", "age", "measured", "before", "sums"):
        np.testing.assert_allclose(
            getattr(history.memory, name), getattr(other.memory, name), atol=1e-5, err_msg=name
        )


def test_episodes_end_as_the_hazards_say(world, stays):
    """Drawn endings have the mortality that rollouts compute as an expectation."""
    few = stays.select(np.arange(3))
    env = SepsisEnv.learned(world, few, outcome="sampled")
    plan, episodes = jnp.int32(8), 1500

    @jax.jit
    def play(key):
        state, timestep = env.reset(key, jnp.int32(0))

        def step(carry, _):
            state, timestep = carry
            state, timestep = env.step(state, plan)
            return (state, timestep), timestep.reward

        (_, timestep), rewards = jax.lax.scan(step, (state, timestep), None, length=STEPS)
        return rewards, timestep.terminated, state.last.info.mortality

    rewards, terminated, _ = jax.vmap(play)(jax.random.split(jax.random.key(2), episodes))
    assert terminated.all()
    died = np.asarray((rewards <= -14.9).any(1), float)
    start = start_history(world, few.select(np.arange(1)), 0)
    expected = rollout(
        world, jax.random.key(9), start, np.full((1, STEPS), 8), samples=600
    ).mortality.mean()
    assert abs(died.mean() - expected) < 4 * 0.5 / np.sqrt(episodes)


def play_record(world, stays, actions, **settings):
    """Every stay [N] under actions [N, T]: the first time steps, and those after each action."""
    env = SepsisEnv.learned(world, stays, **settings)

    @jax.jit
    def play(stay, plan):
        state, first = env.reset(jax.random.key(3), stay)
        return first, jax.lax.scan(env.step, state, plan)[1]

    return jax.vmap(play)(jnp.arange(len(actions)), jnp.asarray(actions))


def test_the_recorded_treatments_give_the_record(ensemble, stays):
    first, got = play_record(ensemble, stays, stays.action, follow_record=True)
    length = np.asarray(stays.length)
    for stay in range(12):
        parts = (first.observation.dynamic[stay][None], got.observation.dynamic[stay])
        rows = np.concatenate(parts)[: length[stay]]
        np.testing.assert_allclose(rows, stays.dynamic[stay, : length[stay]], rtol=1e-3, atol=2e-3)
        assert int(np.argmax(got.terminated[stay])) == length[stay] - 1
    ends = np.asarray(got.reward)[np.arange(12), length - 1]
    np.testing.assert_array_equal(ends, np.where(stays.died_90d, -15.0, 15.0))


def test_from_the_first_difference_on_the_model_plays(ensemble, stays):
    """As from an environment that starts in that row, whose memory is read anew."""
    changed = 2
    long = np.flatnonzero(np.asarray(stays.length) > changed + 2)
    some = stays.select(long)
    plans = np.array(some.action)
    plans[:, changed] = (plans[:, changed] + 1) % 25
    _, got = play_record(ensemble, some, plans, follow_record=True)
    _, want = play_record(ensemble, some, plans[:, changed:], start_step=changed)
    compared = 0
    for stay in range(len(long)):
        ended = np.asarray(want.terminated[stay])
        steps = int(np.argmax(ended)) + 1 if ended.any() else len(ended)
        for name in ("reward", "terminated"):
            np.testing.assert_allclose(
                np.asarray(getattr(got, name)[stay, changed : changed + steps], float),
                np.asarray(getattr(want, name)[stay, :steps], float), rtol=1e-4, atol=1e-3,
            )  # fmt: skip
        np.testing.assert_allclose(
            got.observation.dynamic[stay, changed : changed + steps],
            want.observation.dynamic[stay, :steps], rtol=1e-4, atol=1e-3,
        )  # fmt: skip
        compared += steps
    assert compared > 10


def test_errors_say_what_to_do(world, stays, ensemble):
    start = start_history(world, stays.select(np.arange(2)), 0)
    with pytest.raises(InputError, match="no reference mode"):
        rollout(world, jax.random.key(0), start, np.zeros((1, 2), int), mode="reference")
    with pytest.raises(InputError, match="reads whole stays"):
        world.transition(*start.window(6))
    with pytest.raises(InputError, match="no reference mode"):
        SepsisEnv.learned(world, stays, mode="reference")
    with pytest.raises(InputError, match="outside 0 to 24"):
        rollout(world, jax.random.key(0), start, np.full((1, 2), -2))


def test_a_saved_model_comes_back(ensemble, tmp_path):
    loaded = load_world_model(save_world_model(ensemble, tmp_path / "model"))
    jax.tree.map(np.testing.assert_array_equal, loaded, ensemble)
    assert loaded.stay_steps == STEPS


def test_ages_count_from_the_last_measurement():
    measured = np.zeros((1, 4, 39), bool)
    measured[0, 1, 0] = True
    np.testing.assert_array_equal(ages(measured)[0, :, 0], [np.inf, 0, 1, 2])


def test_the_propensity_gets_no_gradient_from_the_values(world, stays):
    rows = to_stay_rows(stays, world.scaler, world.dose_edges)
    index = np.stack([np.arange(12), np.zeros(12, int)], axis=1)

    def values_only(models):
        state_model, _ = models
        hidden = state_model.encode(rows.inputs)
        residual = residual_code(state_model.propensity(hidden, rows.inputs), rows.action)
        return state_model.predict(hidden, rows.inputs, rows.obs, residual).mu.sum()

    gradient, _ = jax.grad(values_only)(member_of(world))
    np.testing.assert_array_equal(gradient.choice.kernel[...], 0.0)
    whole, _ = jax.grad(lambda models: recurrent_loss(models, rows, index, None))(member_of(world))
    assert np.abs(whole.choice.kernel[...]).max() > 0


def test_weights_tell_what_habit_explains_from_what_the_history_explains():
    """Three rows by hand: nothing before the first, then 0.9 and 0.9 squared of the ratios."""
    chosen = jnp.array([[1.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
    habitual = jnp.array([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    valid = jnp.array([[True, True, True], [True, True, False]])
    log_weight = np.array([[0.0, -0.9, 0.9 * (-0.9 + 2.0)], [0.0, 0.0, 0.0]])
    weight = np.exp(log_weight)
    weight /= weight[np.asarray(valid)].mean()
    found = np.asarray(history_weights(chosen, habitual, valid))
    assert found == pytest.approx(weight, rel=1e-6)
    bounded = history_weights(jnp.full((1, 9), 9.0), jnp.zeros((1, 9)), jnp.ones((1, 9), bool))
    assert float(bounded.max() / bounded.min()) == pytest.approx(np.exp(2.0), rel=1e-5)


def test_weights_take_the_confounding_of_past_treatments_away():
    """The sick are treated more; under the weights the treated are no sicker than the others."""
    rng = np.random.default_rng(0)
    sick = rng.random((20_000, 1)) < 0.5
    given = rng.random((20_000, 3)) < np.where(sick, 0.7, 0.3)
    chosen = -np.log(np.where(given == sick, 0.7, 0.3))
    habitual = np.full(chosen.shape, -np.log(0.5))
    weight = np.asarray(history_weights(chosen, habitual, np.ones(chosen.shape, bool)))
    assert weight[:, 0] == pytest.approx(weight[0, 0])

    def more_sick(row, weight):
        treated = given[:, row - 1]
        shares = [np.average(sick[:, 0], weights=weight * of) for of in (treated, ~treated)]
        return shares[0] - shares[1]

    assert more_sick(1, np.ones(len(sick))) == pytest.approx(0.4, abs=0.02)
    assert abs(more_sick(1, weight[:, 1])) < 0.06
