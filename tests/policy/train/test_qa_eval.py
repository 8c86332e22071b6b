"""Evaluation on questions: probabilities of replies, grades by hand, intervals by stay."""

import asyncio
from dataclasses import replace

import jax
import numpy as np
import pytest

from policy import qwen3
from policy.qwen3.logprobs import token_logprobs
from policy.serving.embedded import EmbeddedGenerator
from policy.serving.tokens import ChatTokens
from policy.testing.tiny_qwen3 import make_tiny
from policy.train.data.packing import Dialogue, batches, pack
from policy.train.data.qa_sampling import OPTIONS, Question, QuestionConfig, as_dialogue, ask
from policy.train.loop.learner import Learner
from policy.train.loop.optimizer import LearnerConfig
from policy.train.loop.qa_eval import answer, grade
from policy.train.losses import cross_entropy
from tests.toy import toy_episodes
from worldmodel.errors import InputError


def question(kind, answer, stay):
    return Question(kind, ({"role": "user", "content": "?"},), answer, OPTIONS[kind], stay, 0)


def said(*yes):
    """Probabilities of no and yes."""
    return [np.array([1 - p, p]) for p in yes]


def test_probabilities_are_those_of_the_replies(untaught, tokens):
    model = qwen3.load(untaught)
    config = QuestionConfig(("trend", "mortality"), count=3, charts="compact")
    questions = ask(toy_episodes(), config, seed=0)[2:4]  # one of either kind

    async def run():
        generator = EmbeddedGenerator(model, stop_ids=(tokens.end_id,))
        try:
            return await answer(generator, tokens, questions)
        finally:
            await generator.close()

    found = asyncio.run(run())
    assert [len(one) for one in found] == [len(q.options) for q in questions] == [3, 2]
    replies = []
    for q in questions:
        prompt = tokens.first(q.messages, ())
        said = ([*tokens.encode(option), tokens.end_id] for option in q.options)
        replies += [Dialogue(*_marked(prompt, ids)) for ids in said]
    rows = [pack([one], max(map(len, replies)), seed=0) for one in replies]
    rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
    each = jax.jit(token_logprobs)(
        model, rows.ids, positions=rows.positions, segments=rows.segments
    ).logprob
    by_hand = np.exp(np.where(rows.mask, each, 0).sum(-1, dtype=np.float64))
    for probabilities, weights in zip(found, (by_hand[:3], by_hand[3:]), strict=True):
        np.testing.assert_allclose(probabilities, weights / weights.sum(), atol=1e-4)


def _marked(prompt, spoken):
    own = np.arange(len(prompt) + len(spoken)) >= len(prompt)
    return np.array([*prompt, *spoken], np.int32), own


def test_grades_by_hand():
    answers = ["yes", "no", "yes", "no"]
    questions = [question("mortality", prompt, stay) for stay, prompt in enumerate(answers)]
    # Of four pairs of a yes and a no, the yes is above in three. Precision at the first yes is 1,
    # at the second 2/3. Right at one half: 0.9, 0.2, 0.6; wrong: 0.7 for a no.
    found = grade(questions, said(0.9, 0.7, 0.6, 0.2), resamples=50)["mortality"]
    assert (found.questions, found.stays) == (4, 4)
    assert found.shares == {"no": 0.5, "yes": 0.5}
    assert found.auroc.value == pytest.approx(3 / 4)
    assert found.auprc.value == pytest.approx((1 + 2 / 3) / 2)
    assert found.accuracy.value == pytest.approx(3 / 4)
    assert found.brier.value == pytest.approx((0.01 + 0.49 + 0.16 + 0.04) / 4)
    for metric in (found.auroc, found.auprc, found.accuracy, found.brier):
        assert metric.low <= metric.value <= metric.high


def test_kinds_apart_and_more_than_two_answers():
    questions = [
        question("trend", "falls", 0),
        question("mortality", "yes", 0),
        question("trend", "rises", 1),
    ]
    three = [np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.3, 0.1])]
    found = grade(questions, [three[0], *said(0.9), three[1]], resamples=20)
    assert found["trend"].accuracy.value == 0.5
    # (0.3^2 + 0.2^2) where it falls; 0.3^2 + 0.9^2 where it rises
    assert found["trend"].brier.value == pytest.approx((0.13 + 0.90) / 2)
    assert np.isnan(found["trend"].auroc.value)
    assert np.isnan(found["mortality"].auroc.value) and np.isnan(found["mortality"].auroc.low)
    assert found["mortality"].accuracy.value == 1


def test_questions_of_one_stay_are_not_independent():
    draw = np.random.default_rng(0)
    died = draw.random(60) < 0.4
    yes = np.clip(0.3 + 0.2 * died + 0.2 * draw.normal(size=60), 0, 1)

    def of(times):
        questions = [
            question("mortality", "yes" if d else "no", stay)
            for stay, d in enumerate(died)
            for _ in range(times)
        ]
        return grade(questions, said(*np.repeat(yes, times)), resamples=60)["mortality"]

    once, often = of(1), of(5)
    assert often.questions == 300 and often.stays == 60
    for name in ("auroc", "auprc", "accuracy", "brier"):
        one, other = getattr(once, name), getattr(often, name)
        assert one.low < one.value < one.high
        assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-9)


def test_what_cannot_be_graded_is_refused(tokens):
    free = Question("next_state", ({"role": "user", "content": "?"},), "MAP 70", (), 0, 0)
    with pytest.raises(InputError, match="next_state has no options"):
        asyncio.run(answer(None, tokens, [free]))
    with pytest.raises(InputError, match="got 0 for 1 questions"):
        grade([question("mortality", "yes", 0)], [])


@pytest.mark.slow
def test_what_the_chart_shows_is_learned(tmp_path):
    """Stage I from records to grades: all men die and no woman does, among patients never seen."""
    folder = make_tiny(tmp_path / "tiny", layers=1, hidden=64, heads=2, kv_heads=1)
    tokens, model = ChatTokens.load(folder), qwen3.load(folder)
    episodes = jax.tree.map(np.asarray, toy_episodes(num_stays=200))
    episodes = replace(episodes, died_in_hospital=episodes.static[:, 1] > 0.5)
    config = QuestionConfig(("mortality",), count=240, charts="compact")
    training = ask(episodes.select(np.arange(120)), config, seed=0)
    evaluation = ask(episodes.select(np.arange(120, 200)), replace(config, count=40), seed=1)
    assert not {q.stay for q in training} & {q.stay for q in evaluation}

    async def graded(model):
        generator = EmbeddedGenerator(model, stop_ids=(tokens.end_id,))
        try:
            found = await answer(generator, tokens, evaluation)
        finally:
            await generator.close()
        return grade(evaluation, found, resamples=50)["mortality"].auroc

    dialogues = [as_dialogue(question, tokens) for question in training]
    rows = pack(dialogues, 2 * max(map(len, dialogues)), seed=0)
    learner = Learner(model, cross_entropy, LearnerConfig(max_steps=80, learning_rate=3e-3))
    before = asyncio.run(graded(model))
    learner.run(batches(rows, 4, seed=0))
    after = asyncio.run(graded(learner.model()))
    assert before.value < 0.8 and after.value > 0.95 and after.low > 0.9
