"""Tiny folders are read like real ones."""

import json

import pytest

from policy.testing.tiny_qwen3 import CHAT_TEMPLATE, MARKUP_TOKENS, SPECIAL_TOKENS, make_tiny

TOOLS = [{"type": "function", "function": {"name": "predict", "parameters": {"type": "object"}}}]
CALL = {"function": {"name": "predict", "arguments": {"iv_fluid": 2, "note": 'a "b"'}}}
DIALOGUE = [
    {"role": "system", "content": "You treat sepsis."},
    {"role": "user", "content": "lactate: 4.1 mmol/L"},
    {"role": "assistant", "content": "I ask.", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sofa": 7}'},
    {"role": "tool", "content": '{"sofa": 8}'},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("qwen3") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_text_survives_its_tokens(tokenizer):
    text = 'FiO₂ 0.5, "lactate": 4.1\n<tool_call>\n{"name": "predict"}\n</tool_call>'
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text  # calls are kept
    assert len(tokenizer("mean blood pressure").input_ids) < 8


def test_special_tokens_are_single_and_where_generation_expects_them(folder, tokenizer):
    for token in (*SPECIAL_TOKENS, *MARKUP_TOKENS):
        assert len(tokenizer(token).input_ids) == 1
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) <= json.loads((folder / "config.json").read_text())["vocab_size"]


def test_the_template_is_chatml_with_calls_that_parse(tokenizer):
    text = tokenizer.apply_chat_template(
        DIALOGUE, tools=TOOLS, add_generation_prompt=True, tokenize=False
    )
    turns = text.split("<|im_start|>")[1:]
    assert [turn.split("\n")[0] for turn in turns] == [
        *("system", "user", "assistant", "user", "assistant")
    ]
    assert json.dumps(TOOLS[0]) in turns[0]
    assert turns[1] == "user\nlactate: 4.1 mmol/L<|im_end|>\n"
    before, after = turns[2].split("<tool_call>\n")
    assert before == "assistant\nI ask.\n"
    assert after.endswith("\n</tool_call><|im_end|>\n")
    assert json.loads(after.split("\n</tool_call>")[0]) == CALL["function"]
    assert turns[3] == (
        'user\n<tool_response>\n{"sofa": 7}\n</tool_response>'
        '\n<tool_response>\n{"sofa": 8}\n</tool_response><|im_end|>\n'
    )
    assert turns[4] == "assistant\n"


def test_a_dialogue_only_grows(tokenizer):
    """What was said is a prefix of what is said later, whatever comes next."""

    def text(count, prompt):
        return tokenizer.apply_chat_template(
            DIALOGUE[:count], tools=TOOLS, add_generation_prompt=prompt, tokenize=False
        )

    assert text(3, False).startswith(text(2, True))
    assert text(5, True).startswith(text(3, False))
    assert "system" not in tokenizer.apply_chat_template(DIALOGUE[1:2], tokenize=False)
    assert "Qwen" not in CHAT_TEMPLATE


def test_equal_seeds_make_equal_folders(folder, tmp_path):
    again, other = make_tiny(tmp_path / "a"), make_tiny(tmp_path / "b", seed=1)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()
