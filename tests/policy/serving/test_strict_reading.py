"""No path from a model's words to a treatment invents one: a fuzzer against another reading.

The same replies go through the embedded sampler's, the vLLM server's and the OpenAI endpoint's
path; a second, independently written reading says what may come out.
"""

import asyncio
import json
import random
import re

import pytest

from policy.agent.tools import SCHEMAS, InvalidCallError, Prescribe, read_call
from policy.serving.backend import LENGTH, STOP, Completion, Sampling
from policy.serving.client import Client, Endpoint
from policy.serving.openai import ChatOptions, OpenAIBackend
from policy.serving.tokens import ChatTokens, TokenBackend
from policy.serving.vllm import VLLMGenerator
from policy.testing.tiny_qwen3 import make_tiny
from tests.policy.serving.vllm_answers import FakeVLLM, hermes

ASKED = [{"role": "user", "content": "MAP 60"}]
OPEN, CLOSE, CALL, CALL_END = "<think>", "</think>", "<tool_call>", "</tool_call>"
MARKS = re.compile(f"{OPEN}|{CLOSE}|{CALL}|{CALL_END}")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return ChatTokens.load(make_tiny(tmp_path_factory.mktemp("tiny")))


S = r"[ \t\r\n]*"
LEVEL = "(-?[0-9])"


def member(name, value):
    return f'{S}"{name}"{S}:{S}{value}{S}'


ARGUMENTS = [
    r"\{" + ",".join(member(name, LEVEL) for name in names) + r"\}"
    for names in (("vasopressor", "iv_fluid"), ("iv_fluid", "vasopressor"))
]
GRAMMAR = {
    swapped: [
        re.compile(S + r"\{" + ",".join(members) + r"\}" + S)
        for members in (
            (member("name", '"prescription"'), member("arguments", arguments)),
            (member("arguments", arguments), member("name", '"prescription"')),
        )
    ]
    for swapped, arguments in enumerate(ARGUMENTS)
}
DIGITS = {"-0": 0} | {str(level): level for level in range(5)}


def action_of(body):
    """The action of a call's body, by a grammar instead of a JSON reader; None if it is none."""
    for swapped, forms in GRAMMAR.items():
        for form in forms:
            if found := form.fullmatch(body):
                levels = [DIGITS.get(text) for text in found.groups()]
                if None not in levels:
                    vasopressor, fluid = reversed(levels) if swapped else levels
                    return 5 * vasopressor + fluid
    return None


def strictly(text, tail):
    """The one treatment that a reply gives, or None: mark by mark, from left to right."""
    thinking = tail.strip().endswith(OPEN)
    calls, body, at = [], None, 0  # `body`: what the open call has so far
    for mark in MARKS.finditer(text):
        if body is not None:
            body += text[at : mark.start()]
        at, word = mark.end(), mark[0]
        if thinking:
            thinking = word != CLOSE
        elif word == CLOSE:  # a thought whose beginning was not written: all before belongs to it
            calls, body = [], None
        elif word == OPEN:
            thinking = True
            if body is not None:
                calls.append(None)
                body = None
        elif word == CALL:
            if body is not None:
                calls.append(None)
            body = ""
        elif body is not None:
            calls.append(action_of(body))
            body = None
    if body is not None:
        calls.append(None)
    return calls[0] if len(calls) == 1 else None


