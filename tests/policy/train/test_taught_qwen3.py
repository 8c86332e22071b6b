"""Demonstrations, and the tiny model that learns them."""

import asyncio
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.agent.dialogue import COMPLETED, DialogueConfig, treat_all
from policy.agent.env_pool import EnvPool
from policy.agent.prompts import Prompts
from policy.agent.tools import Prescribe, Simulate, read_call
from policy.serving.backend import Sampling
from policy.serving.embedded import EmbeddedGenerator
from policy.serving.tokens import ChatTokens, TokenBackend
from policy.simple import GuidelineRules, RandomPolicy
from policy.testing.taught_qwen3 import PLAIN, TEMPLATES, tiny_runner
from policy.train.data.packing import as_read, written
from policy.train.episodes import DemonstrationConfig, demonstrate, neighbours
from worldmodel import schema, struct
from worldmodel.errors import InputError

DECISIONS, PATIENTS = 3, 8


@pytest.fixture(scope="module")
def runner():
    return tiny_runner(max_steps=DECISIONS)


def treated(runner, folder, temperature):
    """Stays of fresh patients under a model in this process."""
    batch = runner.replace(seed=1234).reset_batch(range(PATIENTS))
    pool = EnvPool(runner.env, batch, runner.forecaster)
    backend = TokenBackend(EmbeddedGenerator.from_folder(folder), ChatTokens.load(folder))
    sampling = Sampling(temperature=temperature, max_completion_length=64)
    stays = []

    async def run():
        await treat_all(
            batch.patients.tolist(),
            backend,
            pool,
            Prompts(TEMPLATES),
            DialogueConfig(sampling=sampling),
            seeds=[7] * PATIENTS,
            concurrency=PATIENTS,
            finished=stays.append,
        )
        await backend.close()

    asyncio.run(run())
    pool.close()
    return stays


def test_taught_replies_are_valid_calls(runner, taught):
    path, reports = taught
    assert reports[-1].loss < 0.25 < 3 < reports[0].loss
    stays = treated(runner, path, temperature=0.7)
    assert [stay.status for stay in stays] == [COMPLETED] * PATIENTS
    turns = sum(len(stay.turns) for stay in stays)
    invalid = sum(sum(stay.invalid.values()) for stay in stays)
    print(f"{invalid} of {turns} replies refused")
    assert invalid <= 0.05 * turns
    simulated = sum(decision.simulations for stay in stays for decision in stay.decisions)
    assert simulated >= 0.9 * sum(len(stay.decisions) for stay in stays)
    for stay in stays:
        (dialogue,) = as_read(stay)
        assert len(dialogue.ends()) == len(stay.turns)


def test_a_demonstrator_follows_its_policy(runner):
    policy = GuidelineRules()
    stays = runner.replace(seed=1).demonstrate(policy, range(PATIENTS), PLAIN)
    batch = runner.replace(seed=1).reset_batch(range(PATIENTS))
    observations = batch.states.last.observation
    first = jax.vmap(policy, (None, 0))(jax.random.key(0), observations).argmax(-1)
    assert [stay.decisions[0].action for stay in stays] == first[:PATIENTS].tolist()
    for stay in stays:
        assert not stay.invalid
        calls = [read_call(turn.reply.tool_calls[0]) for turn in stay.turns]
        for asked, given in zip(calls[::2], calls[1::2], strict=True):
            assert isinstance(asked, Simulate) and isinstance(given, Prescribe)
            assert len(set(asked.actions)) == 3
            assert set(asked.actions) - set(neighbours(given.action)) == {given.action}


def test_the_place_of_an_option_does_not_tell_the_choice(runner):
    how = replace(PLAIN, shuffle=True)
    stays = runner.replace(seed=2).demonstrate(RandomPolicy(), range(32), how)
    places = np.zeros(3)
    for stay in stays:
        calls = [read_call(turn.reply.tool_calls[0]) for turn in stay.turns]
        for asked, given in zip(calls[::2], calls[1::2], strict=True):
            places[asked.actions.index(given.action)] += 1
    count = places.sum()
    assert count > 80 and (np.abs(places / count - 1 / 3) < 4 * np.sqrt(2 / 9 / count)).all()


def test_demonstrations_err_go_on_and_do_without_the_simulator(runner):
    """None of it changes what the policy does."""
    how = DemonstrationConfig(second_round=0.5, without_simulator=0.25, exploration=0.0, errors=0.3)
    plain, stays = (
        runner.replace(seed=1).demonstrate(GuidelineRules(), range(PATIENTS), how)
        for how in (PLAIN, how)
    )
    assert [stay.can_simulate for stay in stays] == [True] * 6 + [False] * 2
    by_patient = {stay.patient: stay for stay in stays}
    assert sum(sum(stay.invalid.values()) for stay in stays) >= 5
    rounds = [d.simulations for stay in stays[:6] for d in stay.decisions]
    assert {*rounds} == {1, 2}
    for one in plain:
        stay = by_patient[one.patient]
        assert [d.action for d in stay.decisions] == [d.action for d in one.decisions]
        assert max(d.invalid for d in stay.decisions) <= 1
        assert sum(turn.refused for turn in stay.turns) == sum(stay.invalid.values())
        if not stay.can_simulate:
            assert not any(d.simulations for d in stay.decisions)


