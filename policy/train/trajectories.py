"""What was played, as rows to learn from: ids as they were drawn, and credit for every token.

A decision is made by all that the model said since the decision before, refused replies included,
and its credit goes to all of these tokens. Credit comes in two kinds: of a whole stay beside others
of the same patient (GRPO, arXiv 2402.03300, and relatives), or of each decision (GiGPO 2505.10978,
or counterfactual).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policy.agent.dialogue import Stay
from policy.train.data import Dialogue, as_read, layout
from policy.train.objectives import RolloutRows


@dataclass(frozen=True)
class Trajectory:
    """A conversation of T tokens as it was drawn."""

    dialogue: Dialogue
    behavior: np.ndarray  # [T] float32 log-probability when drawn; 0 on what was told
    advantage: np.ndarray  # [T] float32

    def __len__(self) -> int:
        return len(self.dialogue)


def decision_of_turns(stay: Stay) -> np.ndarray:
    """[turns] index of the decision that each turn belongs to; after the last, their number."""
    ends = [decision.turn for decision in stay.decisions]
    return np.searchsorted(ends, np.arange(len(stay.turns)))


def trajectories(stay: Stay, credit: Sequence[float] | np.ndarray) -> list[Trajectory]:
    """The conversations of a stay with the credit of its decisions.

    Args:
      stay: with ids and log-probabilities of its replies.
      credit: [decisions], and one more for what was said after the last.

    Raises:
      InputError: a reply came without its ids.
    """
    of_turns = np.append(credit, 0.0)[decision_of_turns(stay)]
    turns = list(zip(stay.turns, of_turns.tolist(), strict=True))
    found = []
    for dialogue in as_read(stay):
        behavior = np.zeros(len(dialogue), np.float32)
        advantage = np.zeros(len(dialogue), np.float32)
        for end in dialogue.ends().tolist():
            turn, value = turns.pop(0)
            spoken = slice(end - len(turn.reply.token_ids or ()), end)
            behavior[spoken] = turn.reply.logprobs
            advantage[spoken] = value
        found.append(Trajectory(dialogue, behavior, advantage))
    return found


def pack_trajectories(members: Sequence[Trajectory], length: int, *, seed: int) -> RolloutRows:
    """Rows [R, length]; `proximal` is `behavior` and `reference` zero until they are computed.

    Args:
      members: of at most `length` tokens each.
      length, seed: as for `policy.train.data.pack`.

    Raises:
      InputError: as `policy.train.data.pack`.
    """
    places = layout([len(member) for member in members], length, seed=seed)
    shape = (1 + max(place.row for place in places), length)
    rows = RolloutRows(
        *(np.zeros(shape, kind) for kind in (*[np.int32] * 3, bool, *[np.float32] * 4))
    )
    for member, place in zip(members, places, strict=True):
        here = (place.row, slice(place.start, place.start + len(member)))
        rows.ids[here] = member.dialogue.ids
        rows.positions[here] = np.arange(len(member))
        rows.segments[here] = place.number
        rows.mask[here] = member.dialogue.own
        rows.behavior[here] = rows.proximal[here] = member.behavior
        rows.advantage[here] = member.advantage
    return rows