def call(rng):
    """A call, in one of many ways, most of them wrong."""
    v, f, w = (rng.choice([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4, -1, 5]) for _ in range(3))
    good = f'"vasopressor": {v}, "iv_fluid": {f}'
    bodies = [
        *[f'{{"name": "prescription", "arguments": {{{good}}}}}'] * 12,
        f'{{"arguments": {{"iv_fluid": {f}, "vasopressor": {v}}}, "name": "prescription"}}',
        f'{{"name": "prescription", "name": "prescription", "arguments": {{{good}}}}}',
        f'{{"name": "simulation", "name": "prescription", "arguments": {{{good}}}}}',
        f'{{"name": "prescription", "arguments": {{{good}, "vasopressor": {w}}}}}',
        f'{{"name": "prescription", "arguments": {{}}, "arguments": {{{good}}}}}',
        f'{{"name": "prescription", "arguments": {{{good}}}, "why": "shock"}}',
        f'{{"name": "prescription", "arguments": {{{good}, "why": "shock"}}}}',
        f'{{"name": "prescription", "arguments": {{"vasopressor": "{v}", "iv_fluid": {f}}}}}',
        f'{{"name": "prescription", "arguments": {{"vasopressor": {v}.0, "iv_fluid": {f}}}}}',
        '{"name": "prescription", "arguments": "{}"}',
        f'{{"name": "prescribe", "arguments": {{{good}}}}}',
        f'[{{"name": "prescription", "arguments": {{{good}}}}}]',
        '{"name": "simulation", "arguments": {"actions": ["[1, 1]"]}}',
        f'{{"name": "prescription", "arguments": {{{good}}}}} {{}}',
    ]
    body = rng.choice(bodies)
    return rng.choice(
        [*[f"{CALL}\n{body}\n{CALL_END}"] * 5, f"{CALL}\n{body}", f"{body}{CALL_END}"]
    )


WORDS = ["Let me see.\n", " well ", "\u00a0", "{", "}", '"', "\n\n", "prescription", "\u4e2d"]


def thought(rng):
    """A thought, which may hold a call, and may lack its beginning or its end."""
    inside = rng.choice(WORDS) + (call(rng) if rng.random() < 0.7 else "") + " Too much."
    return rng.choice(
        [*[f"{OPEN}\n{inside}\n{CLOSE}\n"] * 4, f"{OPEN}{inside}", f"{inside}{CLOSE}",
         f"{OPEN}{OPEN}{inside}{CLOSE}"]
    )  # fmt: skip


def reply(rng):
    """The text of a reply and the end of its prompt."""
    parts = [
        rng.choices([call, thought, lambda rng: rng.choice(WORDS)], [5, 4, 2])[0](rng)
        for _ in range(rng.choice([1, 1, 2, 2, 3, 4]))
    ]
    text = "".join(parts)
    for _ in range(rng.choice([0, 0, 0, 1, 2])):  # damage
        at = rng.randrange(len(text) + 1)
        kept = at + rng.choice([0, 0, 1, 3])
        text = text[:at] + rng.choice(["", OPEN, CLOSE, CALL, CALL_END, *WORDS]) + text[kept:]
    return text, rng.choice(["\n", "\n", "\n", f"{OPEN}\n", f"{OPEN}\n\n{CLOSE}\n\n"])


def treatment(reply):
    """What a dialogue would give: a prescription that is the only call of a whole reply."""
    if reply.finish_reason == LENGTH or len(reply.tool_calls) != 1:
        return None
    try:
        asked = read_call(reply.tool_calls[0])
    except InvalidCallError:
        return None
    return asked.action if isinstance(asked, Prescribe) else None


class Sampler:
    """Stands for the embedded sampler."""

    name = "sampler"

    def __init__(self, server):
        self.server = server

    async def generate(self, prompt_ids, *, sampling, seed):
        ids = tuple(self.server.drawn())
        return Completion(ids, (-1.0,) * len(ids), STOP)


class Prompted(ChatTokens):
    """Prompts that end as the server's do."""

    server: FakeVLLM

    def first(self, messages, tools):
        return [1, 2, *self.encode(self.server.tail)]


def prompted(tokens, server):
    found = Prompted(tokens._tokenizer)
    found.server = server
    return found


ENDPOINT = Endpoint("http://127.0.0.1:1", "m", attempts=1)


def embedded(tokens, server):
    return TokenBackend(Sampler(server), prompted(tokens, server))


def vllm(tokens, server):
    return TokenBackend(VLLMGenerator(ENDPOINT, key="k"), prompted(tokens, server))


def openai(tokens, server):
    return OpenAIBackend(ENDPOINT, ChatOptions(vllm=True), key="k")


LONG = pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])


