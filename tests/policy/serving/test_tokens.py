"""Token-level dialogues: ids are only appended, and say what the chat template would say."""

import asyncio
import copy
import json
from pathlib import Path

import numpy as np
import pytest

from policy.agent.tools import SCHEMAS, ActionScorer, Prescribe, prescription_arguments, read_call
from policy.serving.backend import LENGTH, STOP, TOOL_CALLS, BackendError, Completion, Sampling
from policy.serving.tokens import ChatTokens, TokenBackend, parse_reply, write_call
from policy.testing.tiny_qwen3 import make_tiny
from worldmodel.errors import InputError

CALL = write_call("prescription", prescription_arguments(7))
FIRST = [{"role": "user", "content": "MAP 60"}]
TOOL_REPLY = [
    {"role": "tool", "tool_call_id": "call-1-0", "name": "prescription", "content": "MAP 65"}
]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return ChatTokens.load(folder)


class Typist:
    """A generator that writes given texts, and likes some actions better than others."""

    name = "typist"

    def __init__(self, tokens, *texts):
        self.tokens, self.texts, self.prompts = tokens, list(texts), []

    async def generate(self, prompt_ids, *, sampling, seed):
        self.prompts.append(list(prompt_ids))
        text = self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        if isinstance(text, tuple):  # cut off
            ids = self.tokens.encode(text[0])
            return Completion(tuple(ids), (-1.0,) * len(ids), LENGTH)
        ids = [*self.tokens.encode(text), self.tokens.end_id]
        return Completion(tuple(ids), (-1.0,) * len(ids), STOP, "v1")

    async def score(self, prompt_ids, continuations):
        self.asked = continuations
        return [float(-i) for i in range(len(continuations))]

    async def close(self):
        pass


def talk(tokens, texts, *asked):
    generator = Typist(tokens, *texts)
    conversation = TokenBackend(generator, tokens).open(SCHEMAS)

    async def go():
        return [await conversation.ask(messages, sampling=Sampling(), seed=0) for messages in asked]

    return asyncio.run(go()), generator, conversation


def test_a_dialogue_is_what_the_template_renders(tokens):
    replies, generator, conversation = talk(tokens, [CALL, CALL], FIRST, TOOL_REPLY)
    assert [read_call(reply.tool_calls[0]) for reply in replies] == [Prescribe(7)] * 2
    assert [reply.finish_reason for reply in replies] == [TOOL_CALLS] * 2
    assert replies[0].tool_calls[0].id != replies[1].tool_calls[0].id
    # The whole dialogue rendered anew, the model's words as content.
    whole = [*FIRST, {"role": "assistant", "content": CALL}, *TOOL_REPLY]
    assert generator.prompts[1] == tokens.first(whole, SCHEMAS)
    assert replies[1].prompt_ids[: len(generator.prompts[0])] == tuple(generator.prompts[0])
    assert conversation.ids == [*generator.prompts[1], *replies[1].token_ids]
    assert replies[0].weight_version == "v1"
    assert replies[0].usage["completion_tokens"] == len(replies[0].token_ids)


def test_a_reply_that_was_cut_off_is_ended_and_kept(tokens):
    replies, generator, _ = talk(tokens, [("I think <tool_call>",), CALL], FIRST, FIRST)
    assert replies[0].finish_reason == LENGTH
    assert replies[0].tool_calls[0].name == ""
    before = [*replies[0].prompt_ids, *replies[0].token_ids]
    assert generator.prompts[1][: len(before) + 1] == [*before, tokens.end_id]


def test_what_was_drawn_is_never_tokenised_again(tokens):
    """Ids that a tokenizer would never choose stay as they are."""
    word = tokens.encode("prescription")
    spelled = [token for letter in "prescription" for token in tokens.encode(letter)]
    assert spelled != word

    class Speller(Typist):
        async def generate(self, prompt_ids, *, sampling, seed):
            self.prompts.append(list(prompt_ids))
            return Completion((*spelled, tokens.end_id), (-1.0,) * (len(spelled) + 1), STOP)

    generator = Speller(tokens)
    conversation = TokenBackend(generator, tokens).open(SCHEMAS)
    for messages in (FIRST, TOOL_REPLY):
        asyncio.run(conversation.ask(messages, sampling=Sampling(), seed=0))
    start = len(generator.prompts[0])
    assert generator.prompts[1][start : start + len(spelled)] == spelled


