"""Environments for TRL give what our own runner gives, and TRL's trainer learns in them."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from policy.agent.dialogue import COMPLETED, FAILED, DialogueConfig
from policy.agent.forecast import ForecastConfig, Forecaster
from policy.agent.scripted import ScriptedBackend, prescribe, simulate, was_simulated
from policy.agent.tools import (
    PRESCRIPTION,
    SCHEMAS,
    SIMULATION,
    InvalidCallError,
    prescription_arguments,
    simulation_arguments,
)
from policy.serving.tokens import write_call
from policy.testing.taught_qwen3 import tiny_runner
from policy.testing.tiny_qwen3 import make_tiny
from policy.train.rl.advantages import AdvantageConfig, rewards
from policy.train.trl import PrescriptionEnvironment, ToolEnvironments, TreatmentEnvironment
from worldmodel import schema
from worldmodel.errors import InputError

PATIENTS = (0, 1, 1, 11)  # 11 is of another block
OPTIONS = (24, 3, 0)


def action_at(index, step):
    """What the stay of an index is given in a step; it differs between stays of a patient."""
    return (7 * index + 5 * step + 3) % schema.NUM_ACTIONS


@pytest.fixture(scope="module")
def runner():
    return tiny_runner(max_steps=3, seed=4)


def own_stays(runner, patients):
    """Stays of our own runner, which simulates and prescribes in every step."""
    begun: dict[int, int] = {}  # dialogues by the identity of their first message

    def script(messages, seed):
        index = begun.setdefault(id(messages[0]), len(begun))
        if not was_simulated(messages):
            return simulate(messages, OPTIONS)
        step = sum(one["role"] == "tool" for one in messages) // 2
        return prescribe(messages, action_at(index, step))

    stays = runner.treat(ScriptedBackend(script), patients, seeds=range(len(patients)))
    return asyncio.run(stays)


def pairs(actions):
    return [json.dumps([int(level) for level in schema.action_levels(a)]) for a in actions]


def told(stay):
    """Answers of tools, in order; the last is the end of the stay."""
    said = [m["content"] for turn in stay.turns for m in turn.messages if m["role"] == "tool"]
    return [*said, stay.closing]


def treated(environments, patients=PATIENTS):
    """Environments after their stays, TRL's way: one call of each after the other; and answers."""
    made = [environments() for _ in patients]
    firsts = [one.reset(**row) for one, row in zip(made, environments.rows(patients), strict=True)]
    answers = [[] for _ in made]
    for step in range(3):
        for one, said in zip(made, answers, strict=True):
            said.append(one.simulation(pairs(OPTIONS)))
        for index, (one, said) in enumerate(zip(made, answers, strict=True)):
            levels = schema.action_levels(action_at(index, step))
            said.append(one.prescription(*map(int, levels)))
    return made, firsts, answers


def test_the_stay_is_that_of_our_own_runner_in_one_call_per_round(runner):
    environments = ToolEnvironments(runner)
    made, firsts, answers = treated(environments)
    own = own_stays(runner, PATIENTS)
    # Three rounds of simulations and three of prescriptions, whatever the number of patients.
    assert dict(environments.pool.calls) == {"simulate": 3, "prescribe": 3}
    for one, first, said, stay in zip(made, firsts, answers, own, strict=True):
        assert first == stay.turns[0].messages[-1]["content"]
        assert said == told(stay)
        assert one.stay.status == stay.status == COMPLETED
        found, want = (
            [replace(decision, turn=0) for decision in s.decisions] for s in (one.stay, stay)
        )
        for a, b in zip(found, want, strict=True):
            assert (a.action, a.step, a.simulations) == (b.action, b.step, b.simulations)
            assert a.reward == pytest.approx(b.reward, abs=1e-5)
        assert one.get_reward() == pytest.approx(stay.total_reward, abs=1e-4)
    assert len({one.get_reward() for one in made}) == len(made)
    # A second batch in the same environments is a fresh one.
    again = [one.reset(**row) for one, row in zip(made, environments.rows(PATIENTS), strict=True)]
    assert again == firsts and not made[0].stay.decisions


def test_what_is_refused_costs_what_it_costs_in_our_own_trainer(runner):
    penalties = AdvantageConfig(refusal=-0.5, failure=-7.0)
    limited = replace(runner, dialogue=DialogueConfig(max_simulations=1, max_invalid=2))
    one = ToolEnvironments(limited, penalties)()
    with pytest.raises(InputError, match="reset"):
        one.prescription(0, 0)
    with pytest.raises(InputError, match="patient"):
        one.reset()
    one.reset(patient=3)
    one.simulation(pairs([4]))
    for call, reason in (
        (lambda: one.simulation(pairs([4])), "no more simulations"),
        (lambda: one.prescription(5, 0), "levels go from 0 to 4"),
    ):
        with pytest.raises(InvalidCallError, match=reason):
            call()
    one.prescription(1, 2)
    assert one.get_reward() == pytest.approx(one.stay.total_reward - 2 * 0.5 - 7.0)
    assert one.get_reward() == pytest.approx(rewards(one.stay, penalties).sum())
    for _ in range(2):
        one.prescription(1, 2)
    assert one.stay.status == COMPLETED
    done = one.get_reward()
    assert done == pytest.approx(one.stay.total_reward - 2 * 0.5)
    with pytest.raises(InvalidCallError, match="the stay is over"):
        one.prescription(1, 2)
    assert one.get_reward() == done
    # One refusal too many fails a stay, which then takes no more calls.
    one.reset(patient=3)
    for bad in ("1, 2", [], [[1, 2]]):
        with pytest.raises(InvalidCallError):
            one.simulation(bad)
    assert (one.stay.status, one.stay.failure) == (FAILED, "too_many_invalid")
    with pytest.raises(InvalidCallError, match="the stay is over"):
        one.prescription(1, 2)
    assert one.get_reward() == pytest.approx(-7.0 - 3 * 0.5)


