"""Llama models beside transformers' own, made by transformers; and beside themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from policy import qwen3
from policy.qwen3 import lora
from policy.qwen3.config import Qwen3Config, RopeScaling
from policy.qwen3.logprobs import token_logprobs
from policy.qwen3.model import frequencies
from policy.qwen3.sampler import Draw, generate
from policy.qwen3.sharding import param_spec
from policy.testing.tiny_qwen3 import make_tiny

IDS = np.random.default_rng(0).integers(3, 200, (2, 48))  # longer than the scaled contexts
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
logits = nnx.jit(qwen3.logits)


def made(folder, *, kind="Llama", theta=1e4, scaling=None, **changes):
    """A random model of transformers, saved, with every parameter drawn."""
    import torch
    import transformers

    values = {
        "vocab_size": 200,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": theta},
    }
    config = getattr(transformers, f"{kind}Config")(**values | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # all alike otherwise
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def of_torch(model, ids=IDS):
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("changes", "tensors"),
    [
        ({"tie_word_embeddings": True}, 2 * 9 + 2),
        ({"num_key_value_heads": 4, "theta": 1e6}, 2 * 9 + 3),
        ({"num_key_value_heads": 1, "head_dim": 20, "scaling": LLAMA3, "theta": 5e5}, 2 * 9 + 3),
        ({"scaling": LINEAR, "tie_word_embeddings": True}, 2 * 9 + 2),
        ({"attention_bias": True}, 2 * 13 + 3),
        ({"kind": "Qwen3", "head_dim": 16, "attention_bias": True, "scaling": LINEAR}, 2 * 15 + 3),
    ],
    ids=["tied", "untied", "llama3", "linear", "bias", "qwen3"],
)
def test_logits_and_files_are_those_of_transformers(tmp_path, one_torch_thread, changes, tensors):
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    expected = of_torch(made(tmp_path / "theirs", **changes))
    model = qwen3.load(tmp_path / "theirs")
    np.testing.assert_allclose(logits(model, IDS), expected, atol=1e-4)
    saved = qwen3.save_hf(model, tmp_path / "saved")
    assert len(load_file(saved / "model.safetensors")) == tensors
    reloaded, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(report.values())
    np.testing.assert_array_equal(of_torch(reloaded), expected)
    again = qwen3.load(saved)
    assert nnx.graphdef(again) == nnx.graphdef(model)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """Ours, with all that a Llama may have and a Qwen3 has not."""
    folder = make_tiny(
        tmp_path_factory.mktemp("llama") / "tiny",
        model_type="llama",
        rope_scaling=RopeScaling(**LLAMA3),
        attention_bias=True,
        initializer_range=0.1,
    )
    return qwen3.load(folder)


def test_a_scaling_is_by_hand_what_was_published():
    """Llama 3.1: kept, interpolated and divided frequencies (arXiv 2407.21783 and its code)."""
    figures = {name: 4 for name in ("vocab_size", "hidden_size", "intermediate_size")}
    figures |= {name: 1 for name in ("num_hidden_layers", "num_attention_heads")}
    config = Qwen3Config(
        **figures,
        num_key_value_heads=1,
        head_dim=6,
        rope_theta=1e3,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 100),
        model_type="llama",
    )
    # 1, 0.1 and 0.01 radians per token turn 15.9, 1.59 and 0.159 times in 100 tokens.
    share = (100 * 0.1 / (2 * np.pi) - 1) / 3
    expected = [1, 0.1 * (share + (1 - share) / 8), 0.01 / 8]
    np.testing.assert_allclose(frequencies(config), expected, rtol=1e-6)


def test_cached_sampling_and_log_probabilities_agree(scaled):
    """What the sampler says of its tokens is what whole sequences say, far beyond 16 positions."""
    prompts = [tuple(IDS[0, :30].tolist()), tuple(IDS[1, :17].tolist())]
    drawn = generate(
        scaled,
        [Draw(ids, seed=seed, max_completion_length=8) for seed, ids in enumerate(prompts)],
    )
    for prompt, reply in zip(prompts, drawn, strict=True):
        ids = np.zeros((1, 40), int)
        whole = [*prompt, *reply.token_ids]
        ids[0, : len(whole)] = whole
        found = token_logprobs(scaled, ids).logprob[0, len(prompt) : len(whole)]
        np.testing.assert_allclose(found, reply.model_logprobs, atol=1e-4)


def test_adapters_and_gradients(scaled, tmp_path):
    tuned = lora.add_adapters(scaled, rank=2, alpha=4.0, rngs=nnx.Rngs(0))
    for linear in lora.adapted(tuned).values():
        linear.adapter.b[...] = jnp.full(linear.adapter.b.shape, 0.02)
    expected = logits(tuned, IDS)
    assert float(jnp.abs(expected - logits(scaled, IDS)).max()) > 0.1
    np.testing.assert_allclose(logits(lora.merge_adapters(tuned), IDS), expected, atol=1e-4)
    folder = lora.save_adapters(tuned, tmp_path / "adapter", base="tiny")
    np.testing.assert_array_equal(logits(lora.load_adapters(scaled, folder), IDS), expected)
    graphdef, state = nnx.split(scaled)

    def loss(state):
        return token_logprobs(nnx.merge(graphdef, state), IDS).logprob.sum()

    flat = dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(state)))
    # A bias of all keys alike shifts every score of a query, which its softmax does not see.
    assert {key for key, leaf in flat.items() if float(jnp.abs(leaf[...]).max()) < 1e-4} <= {
        ("layers", "self_attn", "k_proj", "bias")
    }


@pytest.mark.parametrize(
    ("name", "spec"),
    [("q_proj", PartitionSpec(None, "tensor")), ("o_proj", PartitionSpec())],
)
def test_biases_lie_with_their_heads(name, spec):
    assert param_spec(("layers", "self_attn", name, "bias"), 2) == spec
