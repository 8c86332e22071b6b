"""The model beside transformers' own, and beside itself packed, cached and in blocks."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from policy import qwen3
from policy.qwen3.model import product
from policy.testing.tiny_qwen3 import make_tiny

IDS = np.random.default_rng(0).integers(0, 640, (2, 23))


def torch_logits(folder, ids):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("theta", "tied", "heads", "kv_heads"),
    [(1e4, True, 4, 2), (1e6, False, 4, 1), (5e6, True, 2, 2)],
)
def test_logits_are_those_of_transformers(tmp_path, one_torch_thread, theta, tied, heads, kv_heads):
    folder = make_tiny(
        tmp_path / "tiny",
        rope_theta=theta,
        tied=tied,
        heads=heads,
        kv_heads=kv_heads,
        initializer_range=0.1,
    )
    model = qwen3.load(folder)
    assert (model.lm_head is None) == tied
    found = nnx.jit(qwen3.logits)(model, IDS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, torch_logits(folder, IDS), atol=1e-4)


@pytest.fixture(scope="module")
def plain(model):
    """Logits of single sequences, all by one program."""
    run = nnx.jit(qwen3.logits)

    def logits(*parts, model=model):
        sequence = np.concatenate(parts)
        padded = np.zeros((2, 23), int)
        padded[:, : len(sequence)] = sequence
        return np.asarray(run(model, padded))[0, : len(sequence)]

    return logits


@pytest.fixture(scope="module")
def packed(model):
    """Logits of one row of segments, all by one program."""
    run = nnx.jit(qwen3.logits)

    def logits(ids, positions, segments, shared=None):
        segments = np.array([segments])
        shared = np.zeros_like(segments) if shared is None else segments == shared
        where = {"positions": np.array([positions]), "segments": segments, "shared": shared > 0}
        return np.asarray(run(model, np.array([ids]), **where))[0]

    return logits


def test_theta_is_not_ignored(model, plain):
    """Far positions differ much between bases; the truth above would not hold by chance."""
    other = nnx.clone(model)
    other.config = dataclasses.replace(model.config, rope_theta=1e4)
    assert np.abs(plain(IDS[0]) - plain(IDS[0], model=other)).max() > 0.05


def test_packed_sequences_equal_separate_ones(plain, packed):
    a, b = IDS[0, :9], IDS[1, :6]
    found = packed([*a, *b, 0, 0, 0], [*range(9), *range(6), 0, 0, 0], [1] * 9 + [2] * 6 + [0] * 3)
    np.testing.assert_allclose(found[:9], plain(a), atol=1e-5)
    np.testing.assert_allclose(found[9:15], plain(b), atol=1e-5)
    assert np.isfinite(found).all()


def test_continuations_after_a_shared_prompt_equal_whole_sequences(plain, packed):
    prompt, a, b = IDS[0, :8], IDS[0, 8:14], IDS[1, :4]
    found = packed(
        [*prompt, *a, *b],
        [*range(8), *range(8, 14), *range(8, 12)],
        [1] * 8 + [2] * 6 + [3] * 4,
        shared=1,
    )
    np.testing.assert_allclose(found[:14], plain(prompt, a), atol=1e-5)
    np.testing.assert_allclose(found[14:], plain(prompt, b)[8:], atol=1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_a_cache_changes_nothing(model, plain, apart):
    """Rows of different lengths, padded, then read on token by token."""
    whole = [plain(row) for row in IDS]
    length = np.array([12, 5])
    padded = np.where(np.arange(12) < length[:, None], IDS[:, :12], 7)

    @nnx.jit
    def extend(model, ids, start, cache):
        hidden, cache = model.extend(ids, start, cache)
        return model.logits(hidden), cache

    cache = (model.empty_caches if apart else model.empty_cache)(2, 32)
    first, cache = extend(model, padded, jnp.zeros(2, jnp.int32), cache)
    for row in range(2):
        np.testing.assert_allclose(first[row, : length[row]], whole[row][: length[row]], atol=1e-5)
    for _ in range(4):
        tokens = IDS[np.arange(2), length][:, None]
        logits, cache = extend(model, tokens, jnp.asarray(length), cache)
        for row in range(2):
            np.testing.assert_allclose(logits[row, 0], whole[row][length[row]], atol=1e-5)
        length = length + 1


def test_blocks_of_tokens_and_rematerialisation_change_nothing(model, monkeypatch):
    monkeypatch.setattr("policy.qwen3.model.MLP_TOKENS", 7)  # the last piece is filled up
    graphdef, state = nnx.split(model)
    segments = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2]), jnp.array([11, 12])), IDS.shape)

    def loss(state, **settings):
        hidden = nnx.merge(graphdef, state).hidden(IDS, segments=segments, **settings)
        return jnp.sum(jnp.sin(hidden))

    plain = jax.jit(jax.value_and_grad(loss))(state)
    other = jax.jit(jax.value_and_grad(partial(loss, remat="full", attention_block=5)))(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), plain, other)


def test_bfloat16_is_close_and_keeps_float32_where_it_matters(folder, plain):
    half = qwen3.load(folder, dtype=jnp.bfloat16)
    assert half.norm.scale.dtype == jnp.float32
    assert jax.eval_shape(half.hidden, IDS).dtype == jnp.bfloat16
    logits = nnx.jit(qwen3.logits)(half, IDS)
    assert logits.dtype == jnp.float32
    full = plain(IDS[0])
    assert np.abs(logits[0] - full).mean() < 0.03 * np.abs(full).mean()


@pytest.mark.parametrize(
    ("dtype", "result"), [("float32", None), ("bfloat16", None), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_products_have_the_gradients_of_matmul(dtype, result, leading):
    draw = partial(jax.random.normal, dtype=dtype)
    x, kernel = draw(jax.random.key(0), (*leading, 4)), draw(jax.random.key(1), (4, 6))

    def gradients(multiply):
        def loss(x, kernel):
            y = multiply(x, kernel)
            assert y.dtype == (result or dtype)
            return jnp.sum(jnp.sin(y.astype(jnp.float32)))

        return jax.value_and_grad(loss, (0, 1))(x, kernel)

    found = gradients(lambda x, kernel: product(x, kernel, result))
    wanted = gradients(partial(jnp.matmul, preferred_element_type=result))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (a, b)), rtol=1e-2)


def compiled_gradient(config):
    """The optimised program on 3 x 32 tokens."""
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))

    def loss(model, ids):
        return jnp.sum(model.hidden(ids) ** 2)

    graphdef, state = nnx.split(model)
    ids = jnp.zeros((3, 32), jnp.int32)
    gradient = jax.jit(lambda state: jax.grad(lambda s: loss(nnx.merge(graphdef, s), ids))(state))
    return gradient.lower(state).compile().as_text()


def test_gradients_of_kernels_turn_no_activations_around(model):
    config = dataclasses.replace(model.config, hidden_size=48, intermediate_size=80)
    text = compiled_gradient(config)
    assert "f32[96,80]" in text  # tokens of all rows by the MLP's width
    assert not re.search(r"f32\[(48|80),(96|3,32)\]", text)


def test_elementwise_values_are_not_kept_for_the_backward_pass(model):
    config = dataclasses.replace(model.config, hidden_size=48, intermediate_size=80)
    text = compiled_gradient(config)
    carried = re.findall(r"= \((.*?)\) while\(", text)
    layers = config.num_hidden_layers
    kept = max(carry.count(f"f32[{layers},3,32,80]") for carry in carried)
    assert kept == 2  # gate and up alone
