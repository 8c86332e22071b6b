"""Questions have the record's answers, show nothing of what came later, and are balanced."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from policy.train.data.qa_prompts import ASKED
from policy.train.data.qa_sampling import OPTIONS, WINDOW, QuestionConfig, as_dialogue, ask
from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.errors import InputError

ALL = QuestionConfig(count=100_000, balanced=False, charts="compact")
FIRST_STAY = 30_000_000


@pytest.fixture(scope="module")
def episodes():
    """Vasopressors are rare, so that some 24 hours are without them."""
    found = jax.tree.map(np.array, toy_episodes(num_stays=40, num_steps=14, seed=1))
    found.vasopressor[np.random.default_rng(0).random(found.vasopressor.shape) < 0.8] = 0
    return found


@pytest.fixture(scope="module")
def questions(episodes):
    return ask(episodes, ALL, seed=0)


def of_kind(questions, kind):
    return [(q, q.stay - FIRST_STAY, q.step) for q in questions if q.kind == kind]


def text(question):
    return question.messages[-1]["content"]


def test_every_kind_is_asked(questions):
    assert set(Counter(q.kind for q in questions)) == set(OPTIONS)
    for q in questions:
        assert [m["role"] for m in q.messages] == ["system", "user"]
        assert q.options == OPTIONS[q.kind]
        assert q.label == (q.options.index(q.answer) if q.options else -1)


def test_the_chart_is_of_the_step(episodes, questions):
    for q in questions:
        stay, step = q.stay - FIRST_STAY, q.step
        given = [
            int(x[stay, step - 1]) if step else 0 for x in (episodes.vasopressor, episodes.fluid)
        ]
        chart = text(q).splitlines()[1]
        assert chart.startswith(f"t {step} MAP {episodes.dynamic[stay, step, 3]:.0f} HR")
        assert chart.endswith(f"SOFA {episodes.sofa[stay, step]:.0f} given {given}")


def test_deaths(episodes, questions):
    found = of_kind(questions, "mortality")
    assert len(found) == episodes.length.sum()
    for q, stay, _ in found:
        assert q.answer == ("yes" if episodes.died_in_hospital[stay] else "no")


def test_vasopressors_of_the_next_day(episodes, questions):
    found = of_kind(questions, "vasopressor")
    for q, stay, step in found:
        given = episodes.vasopressor[stay]
        assert step == 0 or given[step - 1] == 0
        assert step + WINDOW <= episodes.length[stay]
        assert q.answer == ("yes" if given[step : step + WINDOW].max() > 0 else "no")
        assert "within the next 24 hours" in text(q)
    assert {q.answer for q, _, _ in found} == {"yes", "no"}
    places = {(stay, step) for _, stay, step in found}
    expected = {
        (stay, step)
        for stay, length in enumerate(episodes.length)
        for step in range(length - WINDOW + 1)
        if step == 0 or episodes.vasopressor[stay, step - 1] == 0
    }
    assert places == expected


def test_values_of_the_next_row(episodes, questions):
    for q, stay, step in of_kind(questions, "next_state"):
        words = q.answer.split()
        for short, value in zip(words[::2], words[1::2], strict=True):
            (asked,) = [one for one in ASKED if one.short == short]
            column = schema.INDEX[asked.name]
            true = episodes.dynamic[stay, step + 1, column]
            assert value == f"{true:.{schema.FEATURES[column].decimals}f}"
            if column < schema.NUM_MASKED:
                assert episodes.measured[stay, step : step + 2, column].all()
        assert len(words) >= 4 and step + 1 < episodes.length[stay]


def test_trends(episodes, questions):
    found = of_kind(questions, "trend")
    seen = set()
    for q, stay, step in found:
        (asked,) = [one for one in ASKED if f"What does {one.short} do" in text(q)]
        now, after = episodes.dynamic[stay, step : step + 2, schema.INDEX[asked.name]]
        by_hand = "rises" if after > now else "falls"
        if abs(after - now) < asked.steady:
            by_hand = "steady"
        assert q.answer == by_hand
        seen.add(by_hand)
    assert seen == set(OPTIONS["trend"])


def test_effects(episodes, questions):
    for q, stay, step in of_kind(questions, "effect"):
        lines = text(q).splitlines()
        first, second = (line[3:] for line in lines if line[:3] in ("1: ", "2: "))
        true, other = (first, second) if q.answer == "1" else (second, first)
        words = true.split()
        for short, value in zip(words[::2], words[1::2], strict=True):
            (asked,) = [one for one in ASKED if one.short == short]
            column = schema.INDEX[asked.name]
            decimals = schema.FEATURES[column].decimals
            assert value == f"{episodes.dynamic[stay, step + 1, column]:.{decimals}f}"
        assert other != true and other.split()[::2] == words[::2]
        given = episodes.vasopressor[stay, step], episodes.fluid[stay, step]
        assert f"Now [{given[0]}, {given[1]}] is given" in text(q)


@pytest.mark.parametrize("charts", ["compact", "full"])
def test_nothing_of_the_future_is_shown(episodes, charts):
    """Rows after step 4 and all outcomes are changed; questions up to step 4 stay as they are."""
    config = replace(ALL, charts=charts, kinds=("next_state", "trend", "mortality", "vasopressor"))
    other = jax.tree.map(np.array, toy_episodes(num_stays=40, num_steps=14, seed=9))
    now = 4

    def mixed(old, other_values):
        new = old.copy()
        new[:, now + 1 :] = other_values[:, now + 1 :]
        return new

    rows = ("dynamic", "vasopressor", "fluid", "ventilated", "sofa", "urine_24h")
    changed = replace(
        episodes,
        **{name: mixed(getattr(episodes, name), getattr(other, name)) for name in rows},
        died_in_hospital=~episodes.died_in_hospital,
        died_90d=~episodes.died_90d,
    )

    def shown(episodes):
        asked = ask(episodes, config, seed=0)
        return {(q.kind, text(q), q.stay, q.step): q.answer for q in asked if q.step <= now}

    before, after = shown(episodes), shown(changed)
    assert before.keys() == after.keys()
    for kind in config.kinds:
        answers = [(before[key], after[key]) for key in before if key[0] == kind]
        assert any(one != two for one, two in answers), kind  # the changes do matter


def test_the_treatment_asked_about_is_not_in_other_questions(episodes):
    """Nor is what is given in this very step, where it is the answer."""
    config = replace(ALL, kinds=("mortality", "vasopressor"), charts="full")
    changed = replace(episodes, vasopressor=episodes.vasopressor.copy())
    changed.vasopressor[:, 3] = 4
    before = {(q.kind, q.stay): text(q) for q in ask(episodes, config, seed=0) if q.step == 3}
    after = {(q.kind, q.stay): text(q) for q in ask(changed, config, seed=0) if q.step == 3}
    assert before and before == after


def test_balance_and_seeds(episodes):
    config = QuestionConfig(count=30, charts="compact")
    found = ask(episodes, config, seed=3)
    for kind, options in OPTIONS.items():
        answers = Counter(q.answer for q in found if q.kind == kind)
        if options:
            assert set(answers) == set(options)
            assert len(set(answers.values())) == 1 and answers.total() == 30
    assert found == ask(episodes, config, seed=3)
    assert found != ask(episodes, config, seed=4)
    alone = ask(episodes, replace(config, kinds=("effect",)), seed=3)
    assert alone == [q for q in found if q.kind == "effect"]


def test_a_dialogue_is_the_answer_and_its_end(episodes, tokens):
    (question, *_) = ask(episodes, QuestionConfig(count=3, charts="compact"), seed=0)
    dialogue = as_dialogue(question, tokens)
    assert dialogue.ids[:-1][dialogue.own[:-1]].tolist() == tokens.encode(question.answer)
    assert dialogue.own[-1] and dialogue.ids[-1] == tokens.end_id
    prompt = dialogue.ids[~dialogue.own].tolist()
    assert prompt == tokens.first(question.messages, ())
    assert dialogue.ends().tolist() == [len(dialogue)]


def test_records_without_a_kind_are_refused(episodes):
    short = toy_episodes(num_stays=3, num_steps=2)
    with pytest.raises(InputError, match="no question of the kind vasopressor"):
        ask(short, replace(ALL, kinds=("vasopressor",)), seed=0)
    survivors = replace(episodes, died_in_hospital=np.zeros_like(episodes.died_in_hospital))
    mortality = replace(ALL, kinds=("mortality",))
    assert {q.answer for q in ask(survivors, mortality, seed=0)} == {"no"}
    with pytest.raises(InputError, match="kind mortality with the answer yes"):
        ask(survivors, replace(mortality, balanced=True), seed=0)
    with pytest.raises(InputError, match="kinds"):
        QuestionConfig(kinds=("weather",))
