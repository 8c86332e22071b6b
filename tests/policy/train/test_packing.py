"""Sequences are what a model would have read and written; rows keep them apart."""

import asyncio
import json
from dataclasses import replace
from itertools import islice

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.agent import prompts
from policy.agent.dialogue import Stay, Turn
from policy.agent.tools import SCHEMAS
from policy.serving.backend import STOP, Completion, Reply, Sampling, ToolCall
from policy.serving.tokens import TokenBackend, parse_reply, write_call
from policy.train.data.packing import Dialogue, as_read, batches, cut, pack, reply_text, written
from tests.policy.train.conftest import stay_of
from worldmodel.errors import InputError


class Parrot:
    """A generator that says what it was given to say."""

    name = "parrot"

    def __init__(self, replies):
        self.replies = iter(replies)

    async def generate(self, prompt_ids, *, sampling, seed):
        ids = tuple(next(self.replies))
        return Completion(ids, (0.0,) * len(ids), STOP)

    async def close(self):
        pass


def replayed(stay, tokens):
    """The same dialogue with a `TokenBackend`: its stay, and all ids at the end."""
    said = [
        [*tokens.encode(write_call(c.name, c.arguments)), tokens.end_id]
        for c in (turn.reply.tool_calls[0] for turn in stay.turns)
    ]
    conversation = TokenBackend(Parrot(said), tokens).open(SCHEMAS)

    async def hold():
        return [
            replace(turn, reply=await conversation.ask(turn.messages, sampling=Sampling(), seed=0))
            for turn in stay.turns
        ]

    turns = asyncio.run(hold())
    return replace(stay, turns=turns), conversation.ids


def test_written_is_what_a_conversation_appends(tokens):
    stay = stay_of(3, 4)
    again, ids = replayed(stay, tokens)
    (found,) = written(stay, tokens)
    assert found.ids.dtype == np.int32
    assert found.ids.tolist() == ids
    for turn, before in zip(again.turns, stay.turns, strict=True):
        assert turn.reply.tool_calls[0].arguments == before.reply.tool_calls[0].arguments
    (read,) = as_read(again)
    assert read.ids.tolist() == ids
    assert read.own.tolist() == found.own.tolist()


def test_only_replies_are_learned_with_their_end(tokens):
    stay = stay_of(0, 2)
    (found,) = written(stay, tokens)
    text = "".join(reply_text(turn.reply) + tokens.text([]) + "<|im_end|>" for turn in stay.turns)
    assert tokens.text([*found.ids[found.own], 0])[: len(text)] == text
    ends = found.ends()
    assert len(ends) == 4 and ends[-1] == len(found)
    assert (found.ids[ends - 1] == tokens.end_id).all()
    assert not found.own[0]


def test_a_broken_prefix_begins_a_new_dialogue():
    def turn(prompt, said):
        return Turn((), Reply("", prompt_ids=prompt, token_ids=said), 0)

    stay = Stay(0, turns=[turn((1, 2), (3,)), turn((1, 2, 3, 4), (5,)), turn((1, 9), (5, 6))])
    first, second = as_read(stay)
    assert first.ids.tolist() == [1, 2, 3, 4, 5]
    assert first.own.tolist() == [False, False, True, False, True]
    assert second.ids.tolist() == [1, 9, 5, 6]
    assert second.own.tolist() == [False, False, True, True]
    with pytest.raises(InputError, match="without its token ids"):
        as_read(stay_of(0, 1))


def test_thoughts_and_words_survive_writing():
    calls = (ToolCall("", "simulation", json.dumps({"actions": ["[0, 1]"]})),) * 2
    text = reply_text(Reply("I look.", calls, reasoning="MAP is low."))
    parts = parse_reply(text)
    assert (parts.content, parts.reasoning) == ("I look.", "MAP is low.")
    assert [call.arguments for call in parts.tool_calls] == [call.arguments for call in calls]
    broken = parse_reply(reply_text(Reply("", (ToolCall("", "", '{"name": "simu'),))))
    assert [(call.name, call.arguments) for call in broken.tool_calls] == [("", '{"name": "simu')]


def test_a_stay_without_turns_teaches_nothing(tokens):
    with pytest.raises(InputError, match="no turn"):
        written(Stay(5), tokens)


def test_the_tools_of_ones_own_templates_are_what_is_learned(tokens, tmp_path):
    """A model is trained on the tools that it is told of when it treats."""
    for template in (prompts._OWN / "compact").iterdir():
        (tmp_path / template.name).write_bytes(template.read_bytes())
    told = json.loads(json.dumps(SCHEMAS))
    told[0]["function"]["description"] = "Ask the oracle."
    (tmp_path / "tools.json").write_text(json.dumps(told))
    stay = stay_of(0, 1)
    (usual,), (own,) = (
        written(stay, tokens, tools=prompts.Prompts(templates).tools)
        for templates in ("compact", tmp_path)
    )
    texts = [tokens.text(one.ids.tolist()) for one in (usual, own)]
    assert ["Ask the oracle." in text for text in texts] == [False, True]


