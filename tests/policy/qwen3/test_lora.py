"""Adapters change nothing until trained, and go into weights and files without loss."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from policy import qwen3
from policy.qwen3 import lora
from worldmodel.errors import InputError

IDS = np.random.default_rng(0).integers(0, 640, (2, 9))
logits = nnx.jit(qwen3.logits)


@pytest.fixture(scope="module")
def fresh(model):
    return lora.add_adapters(
        model, rank=4, alpha=8.0, rngs=nnx.Rngs(0), targets=["q_proj", "v_proj", "down_proj"]
    )


@pytest.fixture(scope="module")
def trained(fresh):
    """As if trained: `b` is no longer zero."""
    tuned = nnx.clone(fresh)
    draw = np.random.default_rng(1)
    for linear in lora.adapted(tuned).values():
        shape = linear.adapter.b.shape
        linear.adapter.b[...] = jnp.asarray(0.1 * draw.standard_normal(shape), jnp.float32)
    return tuned


def test_nothing_changes_at_first(model, fresh):
    kernel = model.layers.mlp.up_proj.kernel[...]
    assert fresh.layers.mlp.up_proj.kernel[...] is kernel  # nothing was copied
    np.testing.assert_array_equal(logits(fresh, IDS), logits(model, IDS))
    assert not lora.adapted(model)  # the given model is as it was


def test_only_adapters_have_gradients(fresh):
    graphdef, adapters, rest = nnx.split(fresh, nnx.LoRAParam, ...)
    assert len(jax.tree.leaves(adapters)) == 6

    @jax.jit
    @jax.grad
    def gradient(adapters):
        return qwen3.logits(nnx.merge(graphdef, adapters, rest), IDS).std()

    flat = dict(nnx.to_flat_state(gradient(adapters)))
    assert all(bool(jnp.any(value[...] != 0)) == (key[-1] == "b") for key, value in flat.items())


def test_merged_equals_unmerged(model, trained):
    expected = logits(trained, IDS)
    assert float(jnp.abs(expected - logits(model, IDS)).max()) > 0.1
    merged = lora.merge_adapters(trained)
    assert nnx.graphdef(merged) == nnx.graphdef(model)
    np.testing.assert_allclose(logits(merged, IDS), expected, atol=1e-4)
    np.testing.assert_array_equal(logits(trained, IDS), expected)  # which is as it was


def test_a_saved_model_has_its_adapters_merged(trained, tmp_path):
    saved = qwen3.load(qwen3.save_hf(trained, tmp_path / "merged"))
    np.testing.assert_allclose(logits(saved, IDS), logits(trained, IDS), atol=1e-4)


def test_files_are_those_of_peft(model, trained, tmp_path):
    folder = lora.save_adapters(trained, tmp_path / "adapter", base="tiny")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (settings["r"], settings["lora_alpha"]) == (4, 8.0)
    assert settings["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 2  # layers, targets, A and B
    prefix = "base_model.model.model.layers.1"
    assert tensors[f"{prefix}.self_attn.q_proj.lora_A.weight"].shape == (4, 128)
    assert tensors[f"{prefix}.mlp.down_proj.lora_B.weight"].shape == (128, 4)
    # PEFT's meaning of them: W + alpha / r * B A, all as torch's [out, in]
    base = model.layers.self_attn.v_proj.kernel[1].T
    a, b = (tensors[f"{prefix}.self_attn.v_proj.lora_{letter}.weight"] for letter in "AB")
    merged = lora.merge_adapters(trained).layers.self_attn.v_proj.kernel[1].T
    np.testing.assert_allclose(merged, base + 2.0 * b @ a, atol=1e-6)
    again = lora.load_adapters(model, folder)
    assert nnx.graphdef(again) == nnx.graphdef(trained)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(trained))


def test_bad_requests_and_folders(model, trained, tmp_path):
    settings = {"rank": 4, "alpha": 8.0, "rngs": nnx.Rngs(0)}
    with pytest.raises(InputError, match="lm_head"):
        lora.add_adapters(model, **settings, targets=["lm_head"])
    with pytest.raises(InputError, match="rank: got 0"):
        lora.add_adapters(model, **(settings | {"rank": 0}))
    with pytest.raises(InputError, match="already"):
        lora.add_adapters(trained, **settings)
    with pytest.raises(InputError, match="no adapters to save"):
        lora.save_adapters(model, tmp_path / "none", base="tiny")
    with pytest.raises(InputError, match="no such file"):
        lora.load_adapters(model, tmp_path)
    folder = lora.save_adapters(trained, tmp_path / "adapter", base="tiny")
    written = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "not the settings"),
        ({"r": 8}, r"expected \(8, 128\)"),
        ({"target_modules": ["q_proj"]}, "unknown tensor"),
        ({"target_modules": "all-linear"}, "malformed"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(written | change))
        with pytest.raises(InputError, match=message):
            lora.load_adapters(model, folder)
