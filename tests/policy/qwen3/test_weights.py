"""Folders in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from policy import qwen3
from policy.testing.tiny_qwen3 import make_tiny
from worldmodel.errors import InputError


def assert_equal(a, b):
    assert nnx.graphdef(a) == nnx.graphdef(b)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


def edit(folder, **tensors):
    """Changes tensors of a folder; None takes one out."""
    stored = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        stored[name] = tensor
    save_file({n: t for n, t in stored.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_model(tmp_path, tied):
    model = qwen3.load(make_tiny(tmp_path / "a", tied=tied, seed=3))
    qwen3.save_hf(model, tmp_path / "b")
    assert_equal(qwen3.load(tmp_path / "b"), model)
    names = set(load_file(tmp_path / "b" / "model.safetensors"))
    assert ("lm_head.weight" in names) != tied
    assert "model.layers.1.self_attn.k_norm.weight" in names
    assert len(names) == 2 * 11 + 2 + (not tied)


@pytest.mark.parity
@pytest.mark.parametrize("max_file_bytes", [2**30, 300_000])
def test_transformers_reads_what_was_saved(
    folder, model, tmp_path, one_torch_thread, max_file_bytes
):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = qwen3.save_hf(model, tmp_path / "saved", source=folder, max_file_bytes=max_file_bytes)
    files = sorted(saved.glob("*.safetensors"))
    assert (len(files) == 1) == (max_file_bytes == 2**30)
    assert all(len(files) == 1 or file.stat().st_size < 400_000 for file in files[1:])
    reloaded, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(report.values())
    assert reloaded.config.rope_parameters["rope_theta"] == 1e6
    ids = np.arange(14)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(ids)).logits
    assert torch.equal(reloaded(torch.tensor(ids)).logits, expected)
    assert_equal(qwen3.load(saved), model)
    assert len(AutoTokenizer.from_pretrained(saved)) == 640
    assert (saved / "generation_config.json").exists()


@pytest.mark.parity
def test_what_transformers_saves_is_read(folder, model, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
        tmp_path / "reloaded", max_shard_size="300KB"
    )
    assert len(list((tmp_path / "reloaded").glob("*.safetensors"))) > 1
    assert_equal(qwen3.load(tmp_path / "reloaded"), model)


def test_bfloat16_stays_bfloat16(tmp_path):
    folder = make_tiny(tmp_path / "a", dtype="bfloat16")
    model = qwen3.load(folder)
    assert model.dtype == model.norm.scale.dtype == jnp.bfloat16
    mixed = qwen3.load(folder, param_dtype=jnp.float32, dtype=jnp.bfloat16)
    assert (mixed.dtype, mixed.norm.scale.dtype) == (jnp.bfloat16, jnp.float32)
    qwen3.save_hf(model, tmp_path / "b")
    assert_equal(qwen3.load(tmp_path / "b"), model)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.fixture
def broken(tmp_path):
    return make_tiny(tmp_path / "broken")


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        qwen3.load(folder)
    assert "\n" not in str(caught.value)
    return True


def test_bad_folders_say_what_is_wrong(broken, tmp_path):
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    assert refused(tmp_path / "nowhere", "nowhere/config.json: no such file")
    edit(broken, **{"model.norm.weight": None})
    assert refused(broken, "tensor model.norm.weight missing")
    weights.write_bytes(whole)
    edit(broken, **{"model.norm.weight": np.ones(3, np.float32)})
    assert refused(broken, r"model.norm.weight gives \(3,\), config.json says \(128,\)")
    weights.write_bytes(whole)
    edit(broken, **{"model.layers.0.self_attn.q_proj.bias": np.ones(3, np.float32)})
    assert refused(broken, "unknown tensor model.layers.0.self_attn.q_proj.bias")
    weights.write_bytes(whole)
    edit(broken, **{"model.norm.weight": np.ones(128, np.int8)})
    assert refused(broken, "weights are F32, I8")
    weights.write_bytes(whole[:-100])
    assert refused(broken, "not readable")
    weights.unlink()
    assert refused(broken, "neither model.safetensors nor")
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}')
    assert refused(broken, "names ../a, which is not in the folder")


def test_nothing_else_is_replaced(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a folder that this would replace"):
        qwen3.save_hf(model, tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        qwen3.save_hf(model, tmp_path / "new", source=tmp_path / "nowhere")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