def test_a_fault_leaves_the_dialogue_as_it_was(tokens):
    generator = Typist(tokens, BackendError("gone"), CALL)
    conversation = TokenBackend(generator, tokens).open(SCHEMAS)
    with pytest.raises(BackendError):
        asyncio.run(conversation.ask(FIRST, sampling=Sampling(), seed=0))
    assert conversation.ids == []
    asyncio.run(conversation.ask(FIRST, sampling=Sampling(), seed=0))
    assert generator.prompts[0] == generator.prompts[1]


def test_all_25_prescriptions_are_scored(tokens):
    generator = Typist(tokens)
    found = asyncio.run(ActionScorer(TokenBackend(generator, tokens))([1, 2, 3]))
    weights = np.exp(-np.arange(25.0))
    np.testing.assert_allclose(found, weights / weights.sum())
    for action, ids in enumerate(generator.asked):
        (call,) = parse_reply(tokens.text(ids)).tool_calls
        assert read_call(call) == Prescribe(action) and ids[-1] == tokens.end_id


PLAIN = """\
{% for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""ChatML without a word of tools, as SmolLM2's template is."""

SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.fixture(scope="module")
def plain(tokens):
    """A tokenizer whose template ignores tools."""
    tokenizer = copy.deepcopy(tokens._tokenizer)
    tokenizer.chat_template = PLAIN
    return ChatTokens(tokenizer)


@pytest.mark.parity
@pytest.mark.parametrize("begin", [[], SYSTEM])
@pytest.mark.parametrize("tools", [SCHEMAS, ()])
def test_tools_are_said_as_by_qwens_own_template(plain, begin, tools):
    """Beside the published template of Qwen3-Instruct-2507, as TRL carries it."""
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / "qwen3_instruct_2507.jinja"
    tokenizer = copy.deepcopy(plain._tokenizer)
    tokenizer.chat_template = path.read_text()
    qwen = ChatTokens(tokenizer)
    answers = [*TOOL_REPLY, {**TOOL_REPLY[0], "content": "MAP 66, über"}]
    whole = [*begin, *FIRST, {"role": "assistant", "content": CALL}, *answers, *FIRST]
    for messages in ([*begin, *FIRST], whole):
        assert plain.first(messages, tools) == qwen.first(messages, tools)
    assert plain.more(TOOL_REPLY, tools) == qwen.more(TOOL_REPLY, tools)
    assert plain.more(answers, tools) == qwen.more(answers, tools)


def test_a_dialogue_with_a_template_that_ignores_tools(plain):
    """The schemas are read, calls are understood, and nothing is tokenised twice."""
    replies, generator, conversation = talk(plain, [CALL, CALL], FIRST, TOOL_REPLY)
    assert [read_call(reply.tool_calls[0]) for reply in replies] == [Prescribe(7)] * 2
    text = plain.text(generator.prompts[0])
    for tool in SCHEMAS:
        assert json.dumps(tool) in text
    whole = [*FIRST, {"role": "assistant", "content": CALL}, *TOOL_REPLY]
    assert generator.prompts[1] == plain.first(whole, SCHEMAS)
    assert conversation.ids[: len(generator.prompts[1])] == generator.prompts[1]


SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


@pytest.mark.parametrize("thinks", [None, True, False])
def test_thinking_is_a_switch_of_the_template(tokens, thinks):
    tokenizer = copy.deepcopy(tokens._tokenizer)
    with pytest.raises(InputError, match="enable_thinking"):
        ChatTokens(tokenizer, enable_thinking=True)
    tokenizer.chat_template += SWITCH
    switched = ChatTokens(tokenizer, enable_thinking=thinks)
    ends = tokens.encode("<think></think>") if thinks is False else []
    assert switched.first(FIRST, SCHEMAS) == [*tokens.first(FIRST, SCHEMAS), *ends]
    assert switched.more(TOOL_REPLY, SCHEMAS) == [*tokens.more(TOOL_REPLY, SCHEMAS), *ends]


def test_a_thought_that_the_template_opened_and_nobody_closed(tokens):
    tokenizer = copy.deepcopy(tokens._tokenizer)
    tokenizer.chat_template += "<think>\n"
    thinking = ChatTokens(tokenizer)
    replies, *_ = talk(thinking, [f"Hm. {CALL}", f"Hm. {CALL}</think>{CALL}"], FIRST, FIRST)
    assert replies[0].tool_calls == () and replies[0].reasoning == f"Hm. {CALL}"
    assert [read_call(call) for call in replies[1].tool_calls] == [Prescribe(7)]


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match="tokenizer"):
        ChatTokens.load(tmp_path)
