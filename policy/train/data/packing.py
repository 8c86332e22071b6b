"""Dialogues as training sequences: token ids, and a mask of the tokens to learn.

Tokens of the model's replies are learned, including the end token; tokens of prompts are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from policy.agent.dialogue import Stay
from policy.agent.records import newly_read
from policy.serving import hermes
from policy.serving.backend import Reply
from policy.serving.tokens import ChatTokens
from worldmodel.errors import InputError


@dataclass(frozen=True)
class Dialogue:
    """One dialogue, or a part of it, of T tokens."""

    ids: np.ndarray  # [T] int32
    own: np.ndarray  # [T] bool, sampled by the model

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Dialogue:
        return Dialogue(self.ids[part], self.own[part])

    def ends(self) -> Int[np.ndarray, " turns"]:
        """[turns] where a turn is over: the index after each reply's last token."""
        return np.flatnonzero(self.own & ~np.append(self.own[1:], False)) + 1


class Rows(NamedTuple):
    """Dialogues packed into rows of equal length; leaves [..., R, L]."""

    ids: jax.Array | np.ndarray  # int32
    positions: jax.Array | np.ndarray  # int32, counted within a dialogue
    segments: jax.Array | np.ndarray  # int32, one number per dialogue in a row; 0 marks padding
    mask: jax.Array | np.ndarray  # bool, tokens to learn


def written(
    stay: Stay, tokens: ChatTokens, tools: Sequence[Mapping[str, object]]
) -> list[Dialogue]:
    """Training sequences of a stay, tokenised for another model.

    Args:
      stay: of any demonstrator; the ids of its replies are not used.
      tokens: of the model that is to learn.
      tools: that the stay was opened with.

    Returns:
      One dialogue per conversation.

    Raises:
      InputError: there is no turn, or a reply holds what was no call.
    """
    if not stay.turns:
        raise InputError(f"stay {stay.patient}: no turn to learn from")
    found: list[list[tuple[Sequence[int], bool]]] = []
    for turn in stay.turns:
        begins = turn.opens or not found
        if begins:
            found.append([])
        prompt = (tokens.first if begins else tokens.more)(turn.messages, tools)
        reply_ids = [*tokens.encode(reply_text(turn.reply)), tokens.end_id]
        found[-1] += [(prompt, False), (reply_ids, True)]
    return [_joined(parts) for parts in found]


def as_read(stay: Stay) -> list[Dialogue]:
    """Training sequences of a stay, with the ids that its model read and sampled.

    Returns:
      One dialogue; a new one wherever a prompt did not begin with all earlier ids.

    Raises:
      InputError: a reply came without ids.
    """
    found: list[list[tuple[Sequence[int], bool]]] = []
    for turn, (prompt, restarts) in zip(stay.turns, newly_read(stay.turns), strict=True):
        if prompt is None or turn.reply.token_ids is None:
            raise InputError(f"stay {stay.patient}: a reply came without its token ids")
        if restarts or not found:
            found.append([])
        found[-1] += [(prompt, False), (turn.reply.token_ids, True)]
    return [_joined(parts) for parts in found]


def reply_text(reply: Reply) -> str:
    """A reply in the form that `hermes.parse` takes apart.

    Raises:
      InputError: it holds a call without a name, which cannot be written down again.
    """
    if not all(call.name for call in reply.tool_calls):
        raise InputError("reply: holds what was no call; learn from replies that were valid")
    thought = f"<think>\n{reply.reasoning}\n</think>\n\n" if reply.reasoning else ""
    calls = [hermes.write(call.name, call.arguments) for call in reply.tool_calls]
    return thought + "\n".join([*([reply.content] if reply.content else []), *calls])


def cut(dialogue: Dialogue, length: int, *, rest: bool = False) -> list[Dialogue]:
    """Parts of at most `length` tokens, each of whole turns.

    Args:
      dialogue: of any length.
      length: tokens.
      rest: keep what follows the first part too, in parts without the context before them;
        otherwise it is dropped, so that every token is learned in its true context.

    Raises:
      InputError: a single turn is longer.
    """
    parts: list[Dialogue] = []
    start = 0
    ends = dialogue.ends()
    while start < ends[-1] and (rest or not parts):
        fitting = ends[(ends > start) & (ends <= start + length)]
        if not len(fitting):
            turn = int(ends[ends > start][0]) - start
            raise InputError(f"row_length: got {length}, but a turn has {turn} tokens")
        parts.append(dialogue[start : int(fitting[-1])])
        start = int(fitting[-1])
    return parts


def pack(dialogues: Sequence[Dialogue], length: int, *, seed: int) -> Rows:
    """Rows [R, length] of whole dialogues, which do not attend to one another.

    Each goes, in an order drawn by the seed, into the first row with enough space.

    Args:
      dialogues: of at most `length` tokens each.
      length: tokens per row.
      seed: equal seeds, equal rows.

    Raises:
      InputError: there is no dialogue, or one is too long.
    """
    places = layout([len(dialogue) for dialogue in dialogues], length, seed=seed)
    rows = 1 + max(place.row for place in places)
    packed = Rows(*(np.zeros((rows, length), kind) for kind in (*[np.int32] * 3, bool)))
    for dialogue, place in zip(dialogues, places, strict=True):
        here = (place.row, slice(place.start, place.start + len(dialogue)))
        values = (dialogue.ids, np.arange(len(dialogue)), place.number, dialogue.own)
        for leaf, value in zip(packed, values, strict=True):
            leaf[here] = value
    return packed


class Place(NamedTuple):
    """Where a dialogue lies."""

    row: int
    start: int  # column
    number: int  # among those in the row, from 1 on


def layout(lengths: Sequence[int], length: int, *, seed: int) -> list[Place]:
    """Places for dialogues in rows, each in the first row with enough space.

    Args:
      lengths: tokens of each dialogue.
      length, seed: as for `pack`.

    Returns:
      The places in the order given.

    Raises:
      InputError: as `pack`.
    """
    longest = max(lengths, default=0)
    if not 0 < longest <= length:
        raise InputError(f"dialogues: the longest has {longest} tokens, expected 1 to {length}")
    space: list[int] = []
    members: list[int] = []
    shortest = min(lengths)
    usable: list[int] = []  # rows with space for the shortest
    places: dict[int, Place] = {}
    for index in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        needed = lengths[index]
        row = next((row for row in usable if space[row] >= needed), len(space))
        if row == len(space):
            space.append(length)
            members.append(0)
            usable.append(row)
        members[row] += 1
        places[index] = Place(row, length - space[row], members[row])
        space[row] -= needed
        if space[row] < shortest:
            usable.remove(row)
    return [places[index] for index in range(len(lengths))]


def batches(rows: Rows, size: int, *, seed: int) -> Iterator[Rows]:
    """Batches [size, L] without end: all rows in a new order, then again.

    Args:
      rows: [R, L].
      size: rows per batch; where R is no multiple of it, a batch reaches into the next order.
      seed: equal seeds, equal batches.
    """
    draw = np.random.default_rng(seed)
    waiting = np.empty(0, np.int64)
    while True:
        while len(waiting) < size:
            waiting = np.append(waiting, draw.permutation(len(rows.ids)))
        now, waiting = waiting[:size], waiting[size:]
        yield Rows(*(leaf[now] for leaf in rows))


def _joined(parts: Sequence[tuple[Sequence[int], bool]]) -> Dialogue:
    own = [np.full(len(ids), spoken) for ids, spoken in parts]
    return Dialogue(
        np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts]), np.concatenate(own)
    )
