"""The quirks of the published inference, each against what is calculated by hand."""

import asyncio
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.agent.dialogue import DECISION, STAY, DialogueConfig
from policy.agent.env_pool import EnvPool, reset_batch
from policy.agent.forecast import ForecastConfig
from policy.agent.prompts import Chart, Prompts, options
from policy.agent.reference import Quirks, learned_env, make_forecaster
from policy.agent.tools import SCHEMAS, load_schemas
from policy.serving.backend import Sampling
from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.windows import encode_action
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler
from worldmodel.simulate.randomness import branch_key, state_noise
from worldmodel.synthetic import patient_keys

KEY = jax.random.key(2)
EPISODES = toy_episodes(8, 9)
LENGTHS = np.asarray(EPISODES.length)
STAY_LONG = 0  # of nine rows
NONE = Quirks().of_mode("corrected")


def only(**switches):
    return Quirks(**switches).of_mode("corrected")


@pytest.fixture(scope="module")
def world():
    scaler = Scaler.fit(EPISODES, split=None)
    config = ModelConfig(variant="reference", hidden=8, layers=1, embed=4, head=4)
    return init_world_model(jax.random.key(1), scaler, config)


def make_pool(world, quirks, config=None, follow_record=True):
    config = quirks.forecast(config or ForecastConfig(samples=4))
    forecaster = make_forecaster(quirks, world, KEY, config)
    env = learned_env(world, EPISODES, quirks, follow_record=follow_record)
    stays = np.arange(EPISODES.num_stays, dtype=np.int32)
    batch = reset_batch(env, patient_keys(KEY, stays), stays, stays=stays)
    return EnvPool(env, batch, forecaster)


def recorded(stay, row):
    return int(EPISODES.action[stay, row])


def other(action):
    return (action + 7) % 25


async def give(pool, actions, slot=STAY_LONG):
    """Prescribes one action after the other; the last time step."""
    for action in actions:
        after = await pool.prescribe(slot, action)
    return after


def history(pool, slot=STAY_LONG):
    """What was given, and what the world model reads of it: actions of the last 12 rows."""
    state = jax.tree.map(lambda leaf: leaf[slot], pool._states.dynamics)
    read = pool._env.dynamics.read_history(state)
    return state.history.action[0].tolist(), read.action[0].tolist()


def test_the_action_window_lags_on_the_recorded_path(world):
    pool = make_pool(world, only(lagged_actions=True))
    a = [recorded(STAY_LONG, row) for row in range(4)]
    given = [*a[:3], other(a[3]), 11]
    assert len(set(a)) > 2

    asyncio.run(give(pool, given[:3]))
    # Rows 0 to 2 were followed: row 0 has no action before it. Row 3 is still open.
    assert history(pool) == ([-1] * 8 + [*a[:3], -1], [-1] * 8 + [0, a[0], a[1], -1])
    asyncio.run(give(pool, given[3:4]))
    # The first other treatment takes its place, since the world model was asked with it.
    assert history(pool)[1] == [-1] * 7 + [0, a[0], a[1], given[3], -1]
    asyncio.run(give(pool, given[4:]))
    assert history(pool) == (
        [-1] * 6 + [*given, -1],
        [-1] * 6 + [0, a[0], a[1], given[3], given[4], -1],
    )
    plain = make_pool(world, NONE)
    asyncio.run(give(plain, given))
    assert history(plain) == ([-1] * 6 + [*given, -1],) * 2


