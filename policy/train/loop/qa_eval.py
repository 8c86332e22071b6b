"""Evaluation of a language model on questions about patients, without the simulator.

SepsisAgent (arXiv 2605.14723) is evaluated on two questions, "mortality" (death in hospital) and
"vasopressor" (within the next 24 hours), by AUROC and AUPRC. The model generates nothing: the
probabilities of the possible answers are compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from policy.serving.backend import Generator
from policy.serving.tokens import ChatTokens
from policy.train.data.qa_sampling import Question
from worldmodel.errors import InputError

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], float]
"""Of labels [M], probabilities [M, K] and weights [M]."""


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95% interval over stays; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Grade:
    """Of one kind of question.

    Attributes:
      questions, stays: how many.
      shares: of each answer among the true ones; the AUPRC of guessing is the share of "yes".
      accuracy: of the most probable answer.
      auroc, auprc: of the second of two answers ("yes"); NaN for other kinds.
      brier: mean squared error of the probabilities, summed over the answers but the first.
    """

    questions: int
    stays: int
    shares: dict[str, float]
    accuracy: Estimate
    auroc: Estimate
    auprc: Estimate
    brier: Estimate


async def answer(
    generator: Generator,
    tokens: ChatTokens,
    questions: Sequence[Question],
    *,
    at_once: int = 256,
) -> list[np.ndarray]:
    """Probabilities of each question's options, given that the reply is one of them.

    Args:
      generator: the model.
      tokens: of the model.
      questions: with options.
      at_once: questions under way at the same time.

    Returns:
      Per question [options] float64. A reply is an option and the end token, nothing else.

    Raises:
      InputError: a question has no options.
      BackendError: the model could not be reached.
    """
    free = sorted({question.kind for question in questions if not question.options})
    if free:
        raise InputError(f"questions: {', '.join(free)} has no options to compare")
    gate = asyncio.Semaphore(at_once)

    async def one(question: Question) -> np.ndarray:
        options = [[*tokens.encode(option), tokens.end_id] for option in question.options]
        async with gate:
            logprobs = await generator.score(tokens.first(question.messages, ()), options)
        weights = np.exp(np.array(logprobs, np.float64) - max(logprobs))
        result: np.ndarray = weights / weights.sum()
        return result

    return list(await asyncio.gather(*map(one, questions)))


def grade(
    questions: Sequence[Question],
    probabilities: Sequence[np.ndarray],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Grade]:
    """Grades answers against the records, by kind of question.

    Args:
      questions: with options; for AUPRC and Brier score in the proportions of the records
        (`QuestionConfig.balanced` false).
      probabilities: of `answer`.
      resamples: of the stays, with all their questions, for the intervals (percentiles).
      seed: equal seeds, equal intervals.

    Raises:
      InputError: numbers of questions and answers differ.
    """
    if len(questions) != len(probabilities) or not questions:
        raise InputError(
            f"probabilities: got {len(probabilities)} for {len(questions)} questions, expected "
            "one for each, and at least one"
        )
    pairs = sorted(zip(questions, probabilities, strict=True), key=lambda pair: pair[0].kind)
    found: dict[str, Grade] = {}
    for kind, members in groupby(pairs, key=lambda pair: pair[0].kind):
        asked, answered = zip(*members, strict=True)
        found[kind] = _graded(asked, np.stack(answered), resamples, np.random.default_rng(seed))
    return found


def _graded(
    questions: Sequence[Question],
    probabilities: np.ndarray,
    resamples: int,
    draw: np.random.Generator,
) -> Grade:
    label = np.array([question.label for question in questions])
    stays, stay = np.unique([question.stay for question in questions], return_inverse=True)
    counts = draw.multinomial(len(stays), np.full(len(stays), 1 / len(stays)), size=resamples)

    def estimate(metric: Metric) -> Estimate:
        resampled = []
        for count in counts:
            weight = count[stay]
            kept = weight > 0
            resampled.append(metric(label[kept], probabilities[kept], weight[kept]))
        defined = [value for value in resampled if not np.isnan(value)]
        low, high = np.quantile(defined, (0.025, 0.975)) if defined else (np.nan, np.nan)
        value = metric(label, probabilities, np.ones(len(label)))
        return Estimate(float(value), float(low), float(high))

    options = questions[0].options
    return Grade(
        questions=len(label),
        stays=len(stays),
        shares={option: float((label == i).mean()) for i, option in enumerate(options)},
        accuracy=estimate(_accuracy),
        auroc=estimate(_ranking(roc_auc_score)),
        auprc=estimate(_ranking(average_precision_score)),
        brier=estimate(_brier),
    )


def _accuracy(label: np.ndarray, probability: np.ndarray, weight: np.ndarray) -> float:
    return float(np.average(probability.argmax(-1) == label, weights=weight))


def _brier(label: np.ndarray, probability: np.ndarray, weight: np.ndarray) -> float:
    true = label[:, None] == np.arange(1, probability.shape[1])
    return float(np.average(((probability[:, 1:] - true) ** 2).sum(-1), weights=weight))


def _ranking(metric: Callable[..., float]) -> Metric:
    """A metric of scikit-learn, where there are two answers and both occur."""

    def defined(label: np.ndarray, probability: np.ndarray, weight: np.ndarray) -> float:
        if probability.shape[1] != 2 or label.min() == label.max():
            return float("nan")
        return float(metric(label, probability[:, 1], sample_weight=weight))

    return defined