def test_fresh_forecasts_are_asked_for_one_by_one(runner):
    config = ForecastConfig(samples=2, fresh=True)
    forecaster = Forecaster(runner.forecaster._world_model, runner.forecaster._key, config)
    environments = ToolEnvironments(replace(runner, forecaster=forecaster))
    one = environments()
    one.reset(patient=0)
    assert one.simulation(pairs([6])) != one.simulation(pairs([6]))
    assert environments.pool.calls["simulate"] == 2


def test_without_a_simulator_there_is_one_tool(runner):
    assert type(ToolEnvironments(replace(runner, forecaster=None))()) is PrescriptionEnvironment
    assert not hasattr(PrescriptionEnvironment, "simulation")


def test_the_model_is_told_of_the_tools_as_ever():
    """But for bounds and patterns, which annotations of Python cannot say."""
    pytest.importorskip("torch")
    from transformers.utils import get_json_schema

    for tool in SCHEMAS:
        want = tool["function"]
        found = get_json_schema(getattr(TreatmentEnvironment, want["name"]))["function"]
        assert found["description"] == want["description"]
        properties = {name: one["type"] for name, one in want["parameters"]["properties"].items()}
        told = {name: one["type"] for name, one in found["parameters"]["properties"].items()}
        assert told == properties
        assert found["parameters"]["required"] == want["parameters"]["required"]


def test_a_pool_grows_and_answers_in_blocks(runner):
    environments = ToolEnvironments(replace(runner, concurrency=4))
    made = [environments() for _ in range(11)]
    for number, one in enumerate(made):
        one.reset(patient=number)
    for one in made:
        one.prescription(1, 1)
    assert environments.pool.calls["prescribe"] == 3
    alone = ToolEnvironments(runner)()
    for number, one in enumerate(made):
        alone.reset(patient=number)
        alone.prescription(1, 1)
        assert one.stay.decisions[0].reward == pytest.approx(alone.stay.decisions[0].reward)


@pytest.fixture
def chat(tmp_path):
    """A tiny Qwen3 that knows nothing, and its tokenizer."""
    from transformers import AutoTokenizer

    folder = make_tiny(tmp_path / "tiny", layers=1, brief=True)
    return folder, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parity
def test_grpo_trainer_of_trl_learns_in_it(runner, chat, tmp_path, monkeypatch):
    """Two updates; what a model would say is put into its mouth, the rest is TRL's own."""
    trl = pytest.importorskip("trl", reason="needs trl: the extra `parity`")
    from datasets import Dataset
    from trl.chat_template_utils import qwen3_template

    folder, tokenizer = chat
    tokenizer.response_template = qwen3_template
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    environments = ToolEnvironments(runner)
    trainer = trl.GRPOTrainer(
        str(folder),
        environment_factory=environments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(environments.rows(range(2))),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=4,
            num_generations=2, max_completion_length=2048, learning_rate=1e-3, report_to="none",
            logging_steps=1, use_cpu=True, bf16=False, save_strategy="no", shuffle_dataset=False,
        ),
    )  # fmt: skip
    prompts, rewarded, patients = [], [], []

    def says(text):
        return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]

    def reply(index, stay):
        """Simulates and prescribes until the stay is over, then says so."""
        if stay.status == COMPLETED:
            return "Done."
        step, prescribes = divmod(stay.tool_calls, 2)
        if prescribes:
            return write_call(PRESCRIPTION, prescription_arguments(action_at(index, step)))
        return write_call(SIMULATION, simulation_arguments(OPTIONS))

    def generate(prompt_ids, *_, **__):
        prompts.append(prompt_ids)
        assert len(prompt_ids) == len(stays())  # all end together
        return [says(reply(*one)) for one in enumerate(stays())], None

    def stays():
        return [environment.stay for environment in trainer.environments]

    def calculate_rewards(*given):
        found = own_rewards(*given)
        assert [stay.status for stay in stays()] == [COMPLETED] * 4
        patients.append([stay.patient for stay in stays()])
        rewarded.append(found[:, 0].tolist())
        return found

    own_rewards = trainer._calculate_rewards
    trainer._calculate_rewards = calculate_rewards
    trainer._generate_single_turn = generate
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert any((before[name] != p).any() for name, p in trainer.model.named_parameters())
    # The first chart is in the first prompt, beside the two tools and no other.
    text = tokenizer.decode(prompts[0][0])
    assert "Sepsis, ICU" in text and "prescription(vasopressor, iv_fluid)" in text
    assert "simulation(actions)" in text and "reward" not in text
    # Two batches of four stays, each of three rounds of simulations and of prescriptions.
    assert dict(environments.pool.calls) == {"simulate": 6, "prescribe": 6}
    for numbers, values in zip(patients, rewarded, strict=True):
        assert numbers == [0, 0, 1, 1]
        want = [stay.total_reward for stay in own_stays(runner, numbers)]
        np.testing.assert_allclose(values, want, atol=1e-4)
    logged = [one for one in trainer.state.log_history if "reward" in one]
    assert [one["reward"] for one in logged] == pytest.approx([np.mean(v) for v in rewarded])
    assert all(one["tools/failure_frequency"] == 0 for one in logged)