@pytest.mark.parametrize("count", [2_000, LONG])
@pytest.mark.parametrize("path", [embedded, vllm, openai])
def test_no_treatment_that_was_not_written(tokens, monkeypatch, path, count):
    server = FakeVLLM(tokens)

    async def once(self, method, path, body, query):
        return json.dumps(server(path, body))

    monkeypatch.setattr(Client, "_once", once)
    backend = path(tokens, server)
    rng, given, invented, missed, lenient = random.Random(7), 0, [], [], 0

    async def go():
        nonlocal given, lenient
        for _ in range(count):
            server.text, server.tail = reply(rng)
            heard = await backend.open(SCHEMAS).ask(ASKED, sampling=Sampling(), seed=0)
            found, written = treatment(heard), strictly(server.text, server.tail)
            given += found is not None
            if found is not None and found != written:
                invented.append((server.text, server.tail, found))
            if found is None and written is not None:
                missed.append((server.text, server.tail, written))
            _, calls = hermes(server.text)
            lenient += written is None and len(calls) == 1

    asyncio.run(go())
    assert not invented, invented[:3]
    assert not missed, missed[:3]
    assert given > count / 20, given
    assert lenient > count / 20, lenient  # replies that a lenient reader takes


@pytest.mark.parametrize("path", [embedded, vllm, openai])
@pytest.mark.parametrize(("blank", "action"), [(" \t\r\n", 24), ("\u00a0", None), ("\u2003", None)])
def test_only_blanks_of_json_stand_around_a_call(tokens, monkeypatch, path, blank, action):
    server = FakeVLLM(tokens, f"{CALL}{blank}{GOOD}{blank}{CALL_END}", "\n")

    async def once(self, method, path, body, query):
        return json.dumps(server(path, body))

    monkeypatch.setattr(Client, "_once", once)
    heard = asyncio.run(path(tokens, server).open(SCHEMAS).ask(ASKED, sampling=Sampling(), seed=0))
    assert treatment(heard) == action


GOOD = '{"name": "prescription", "arguments": {"vasopressor": 4, "iv_fluid": 4}}'
WHOLE = f"{CALL}\n{GOOD}\n{CALL_END}"


@pytest.mark.parametrize("path", [embedded, vllm, openai])
@pytest.mark.parametrize(
    ("text", "tail"),
    [
        (f"Let me see.\n{OPEN}\nWhat about {WHOLE}? Too much.\n{CLOSE}\nNo.", "\n"),
        (f"{OPEN}a{CLOSE} b {OPEN}{WHOLE}{CLOSE} c", "\n"),
        (f"What about {WHOLE}? Too much.", f"{OPEN}\n"),
        (f"{CALL}\n{GOOD}", "\n"),
        (f'{CALL}{GOOD[:-1]}, "why": 1}}{CALL_END}', "\n"),
        (f'{CALL}{GOOD[:-1]}, "name": "prescription"}}{CALL_END}', "\n"),
        (f'{CALL}{GOOD[:-2]}, "iv_fluid": 4}}}}{CALL_END}', "\n"),
        (f'{CALL}{GOOD[:-1]}, "arguments": {{"vasopressor": 4, "iv_fluid": 4}}}}{CALL_END}', "\n"),
    ],
)
def test_what_lenient_readers_take(tokens, monkeypatch, path, text, tail):
    server = FakeVLLM(tokens, text, tail)
    assert hermes(text)[1], "not even a lenient reader takes it"

    async def once(self, method, path, body, query):
        return json.dumps(server(path, body))

    monkeypatch.setattr(Client, "_once", once)
    heard = asyncio.run(path(tokens, server).open(SCHEMAS).ask(ASKED, sampling=Sampling(), seed=0))
    assert treatment(heard) is None
    server.text, server.tail = f"I treat. {WHOLE}", "\n"
    heard = asyncio.run(path(tokens, server).open(SCHEMAS).ask(ASKED, sampling=Sampling(), seed=0))
    assert (treatment(heard), heard.content, heard.token_ids) == (
        24,
        "I treat.",
        (*server.drawn(),),
    )
