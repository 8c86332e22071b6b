"""The tokens that decide: the two levels of a prescription, and what is wanted of them.

A prescription has about twenty tokens of which two decide, and of these all 25 combinations can be
judged. Their loss is therefore taken from wanted probabilities of all levels, not from the one
that was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from policy.agent.tools import PRESCRIPTION, prescription_arguments
from policy.serving.tokens import ChatTokens, write_call
from worldmodel import schema
from worldmodel.errors import InputError


class DecisionTokens(NamedTuple):
    """How prescriptions look in a model's tokens."""

    levels: tuple[int, ...]  # [5] ids of the levels 0-4
    calls: tuple[tuple[int, ...], ...]  # [25] ids of each call with the end of the reply
    places: tuple[int, int]  # of the vasopressor's and the fluid's level in a call

    @classmethod
    def of(cls, tokens: ChatTokens) -> DecisionTokens:
        """From a tokenizer.

        Raises:
          InputError: a level is not one token, or not the same one for both drugs.
        """
        calls = [
            (*tokens.encode(write_call(PRESCRIPTION, prescription_arguments(a))), tokens.end_id)
            for a in range(schema.NUM_ACTIONS)
        ]
        if len({len(call) for call in calls}) == 1:
            table = np.array(calls).reshape(schema.NUM_LEVELS, schema.NUM_LEVELS, -1)
            differs = np.flatnonzero((table != table[0, 0]).any((0, 1)))
            if len(differs) == 2:
                first, second = differs.tolist()
                levels = table[:, 0, first]
                grid = np.stack(np.meshgrid(levels, levels, indexing="ij"), -1)
                if (table[..., differs] == grid).all():
                    return cls(tuple(levels.tolist()), tuple(calls), (first, second))
        raise InputError(
            "tokenizer: a level of a prescription is not a single token, so decisions cannot be "
            "learned by their probabilities; choose decision_loss=sampled"
        )

    def places_in(self, reply_ids: Sequence[int], action: int) -> tuple[int, int] | None:
        """Indices of both levels in a reply; None unless it ends with the call as we write it."""
        call = self.calls[action]
        start = len(reply_ids) - len(call)
        if start < 0 or tuple(reply_ids[start:]) != call:
            return None
        first, second = self.places
        return start + first, start + second


def level_targets(
    probabilities: Float[np.ndarray, " 25"] | Sequence[float], action: int
) -> Float[np.ndarray, "2 5"]:
    """Wanted probabilities of the levels that an action's call writes one after the other.

    Args:
      probabilities: [25] wanted of all actions.
      action: that was written, 0-24.

    Returns:
      [2, 5] float32: of the vasopressor's level, and of the fluid's given that vasopressor.
    """
    table = np.asarray(probabilities, np.float64).reshape(schema.NUM_LEVELS, schema.NUM_LEVELS)
    vasopressor = int(schema.action_levels(action)[0])
    row = table[vasopressor]
    total = row.sum()
    fluid = row / total if total > 0 else np.full(schema.NUM_LEVELS, 1.0 / schema.NUM_LEVELS)
    return np.stack([table.sum(1) / table.sum(), fluid]).astype(np.float32)
