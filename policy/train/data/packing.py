"""Dialogues as training sequences: token ids, and a mask of the tokens to learn.

Tokens of the model's replies are learned, including the end token; tokens of prompts are not.
Tokenised dialogues are kept on disk and memory-mapped when read. The name of a file is a digest of
all that its contents depend on: the tokenizer, the source, the settings and the code. If one of
them changes, a new file is made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import NamedTuple, overload

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Int

import policy
import worldmodel
from policy.agent.dialogue import Decision, Stay
from policy.agent.records import newly_read
from policy.agent.tools import DecisionTokens, level_targets, schemas
from policy.serving.backend import Reply
from policy.serving.tokens import ChatTokens, mark_call, write_call
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.files import atomic_file, digest_file


@dataclass(frozen=True)
class Dialogue:
    """One dialogue, or a part of it, of T tokens, with D decisions that can be judged."""

    ids: np.ndarray  # [T] int32
    own: np.ndarray  # [T] bool, sampled by the model
    decides: np.ndarray = field(  # [D, 3] int32, where the levels of the vasopressor and of the
        default_factory=partial(np.zeros, (0, 3), np.int32)  # fluid stand, and the joint action
    )
    judged: np.ndarray = field(  # [D, 25] float32 of all actions: wanted probabilities, or
        default_factory=partial(np.zeros, (0, schema.NUM_ACTIONS), np.float32)  # advantages
    )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Dialogue:
        start, stop, _ = part.indices(len(self))
        inside = (self.decides[:, 0] >= start) & (self.decides[:, 1] < stop)
        decides = self.decides[inside] - np.array([start, start, 0], np.int32)
        return Dialogue(self.ids[part], self.own[part], decides, self.judged[inside])

    def ends(self) -> Int[np.ndarray, " turns"]:
        """[turns] where a turn is over: the index after each reply's last token."""
        return np.flatnonzero(self.own & ~np.append(self.own[1:], False)) + 1


class Rows(NamedTuple):
    """Dialogues packed into rows of equal length; leaves [..., R, L]."""

    ids: jax.Array | np.ndarray  # int32
    positions: jax.Array | np.ndarray  # int32, counted within a dialogue
    segments: jax.Array | np.ndarray  # int32, one number per dialogue in a row; 0 marks padding
    mask: jax.Array | np.ndarray  # bool, tokens to learn
    wanted: jax.Array | np.ndarray | None = None  # [..., R, L, 5] float32, probabilities of the
    # levels where a token decides, 0 elsewhere; None where no decision has any

    @classmethod
    def full(cls, ids: Int[np.ndarray, "*r L"]) -> Rows:
        """Rows that are one sequence each, all tokens of which are learned."""
        positions = np.broadcast_to(np.arange(ids.shape[-1], dtype=np.int32), ids.shape)
        return cls(ids, positions, np.ones_like(ids), np.ones(ids.shape, bool))


def written(
    stay: Stay,
    tokens: ChatTokens,
    decisions: DecisionTokens | None = None,
    tools: Callable[[bool], Sequence[Mapping[str, object]]] = schemas,
) -> list[Dialogue]:
    """Training sequences of a stay, tokenised for another model.

    Args:
      stay: of any demonstrator; the ids of its replies are not used.
      tokens: of the model that is to learn.
      decisions: of the model's tokens, if prescriptions are to be learned by the probabilities
        that the demonstrator gave all actions (`Decision.values`).
      tools: those of a dialogue with or without a simulator, as `Prompts.tools` of the templates.

    Returns:
      One dialogue per conversation. Replies that were refused are read and not learned, so that a
      model learns how to go on after an error.

    Raises:
      InputError: there is no turn.
    """
    if not stay.turns:
        raise InputError(f"stay {stay.patient}: no turn to learn from")
    judged, told = judged_by_turn(stay), tools(stay.can_simulate)
    found: list[list[_Part]] = []
    for number, turn in enumerate(stay.turns):
        begins = turn.opens or not found
        if begins:
            found.append([])
        prompt = (tokens.first if begins else tokens.more)(turn.messages, told)
        reply_ids = [*tokens.encode(reply_text(turn.reply)), tokens.end_id]
        found[-1] += [_Part(prompt), _Part(reply_ids, not turn.refused, judged.get(number))]
    return [_joined(parts, decisions) for parts in found]


class Judged(NamedTuple):
    """A prescription as it was written, and what is said of all actions in its place."""

    action: int  # joint action 0-24
    values: Sequence[float] | np.ndarray  # [25]


