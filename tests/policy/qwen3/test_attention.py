"""Attention by blocks: equal to plain attention, forwards and backwards, and nowhere square."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.qwen3 import attention
from policy.qwen3.attention import attend, attend_cache, map_chunks

B, T, H, K, D = 2, 44, 4, 2, 8


def drawn(seed=0, shape=(B, T, H, K, D)):
    batch, length, heads, kv, width = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = [(batch, length, h, width) for h in (heads, kv, kv, heads)]
    return [jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True)]


def plain(q, k, v, segments, shared=None):
    """The definition, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    segments = np.asarray(segments)
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    sees = segments[:, :, None] == segments[:, None, :]
    if shared is not None:
        sees |= np.asarray(shared)[:, None, :]
    sees &= np.tri(q.shape[1], dtype=bool)
    scores = np.where(sees[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights, v)


def dense(q, k, v, segments, shared=None):
    """The same in JAX, for gradients."""
    mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(q.shape[1], dtype=bool)
    if shared is not None:
        mask |= shared[:, None, :] & jnp.tri(q.shape[1], dtype=bool)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def packed():
    """Several segments and padding, otherwise in each row."""
    first = np.repeat([1, 2, 3, 0], [20, 9, 10, 5])
    second = np.repeat([1, 2, 0], [3, 40, 1])
    return jnp.array([first, second])


@pytest.mark.parametrize("block", [None, 44, 16, 7, 1])
@pytest.mark.parametrize("kind", ["one segment", "packed", "shared"])
def test_blocks_change_nothing(kind, block):
    q, k, v, change = drawn()
    segments = jnp.ones((B, T), jnp.int32) if kind == "one segment" else packed()
    shared = segments == 1 if kind == "shared" else None
    real = segments[..., None, None] > 0  # what padding reads means nothing
    found = attend(q, k, v, segments, shared, block=block) * real
    np.testing.assert_allclose(found, plain(q, k, v, segments, shared) * real, atol=2e-6)

    def loss(of, *arrays):
        return jnp.sum(of(*arrays, segments, shared) * change * real)

    got = jax.grad(lambda *x: loss(lambda *a: attend(*a, block=block), *x), (0, 1, 2))(q, k, v)
    expected = jax.grad(lambda *x: loss(dense, *x), (0, 1, 2))(q, k, v)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, _ = drawn(1)
    segments = packed()
    found = attend(30 * q, 30 * k, v, segments, block=8)
    np.testing.assert_allclose(found, plain(30 * q, 30 * k, v, segments), atol=1e-4)


def as_kept(k, v):
    """Keys and values [L, B, T, K, D] as a cache holds them."""
    return jnp.moveaxis(k, 2, 4), jnp.moveaxis(v, 2, 3)


@pytest.mark.parametrize("block", [None, 7, 16, T])  # the last block overlaps with 7 and 16
def test_a_cache_is_read_up_to_the_own_position(block):
    q, k, v, _ = drawn(2)
    whole = plain(q, k, v, jnp.ones((B, T), jnp.int32))
    # The layer before is another, and what no query sees yet may hold anything.
    unseen = (jnp.arange(T) > 32)[None, :, None, None]
    layers = [jnp.stack([jnp.full_like(x, jnp.inf), jnp.where(unseen, 1e9, x)]) for x in (k, v)]
    cached = as_kept(*layers)
    position = jnp.array([[30, 31, 32], [5, 6, 7]])
    rows = jnp.arange(B)[:, None]
    found = attend_cache(q[rows, position], *cached, jnp.int32(1), position, block=block)
    np.testing.assert_allclose(found, whole[rows, position], atol=2e-6)
    everything = jnp.broadcast_to(jnp.arange(T), (B, T))
    found = attend_cache(q, *as_kept(k[None], v[None]), 0, everything, block=block)
    np.testing.assert_allclose(found, whole, atol=2e-6)
    last = jnp.full((B, 1), T - 1)
    found = attend_cache(q[:, -1:], *as_kept(k[None], v[None]), 0, last, block=block)
    np.testing.assert_allclose(found, whole[:, -1:], atol=2e-6)


@pytest.mark.parametrize(("seen", "untouched"), [(5, T - 16), (21, T - 32), (22, 0), (T - 1, 0)])
def test_a_token_that_sees_few_slots_of_a_cache_reads_few(monkeypatch, seen, untouched):
    """Blocks of 16 that nobody sees may hold anything, until half of the cache is seen."""
    monkeypatch.setattr(attention, "CPU_SLOTS", 16)
    q, k, v, _ = drawn(4)
    whole = plain(q, k, v, jnp.ones((B, T), jnp.int32))
    end = T - untouched
    cached = as_kept(*(x.at[:, end:].set(jnp.nan)[None] for x in (k, v)))
    position = jnp.full((B, 1), seen)
    found = attend_cache(q[:, seen : seen + 1], *cached, 0, position)
    np.testing.assert_allclose(found, whole[:, seen : seen + 1], atol=2e-6)


def test_nothing_of_length_by_length_is_in_memory():
    """Neither forwards nor backwards: no array of the program has two axes of the row's length."""
    length = 1000
    arrays = drawn(shape=(1, length, H, K, D))[:3]
    segments = jnp.ones((1, length), jnp.int32)

    def squares(of):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(of(q, k, v, segments)))

        text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arrays).compile().as_text()
        shapes = set(re.findall(r"\w+\[([\d,]+)\]", text))
        return [shape for shape in shapes if shape.split(",").count(str(length)) > 1]

    assert squares(dense) and not squares(attend)


def test_blocks_that_nobody_sees_are_not_computed():
    """Infinite keys of other segments would make everything undefined if they were read."""
    q, k, v, _ = drawn(3)
    segments = jnp.array([np.repeat([1, 2], [22, 22])] * B)
    broken = k.at[:, :22].set(jnp.nan)
    found = attend(q, broken, v, segments, block=11)[:, 22:]
    np.testing.assert_allclose(found, plain(q, k, v, segments)[:, 22:], atol=2e-6)


def test_pieces_are_as_equal_as_can_be():
    widths = []

    def f(x):
        widths.append(x.shape[1])
        return 2 * x

    x = jnp.arange(66.0).reshape(2, 33)
    np.testing.assert_array_equal(map_chunks(f, x, 16), 2 * x)
    assert set(widths) == {11}  # three pieces of 16 would compute 48 columns


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "keys"), [(1, 2), (2, 8), (4, 4)])
def test_gradients_over_several_blocks_in_both_types(dtype, rows, keys):
    shapes = [(rows, 96, heads, 16) for heads in (2 * keys, keys, keys)]
    q, k, v = (jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate(shapes))
    segments = jnp.ones((rows, 96), jnp.int32)

    def gradients(block, *arrays):
        def loss(*arrays):
            return jnp.sum(jnp.sin(attend(*arrays, segments, block=block).astype(jnp.float32)))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    wanted = gradients(96, *(x.astype(jnp.float32) for x in (q, k, v)))
    for found, exact in zip(gradients(32, q, k, v), wanted, strict=True):
        error = jnp.max(jnp.abs(found.astype(jnp.float32) - exact))
        assert error < (1e-5 if dtype == "float32" else 0.05) * jnp.max(jnp.abs(exact))
