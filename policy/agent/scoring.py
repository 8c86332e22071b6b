"""Exact action probabilities of a language model: all 25 prescriptions scored at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from policy.agent.tools import PRESCRIPTION, prescription_arguments
from policy.serving import hermes
from policy.serving.tokens import TokenBackend
from worldmodel import schema


class ActionScorer:
    """Probabilities of the 25 prescriptions at a point of a dialogue.

    The probability of an action is that of the reply which is the call and nothing else, in the
    form of `hermes.write`, at temperature 1, given that the reply is one of the 25. What a model
    says before its call, reasoning for instance, has to be in the prompt already.

    Args:
      backend: whose generator scores.
    """

    def __init__(self, backend: TokenBackend):
        tokens = backend.tokens
        self._generator = backend.generator
        self._calls = [
            [*tokens.encode(hermes.write(PRESCRIPTION, prescription_arguments(a))), tokens.end_id]
            for a in range(schema.NUM_ACTIONS)
        ]

    async def __call__(self, prompt_ids: Sequence[int]) -> np.ndarray:
        """[25] float64 probabilities after a prompt that ends where the model speaks.

        Raises:
          BackendError: the model could not be reached.
        """
        logprobs = np.array(await self._generator.score(prompt_ids, self._calls), np.float64)
        weights = np.exp(logprobs - logprobs.max())
        return weights / weights.sum()