def judged_by_turn(
    stay: Stay,
    judge: Callable[[Decision], Sequence[float] | np.ndarray | None] = attrgetter("values"),
) -> dict[int, Judged]:
    """What is said of all actions at the prescriptions of a stay, by the index of their turn.

    Args:
      stay: its decisions.
      judge: values [25] of a decision, or None; by default `Decision.values`.
    """
    found = {one.turn: (one.action, judge(one)) for one in stay.decisions}
    return {turn: Judged(a, values) for turn, (a, values) in found.items() if values is not None}


def as_read(
    stay: Stay,
    decisions: DecisionTokens | None = None,
    judged: Mapping[int, Judged] | None = None,
) -> list[Dialogue]:
    """Training sequences of a stay, with the ids that its model read and sampled.

    Args:
      stay: with the ids of its replies.
      decisions, judged: of the model's tokens, and what is said of its prescriptions.

    Returns:
      One dialogue; a new one wherever a prompt did not begin with all earlier ids.

    Raises:
      InputError: a reply came without ids.
    """
    judged = judged or {}
    found: list[list[_Part]] = []
    read = zip(stay.turns, newly_read(stay.turns), strict=True)
    for number, (turn, (prompt, restarts)) in enumerate(read):
        if prompt is None or turn.reply.token_ids is None:
            raise InputError(f"stay {stay.patient}: a reply came without its token ids")
        if restarts or not found:
            found.append([])
        found[-1] += [_Part(prompt), _Part(turn.reply.token_ids, True, judged.get(number))]
    return [_joined(parts, decisions) for parts in found]


def reply_text(reply: Reply) -> str:
    """A reply in the form that `parse_reply` takes apart; what was no call stays none."""
    thought = f"<think>\n{reply.reasoning}\n</think>\n\n" if reply.reasoning else ""
    calls = [
        write_call(call.name, call.arguments) if call.name else mark_call(call.arguments)
        for call in reply.tool_calls
    ]
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
    rows = lay_out(dialogues, places, length)
    return rows._replace(wanted=_wanted(dialogues, places, rows.mask.shape))


def lay_out(dialogues: Sequence[Dialogue], places: Sequence[Place], length: int) -> Rows:
    """Rows [R, length] of dialogues in their places, of which no probabilities are wanted.

    Args:
      dialogues: of at most `length` tokens each.
      places: of `layout`.
      length: tokens per row.
    """
    shape = (1 + max(place.row for place in places), length)
    ids, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, bool)
    for dialogue, place in zip(dialogues, places, strict=True):
        here = (place.row, slice(place.start, place.start + len(dialogue)))
        ids[here], positions[here] = dialogue.ids, np.arange(len(dialogue))
        segments[here], mask[here] = place.number, dialogue.own
    return Rows(ids, positions, segments, mask)


def _wanted(
    dialogues: Sequence[Dialogue], places: Sequence[Place], shape: tuple[int, ...]
) -> np.ndarray | None:
    """[R, L, 5] wanted probabilities of the levels in packed dialogues; None if they have none."""
    if not any(len(dialogue.decides) for dialogue in dialogues):
        return None
    packed = np.zeros((*shape, schema.NUM_LEVELS), np.float32)
    for dialogue, place in zip(dialogues, places, strict=True):
        for (first, second, action), values in zip(
            dialogue.decides.tolist(), dialogue.judged, strict=True
        ):
            at = [place.start + first, place.start + second]
            packed[place.row, at] = level_targets(values, action)
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
        yield jax.tree.map(itemgetter(now), rows)


class _Part(NamedTuple):
    ids: Sequence[int]
    own: bool = False
    judged: Judged | None = None


def _joined(parts: Sequence[_Part], decisions: DecisionTokens | None) -> Dialogue:
    decides: list[tuple[int, int, int]] = []
    judged: list[Sequence[float] | np.ndarray] = []
    start = 0
    for part in parts:
        if decisions is not None and part.judged is not None:
            places = decisions.places_in(part.ids, part.judged.action)
            if places is not None:
                decides.append((start + places[0], start + places[1], part.judged.action))
                judged.append(part.judged.values)
        start += len(part.ids)
    return Dialogue(
        np.concatenate([np.asarray(part.ids, np.int32) for part in parts]),
        np.concatenate([np.full(len(part.ids), part.own) for part in parts]),
        np.array(decides, np.int32).reshape(-1, 3),
        np.array(judged, np.float32).reshape(-1, schema.NUM_ACTIONS),
    )


BATCH = 1024
"""Dialogues per record batch, and so in memory while a file is written."""