def dialogue(*turns, start=0):
    """Turns as (prompt, reply) numbers of tokens; ids count up."""
    own = np.concatenate([[False] * prompt + [True] * reply for prompt, reply in turns])
    return Dialogue(np.arange(start, start + len(own), dtype=np.int32), own)


def test_cut_at_turns():
    long = dialogue((5, 3), (2, 2), (4, 1), (1, 1))
    assert long.ends().tolist() == [8, 12, 17, 19]
    assert [part.ids.tolist() for part in cut(long, 12)] == [list(range(12))]
    assert [len(part) for part in cut(long, 11, rest=True)] == [8, 11]
    assert [len(part) for part in cut(long, 8, rest=True)] == [8, 4, 7]
    assert [len(part) for part in cut(long, 19)] == [19]
    with pytest.raises(InputError, match="a turn has 8 tokens"):
        cut(long, 7)


def test_rows_hold_every_dialogue_once():
    members = [dialogue((2, n), start=100 * n) for n in range(1, 8)]
    rows = pack(members, 10, seed=4)
    found = []
    for row in range(len(rows.ids)):
        for number in range(1, rows.segments[row].max() + 1):
            here = rows.segments[row] == number
            ids = rows.ids[row][here].tolist()
            assert rows.positions[row][here].tolist() == list(range(len(ids)))
            assert rows.mask[row][here].tolist() == [False] * 2 + [True] * (len(ids) - 2)
            found.append(ids)
    assert sorted(found) == sorted(member.ids.tolist() for member in members)
    padding = rows.segments == 0
    assert not rows.mask[padding].any() and not rows.ids[padding].any()
    assert len(rows.ids) == 5  # 42 tokens
    again = pack(members, 10, seed=4)
    other = pack(members, 10, seed=5)
    one, same, changed = (jax.tree.leaves(found) for found in (rows, again, other))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, changed, strict=True))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="longest has 5"):
        pack([dialogue((2, 3))], 4, seed=0)
    with pytest.raises(InputError, match="expected 1"):
        pack([], 4, seed=0)


def test_batches_show_every_row_once_per_round():
    rows = pack([dialogue((1, 3), start=10 * n) for n in range(5)], 4, seed=0)
    seen = [batch.ids[:, 0].tolist() for batch in islice(batches(rows, 2, seed=1), 5)]
    flat = [first for pair in seen for first in pair]
    assert sorted(flat[:5]) == sorted(flat[5:]) == [0, 10, 20, 30, 40]
    assert flat[:5] != flat[5:]
    assert seen == [batch.ids[:, 0].tolist() for batch in islice(batches(rows, 2, seed=1), 5)]


LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(16, 40), st.integers(0, 100))
def test_packed_dialogues_come_back_whole(lengths, length, seed):
    dialogues = [dialogue((n - n // 2, n // 2), start=1000 * i) for i, n in enumerate(lengths)]
    rows = pack(dialogues, length, seed=seed)
    found = []
    for row in range(len(rows.ids)):
        segments = rows.segments[row]
        numbers = np.unique(segments[segments > 0])
        assert numbers.tolist() == list(range(1, len(numbers) + 1))
        for number in numbers:
            here = np.flatnonzero(segments == number)
            assert (np.diff(here) == 1).all()
            np.testing.assert_array_equal(rows.positions[row, here], np.arange(len(here)))
            found.append((rows.ids[row, here].tolist(), rows.mask[row, here].tolist()))
    want = [(one.ids.tolist(), one.own.tolist()) for one in dialogues]
    assert sorted(found) == sorted(want)
    for leaf in jax.tree.leaves(rows):
        assert not leaf[rows.segments == 0].any()


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(16, 40), st.integers(0, 100))
def test_first_fit_leaves_at_most_one_row_half_empty(lengths, length, seed):
    rows = pack([dialogue((n, 0)) for n in lengths], length, seed=seed)
    used = (rows.segments > 0).sum(1)
    assert (used <= length).all()
    assert (used * 2 <= length).sum() <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8))
def test_parts_joined_are_the_dialogue(turns):
    whole = dialogue(*turns)
    parts = cut(whole, 12, rest=True)
    assert max(map(len, parts)) <= 12
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
    np.testing.assert_array_equal(np.concatenate([part.own for part in parts]), whole.own)
    (first,) = cut(whole, 12)
    np.testing.assert_array_equal(first.ids, parts[0].ids)
