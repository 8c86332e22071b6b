"""config.json of transformers 4 and 5; nothing that is not implemented passes."""

import json

import pytest

from policy.qwen3.config import Qwen3Config, RopeScaling, load_config, load_stop_ids
from worldmodel.errors import InputError

OLD = {  # as transformers 4 writes it
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
NEW = {name: value for name, value in OLD.items() if not name.startswith("rope")} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000000},
    "layer_types": ["full_attention"] * 36,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_both_spellings_give_the_same():
    old = Qwen3Config.from_hf(OLD, source="old")
    assert old == Qwen3Config.from_hf(NEW, source="new")
    assert old.rope_theta == 5e6
    assert old.tie_word_embeddings and old.num_key_value_heads == 8
    assert old.qk_norm and old.rope_scaling is None
    assert Qwen3Config.from_hf(old.to_hf(dtype="bfloat16"), source="test") == old


def test_llama_files_leave_much_out():
    """As Llama 2 was published, and Llama 3.1."""
    bare = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096}
    bare |= {"intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    found = Qwen3Config.from_hf(bare, source="test")
    assert (found.head_dim, found.num_key_value_heads, found.rope_theta) == (128, 32, 1e4)
    assert not (found.qk_norm or found.tie_word_embeddings or found.attention_bias)
    scaled = bare | {"rope_theta": 5e5, "rope_scaling": LLAMA3, "num_key_value_heads": 8}
    found = Qwen3Config.from_hf(scaled, source="test")
    assert found.rope_scaling == RopeScaling(**LLAMA3)
    new = bare | {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "num_key_value_heads": 8}
    assert found == Qwen3Config.from_hf(new, source="test")
    written = found.to_hf(dtype="bfloat16")
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert Qwen3Config.from_hf(written, source="test") == found
    old_name = bare | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert Qwen3Config.from_hf(old_name, source="test").rope_scaling == RopeScaling("linear", 2.0)
    with pytest.raises(InputError, match="head_dim missing"):
        Qwen3Config.from_hf(bare | {"num_attention_heads": 0}, source="test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "only qwen3 and llama"),
        ({"model_type": "qwen3_moe"}, "only qwen3 and llama"),
        ({"attention_bias": "yes"}, "attention_bias = 'yes'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["sliding_attention"] * 36}, "sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "only linear, llama3 are"),
        ({"rope_scaling": {"type": "linear"}}, "factor = None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "expected at least 1"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "not below"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": "1"}}, "low_freq_factor = '1'"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 2.0}},
            "rope_scaling has several values",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e6}}, "yarn"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "several values"),
        ({"rope_theta": None}, "rope_theta missing"),
        ({"head_dim": None, "vocab_size": None}, "vocab_size, head_dim missing"),
        ({"hidden_size": "2560"}, "hidden_size = '2560'"),
        ({"num_key_value_heads": 5}, "no multiple"),
    ],
)
def test_what_is_not_implemented_is_refused(change, message):
    with pytest.raises(InputError, match=message) as caught:
        Qwen3Config.from_hf(OLD | change, source="some/config.json")
    assert "\n" not in str(caught.value)


def test_folders(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="JSON object"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    assert load_config(tmp_path).hidden_size == 2560
    assert load_stop_ids(tmp_path) == (151645,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    assert load_stop_ids(tmp_path) == (151645, 151643)