_COLUMNS = {"ids": pa.int32(), "own": pa.uint8(), "decides": pa.int32(), "judged": pa.float32()}
_SCHEMA = pa.schema([(name, pa.large_list(kind)) for name, kind in _COLUMNS.items()])
_KEY = b"sepsis-jax dialogues"
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.jinja", "special_tokens*", "added_tokens*")


def cached(
    folder: str | Path,
    make: Callable[[], Iterable[Dialogue]],
    *,
    tokenizer: str | Path,
    source: str,
    settings: object,
) -> CachedDialogues:
    """Dialogues from their file, which is made first where there is none.

    Args:
      folder: of such files; those that are no longer of use may be deleted at any time.
      make: the dialogues, in an order that is the same every time.
      tokenizer: folder of the tokenizer that `make` uses.
      source: says what the dialogues are made from, such as a digest of episodes.
      settings: all else that matters to `make`: a dataclass, or what JSON can hold.

    Raises:
      InputError: the tokenizer's folder holds none, there is no dialogue, the settings are not
        JSON, or the file is damaged.
    """
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = dataclasses.asdict(settings)
    depends = {
        "tokenizer": tokenizer_digest(tokenizer),
        "source": source,
        "settings": settings,
        "code": _code(),
    }
    try:
        key = json.dumps(depends, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"settings: cannot be written as JSON ({error})") from None
    path = Path(folder) / f"dialogues-{hashlib.sha256(key.encode()).hexdigest()[:20]}.arrow"
    if not path.exists():
        _write(path, make(), key)
    return CachedDialogues(path, key)


def tokenizer_digest(folder: str | Path) -> str:
    """SHA-256 of the files that a tokenizer and its chat template are made of.

    Raises:
      InputError: there is none.
    """
    found = {file for pattern in _TOKENIZER for file in Path(folder).glob(pattern)}
    if not found:
        raise InputError(f"{folder}: holds no tokenizer; give the folder of a model")
    return _digest(Path(folder), found)


class CachedDialogues(Sequence[Dialogue]):
    """Dialogues of a file, mapped into memory; arrays are views that cannot be written to.

    Args:
      path: the file.
      key: what its contents must depend on; not looked at if not given.

    Raises:
      InputError: the file is damaged, or depends on something else.
    """

    def __init__(self, path: str | Path, key: str | None = None):
        self.path = Path(path)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            found = (reader.schema.metadata or {}).get(_KEY)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: not readable ({error}); delete it") from None
        if found is None or (key is not None and found.decode() != key):
            raise InputError(f"{path}: made from something else than its name says; delete it")
        self._columns = [[batch.column(name) for batch in batches] for name in _COLUMNS]
        ends = [column.offsets.to_numpy() for column in self._columns[0]]
        self.lengths: np.ndarray = np.concatenate([np.diff(one) for one in ends])  # [N] tokens

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Dialogue: ...
    @overload
    def __getitem__(self, index: slice) -> list[Dialogue]: ...
    def __getitem__(self, index: int | slice) -> Dialogue | list[Dialogue]:
        """A dialogue, or a list of some."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(index)
        batch, row = divmod(place, BATCH)
        ids, own, decides, judged = (
            column[batch].slice(row, 1).flatten().to_numpy() for column in self._columns
        )
        return Dialogue(
            ids, own.view(bool), decides.reshape(-1, 3), judged.reshape(-1, schema.NUM_ACTIONS)
        )


def _write(path: Path, dialogues: Iterable[Dialogue], key: str) -> None:
    waiting = iter(dialogues)
    schema = _SCHEMA.with_metadata({_KEY: key.encode()})
    written = 0
    with atomic_file(path) as temporary, pa.ipc.new_file(temporary, schema) as writer:
        while part := list(islice(waiting, BATCH)):
            columns = [
                _column([np.ravel(getattr(one, name)) for one in part], kind)
                for name, kind in _COLUMNS.items()
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            written += len(part)
        if not written:
            raise InputError(f"{path}: there is no dialogue to write")


def _column(values: Sequence[np.ndarray], kind: pa.DataType) -> pa.LargeListArray:
    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(ends, pa.array(np.concatenate(values)).cast(kind))


def _code() -> str:
    """Digest of all our code and templates below training; too much rather than too little."""
    folders = [Path(str(package.__file__)).parent for package in (policy, worldmodel)]
    return "".join(
        _digest(folder, {*folder.rglob("*.py"), *folder.rglob("*.j2")}) for folder in folders
    )


def _digest(folder: Path, files: Iterable[Path]) -> str:
    names: Mapping[str, str] = {
        file.relative_to(folder).as_posix(): digest_file(file) for file in files
    }
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()