def test_exploration_changes_what_is_given_and_not_what_is_wanted(runner):
    how = replace(PLAIN, exploration=0.5)
    policy = GuidelineRules()
    stays = runner.replace(seed=2).demonstrate(policy, range(32), how)
    decisions = [decision for stay in stays for decision in stay.decisions]
    wanted = np.array([np.argmax(decision.values) for decision in decisions])
    given = np.array([decision.action for decision in decisions])
    assert abs((given != wanted).mean() - 0.5 * 24 / 25) < 4 * np.sqrt(0.25 / len(given))
    for stay in stays:
        for number, decision in enumerate(stay.decisions):
            simulated = read_call(stay.turns[2 * number].reply.tool_calls[0])
            assert int(np.argmax(decision.values)) in simulated.actions


def test_later_decisions_follow_the_newest_view(runner):
    """Where MAP was low under the rules, the vasopressor went up one level at the next row."""
    stays = runner.replace(seed=1).demonstrate(GuidelineRules(), range(PATIENTS), PLAIN)
    for stay in stays:
        for decision in stay.decisions[1:]:
            raised = decision.action // schema.NUM_LEVELS - decision.previous_vasopressor
            low = decision.meanbp < 65 and decision.previous_vasopressor < 4
            assert raised == (1 if low else -min(1, decision.previous_vasopressor)
                              if decision.meanbp > 75 else 0)  # fmt: skip


def test_equal_seeds_equal_stays(runner):
    others = runner.replace(seed=3)
    one, two = (others.demonstrate(RandomPolicy(), range(PATIENTS)) for _ in range(2))
    said = [[turn.reply.tool_calls[0].arguments for turn in stay.turns] for stay in one]
    assert said == [[turn.reply.tool_calls[0].arguments for turn in stay.turns] for stay in two]
    assert said[0] != said[1]
    assert json.loads(said[0][0])["actions"]


def test_neighbours():
    assert sorted(neighbours(0)) == [1, 5]
    assert sorted(neighbours(12)) == [7, 11, 13, 17]
    assert all(np.isin(neighbours(action), range(25)).all() for action in range(25))


@struct.dataclass
class Backwards(GuidelineRules):
    """Gives what was given in the oldest of three rows."""

    past = 3

    def __call__(self, key, observation):
        assert observation.past.vasopressor.shape == (3,)
        action = schema.action_index(observation.past.vasopressor[0], observation.past.fluid[0])
        return jax.nn.one_hot(jnp.where(observation.step == 0, 7, action), 25)


def test_a_demonstrator_may_look_back(runner):
    for stay in runner.replace(seed=1).demonstrate(Backwards(), range(PATIENTS), PLAIN):
        assert [decision.action for decision in stay.decisions] == [7, 0, 7][: len(stay.decisions)]


def test_a_demonstrator_cannot_look_farther_than_the_world(runner):
    class Farther(Backwards):
        past = 13

    with pytest.raises(InputError, match="looks back on 13 rows"):
        runner.replace(seed=1).demonstrate(Farther(), range(PATIENTS))


def test_conversations_of_a_decision_begin_with_the_chart(runner, tokens):
    """With the memory of a decision nothing said before is in the context."""
    short, whole = (
        demonstrate(
            GuidelineRules(),
            runner.env,
            runner.replace(seed=1).reset_batch(range(PATIENTS)),
            runner.forecaster,
            Prompts(TEMPLATES),
            DialogueConfig(memory=memory),
            seed=1,
            how=PLAIN,
        )
        for memory in ("decision", "stay")
    )
    for one, other in zip(short, whole, strict=True):
        assert [d.action for d in one.decisions] == [d.action for d in other.decisions]
        assert [turn.opens for turn in one.turns] == [True, False] * len(one.decisions)
        assert [turn.opens for turn in other.turns] == [True] + [False] * (len(one.turns) - 1)
        conversations = written(one, tokens)
        assert len(conversations) == len(one.decisions)
        assert len(written(other, tokens)) == 1
        (first,) = one.turns[2].messages if len(one.turns) > 2 else one.turns[0].messages
        assert first["role"] == "user" and "Charlson" in first["content"]
        assert f"t {len(one.turns) > 2:d} MAP" in first["content"]