@pytest.mark.parametrize("lagged", [True, False])
def test_the_next_row_is_drawn_from_the_lagged_window(world, lagged):
    pool = make_pool(world, only(lagged_actions=lagged, published_scores=True))
    a = [recorded(STAY_LONG, row) for row in range(3)]
    asyncio.run(give(pool, a))
    chosen = other(recorded(STAY_LONG, 3))
    found = asyncio.run(give(pool, [chosen]))
    # By hand: rows 0 to 3 in a window of six, whose first two rows are empty.
    scaler, stay = world.scaler, STAY_LONG
    obs = np.zeros((1, 6, 39), np.float32)
    obs[0, 2:] = scaler.normalize(EPISODES.dynamic[stay, :4])
    mask = np.zeros((1, 6, 38), np.float32)
    mask[0, 2:] = EPISODES.measured[stay, :4]
    slots = [0, a[0], a[1], chosen] if lagged else [*a, chosen]
    action = encode_action(jnp.array([[-1, -1, *slots]]))
    static = scaler.normalize_static(EPISODES.static[stay])[None]
    told = world.transition(jnp.asarray(obs), jnp.asarray(mask), static, action)
    keys = patient_keys(KEY, np.arange(8, dtype=np.int32))
    stay_id = EPISODES.stay_id[stay]
    noise = state_noise(branch_key(keys[stay], stay_id, jnp.int32(3), jnp.int32(0)))
    row = scaler.denormalize(told.mu[0] + jnp.exp(told.log_sigma[0]) * noise)
    np.testing.assert_allclose(found.observation.dynamic, row, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("lagged", [True, False])
def test_simulations_read_the_lagged_window(world, lagged):
    """One noisy future of the pool is that of the same history by hand."""
    quirks = only(lagged_actions=lagged, single_future=True)
    pool = make_pool(world, quirks)
    a = [recorded(STAY_LONG, row) for row in range(3)]
    asyncio.run(give(pool, a))
    found = asyncio.run(pool.simulate(STAY_LONG, (13,)))
    # The same with a history that was given these actions, all of them other than the record's.
    plain = make_pool(world, only(single_future=True))
    asyncio.run(give(plain, a))
    state = plain._states
    slots = [0, a[0], a[1]] if lagged else a
    vasopressor, fluid = schema.action_levels(np.array([*slots, 0]))
    past = state.last.observation.past
    past = past.replace(
        vasopressor=past.vasopressor.at[STAY_LONG, -4:].set(vasopressor),
        fluid=past.fluid.at[STAY_LONG, -4:].set(fluid),
    )
    last = state.last.replace(observation=state.last.observation.replace(past=past))
    plain._states = state.replace(last=last)
    want = asyncio.run(plain.simulate(STAY_LONG, (13,)))
    np.testing.assert_allclose(found.mean, want.mean, rtol=1e-4, atol=1e-4)


def test_the_recorded_treatment_is_answered_with_the_record(world):
    pool, plain = make_pool(world, only(recorded_forecast=True)), make_pool(world, NONE)
    a = [recorded(STAY_LONG, row) for row in range(9)]

    def both(actions):
        return [asyncio.run(one.simulate(STAY_LONG, actions)) for one in (pool, plain)]

    for row in range(3):
        told, free = both((other(a[row]), a[row]))
        want = EPISODES.dynamic[STAY_LONG, row + 1]
        for values in (told.mean, told.low, told.high):
            np.testing.assert_allclose(values[1], want, rtol=1e-3, atol=2e-3)
        assert told.ventilation[1] == float(EPISODES.ventilated[STAY_LONG, row + 1])
        assert np.abs(free.mean[1] - want).max() > 0.1
        np.testing.assert_array_equal(told.mean[0], free.mean[0])  # no other treatment is told
        for one in (pool, plain):
            asyncio.run(give(one, [a[row]]))
    for one in (pool, plain):
        asyncio.run(give(one, [other(a[3])]))
    told, free = both((a[4],))  # the record was left
    np.testing.assert_array_equal(told.mean, free.mean)


def test_the_last_row_has_no_next_one(world):
    pool, plain = make_pool(world, only(recorded_forecast=True)), make_pool(world, NONE)
    stay = int(np.argmin(LENGTHS))
    a = [recorded(stay, row) for row in range(LENGTHS[stay])]
    answers = []
    for one in (pool, plain):
        asyncio.run(give(one, a[:-1], stay))
        answers.append(asyncio.run(one.simulate(stay, (a[-1],))))
    np.testing.assert_array_equal(answers[0].mean, answers[1].mean)


def test_a_single_future_is_drawn_anew_at_every_call(world):
    pool = make_pool(world, only(single_future=True))
    first, second = (asyncio.run(pool.simulate(1, (3, 3))) for _ in range(2))
    np.testing.assert_array_equal(first.mean, first.low)
    np.testing.assert_array_equal(first.mean, first.high)
    assert np.abs(first.mean - second.mean).max() > 0.1
    assert np.abs(first.mean[0] - first.mean[1]).max() > 0.1  # of the same treatment, twice
    again = make_pool(world, only(single_future=True))
    np.testing.assert_array_equal(asyncio.run(again.simulate(1, (3, 3))).mean, first.mean)
    steady = make_pool(world, NONE)
    one, other_ = (asyncio.run(steady.simulate(1, (3,))) for _ in range(2))
    np.testing.assert_array_equal(one.mean, other_.mean)
    assert (one.low < one.high).any()


@pytest.mark.parametrize("threshold", [True, False])
def test_the_terminal_reward_of_a_mortality(world, threshold):
    pool = make_pool(world, only(threshold_outcome=threshold))
    ends = []
    for stay in range(EPISODES.num_stays):
        plan = [other(recorded(stay, row)) for row in range(LENGTHS[stay])]
        ends.append(asyncio.run(give(pool, plan, stay)))
    mortality = np.array([float(end.info.mortality) for end in ends])
    want = np.where(mortality > 0.5, -15.0, 15.0) if threshold else 15.0 * (1 - 2 * mortality)
    np.testing.assert_allclose([float(end.reward) for end in ends], want, rtol=1e-4, atol=1e-4)
    assert all(bool(end.terminated) for end in ends)
    assert ((mortality > 0.02) & (mortality < 0.98)).all()


def test_published_scores_are_those_of_the_record_and_of_levels(world):
    pool, plain = make_pool(world, only(published_scores=True)), make_pool(world, NONE)
    a = recorded(STAY_LONG, 0)
    told, scored = (asyncio.run(give(one, [a])) for one in (pool, plain))
    assert float(told.observation.sofa) == float(EPISODES.sofa[STAY_LONG, 1])
    assert float(told.observation.sofa) != float(scored.observation.sofa)
    # Vasopressor level 4 alone scores four points, whatever dose the level stands for.
    level, dose = (asyncio.run(give(one, [20])) for one in (pool, plain))
    assert float(level.observation.sofa) >= 4
    assert float(level.observation.sofa) != float(dose.observation.sofa)


def test_the_preset_sets_all_of_them_and_each_can_be_taken_back():
    names = list(vars(Quirks()))
    assert vars(Quirks().of_mode("reference")) == dict.fromkeys(names, True)
    assert vars(NONE) == dict.fromkeys(names, False)
    for name in names:
        assert vars(Quirks(**{name: False}).of_mode("reference")) == {
            other: other != name for other in names
        }
    asked = DialogueConfig(memory=DECISION, sampling=Sampling(0.1, 0.2, 3))
    assert NONE.dialogue(asked) == asked
    assert only(long_replies=True).dialogue(asked) == DialogueConfig(
        memory=DECISION, sampling=Sampling(0.7, 0.95, 8192)
    )
    assert only(whole_stay=True).dialogue(asked).memory == STAY
    assert NONE.forecast(ForecastConfig()) == ForecastConfig()


def test_the_synthetic_world_has_no_record(env, forecaster, world_model):
    quirks = only(recorded_forecast=True)
    patients = np.arange(8, dtype=np.int32)
    batch = reset_batch(env, patient_keys(KEY, patients), patients)
    asked = make_forecaster(quirks, world_model, KEY, ForecastConfig(samples=8))
    with pytest.raises(InputError, match="recorded stays"):
        asyncio.run(EnvPool(env, batch, asked).simulate(0, (1,)))


TEMPLATES = {
    "first": "{{ chart.values('inr')|tojson }} {{ feature_names|length }} {{ units['meanbp'] }}",
    "simulation": "{% for o in options %}{{ o.values['gcs_motor'] }}|{% endfor %}",
    "prescription": "{{ chart.values('meanbp')[-1] }}",
    "error": "{{ message }}",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in TEMPLATES.items():
        (tmp_path / f"{name}.md.j2").write_text(text)
    return tmp_path


def test_templates_see_all_numbers_as_they_are(world, folder):
    pool = make_pool(world, NONE)
    chart = Chart.of(pool.initial(STAY_LONG))
    asyncio.run(pool.prescribe(STAY_LONG, 0))
    prompts = Prompts(folder)
    text = prompts.first(chart, can_simulate=True)[0]["content"]
    inr = float(chart.dynamic[0][schema.INDEX["inr"]])
    assert text == f"{json.dumps([inr])} 39 mmHg" and f"{inr:.4f}" in text.replace("]", "0")[:9]
    forecast = asyncio.run(pool.simulate(STAY_LONG, (3, 4)))
    motor = forecast.mean[:, schema.INDEX["gcs_motor"]]
    want = "".join(f"{float(value)}|" for value in motor)
    assert prompts.simulation(options((3, 4), forecast)) == want
    assert set(options((3,), forecast)[0].values) == set(schema.FEATURE_NAMES)


def test_tools_are_told_as_a_file_has_them(folder):
    tools = [
        {"type": "function", "function": {"parameters": one["function"]["parameters"],
         "name": one["function"]["name"], "description": "As published."}}
        for one in reversed(SCHEMAS)
    ]  # fmt: skip
    assert list(Prompts(folder).tools(True)) == list(SCHEMAS)
    (folder / "tools.json").write_text(json.dumps(tools))
    told = Prompts(folder).tools(True)
    assert json.dumps(list(told)) == json.dumps(tools)  # order of tools and of their members
    assert [tool["function"]["name"] for tool in Prompts(folder).tools(False)] == ["prescription"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda tools: tools[:1],
        lambda tools: [*tools, tools[0]],
        lambda tools: {"tools": tools},
        lambda tools: [json.loads(json.dumps(tools).replace("iv_fluid", "fluid"))[1], tools[0]],
        lambda tools: [{"name": "simulation"}, tools[1]],
    ],
)
def test_tools_that_calls_would_not_fit_are_refused(tmp_path, damage):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(damage(list(SCHEMAS))))
    with pytest.raises(InputError, match=r"tools\.json"):
        load_schemas(path)
    path.write_text("[")
    with pytest.raises(InputError, match=r"tools\.json"):
        load_schemas(path)
