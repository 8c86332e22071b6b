"""config.json of transformers 4 and 5; nothing that is not implemented passes."""

import json

import pytest

from policy.qwen3.config import Qwen3Config, load_config, load_stop_ids
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


def test_both_spellings_give_the_same():
    old = Qwen3Config.from_hf(OLD, source="old")
    assert old == Qwen3Config.from_hf(NEW, source="new")
    assert old.rope_theta == 5e6
    assert old.tie_word_embeddings and old.num_key_value_heads == 8
    assert Qwen3Config.from_hf(old.to_hf(dtype="bfloat16"), source="test") == old


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "only qwen3"),
        ({"model_type": "qwen3_moe"}, "only qwen3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["sliding_attention"] * 36}, "sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
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
