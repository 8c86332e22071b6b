"""Stochastic rounding: unbiased, exact where bfloat16 is, and small updates that arrive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy import qwen3
from policy.train.loop.learner import Learner
from policy.train.loop.optimizer import LearnerConfig, round_stochastically, store, widen
from policy.train.losses import Summed


def neighbours(x):
    """The two bfloat16 numbers around each float32, as float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    low = (bits & 0xFFFF0000).view(np.float32)
    return low, ((bits & 0xFFFF0000) + 0x10000).view(np.float32)


def test_the_mean_over_keys_is_the_value():
    x = jax.random.normal(jax.random.key(0), (200,)) * 10.0 ** jnp.arange(-4, 1).repeat(40)
    draws = 4000
    keys = jax.random.split(jax.random.key(1), draws)
    rounded = np.asarray(jax.vmap(round_stochastically, (None, 0))(x, keys), np.float64)
    low, high = neighbours(x)
    assert np.all((rounded == low) | (rounded == high))
    share = (np.asarray(x, np.float64) - low) / (np.asarray(high, np.float64) - low)
    error = np.sqrt(share * (1 - share) / draws) * np.abs(np.asarray(high, np.float64) - low)
    z = (rounded.mean(0) - np.asarray(x, np.float64)) / error
    assert np.abs(z).max() < 4.5
    assert 0.8 < z.std() < 1.2  # no less random than it should be


def test_what_needs_no_rounding_stays():
    exact = jnp.array([0.0, -0.0, 1.0, -2.5, 3.0e38, 1e-40], jnp.bfloat16)
    x = jnp.append(exact.astype(jnp.float32), jnp.array([jnp.inf, -jnp.inf, jnp.nan]))
    for seed in range(20):
        rounded = round_stochastically(x, jax.random.key(seed))
        np.testing.assert_array_equal(rounded.astype(jnp.float32), x)


def test_store_gives_back_the_types_it_is_shown():
    like = {"a": jnp.zeros((50,), jnp.bfloat16), "b": jnp.zeros((50,), jnp.bfloat16)}
    like |= {"f": jnp.zeros(3), "n": jnp.int32(0)}
    tree = {"a": jnp.full(50, 1.003), "b": jnp.full(50, 1.003), "f": jnp.ones(3) / 3}
    tree |= {"n": jnp.int32(5)}
    found = store(tree, like, jax.random.key(0))
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, like)
    np.testing.assert_array_equal(found["f"], tree["f"])
    assert int(found["n"]) == 5
    assert not np.array_equal(found["a"], found["b"])  # a key of its own for each leaf
    assert widen(found)["a"].dtype == jnp.float32


def drift(model, rows):
    """A loss whose gradient is 1 for every embedding, whatever they are."""
    total = jnp.sum(model.embed_tokens.embedding[...].astype(jnp.float32)) * rows
    return Summed(total, jnp.float32(1), {})


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_small_updates_arrive_on_average(untaught, moment_dtype):
    model = qwen3.load(untaught)
    config = LearnerConfig(
        max_steps=50,
        learning_rate=1e-5,
        warmup_steps=0,
        final_share=1.0,
        weight_decay=0.0,
        logging_steps=50,
        param_dtype="bfloat16",
        moment_dtype=moment_dtype,
    )
    learner = Learner(model, drift, config)
    before = jax.tree.map(np.asarray, widen(learner.state.params))
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(learner.state.params)}
    assert kinds == {"bfloat16", "float32"}  # the norms
    learner.run([np.float32(1)] * 50)
    after = widen(learner.state.params)
    moved = np.asarray(
        after["embed_tokens"]["embedding"][...] - before["embed_tokens"]["embedding"][...]
    )
    # 50 Adam steps of -1e-5; to nearest, none of those at 0.1 would move at all.
    np.testing.assert_allclose(moved.mean(), -50e-5, rtol=0.05)
    assert np.abs(moved).max() < 0.1
    for leaf in jax.tree.leaves(learner.state.optimizer[1][0].nu["layers"]["mlp"]):
        assert leaf.dtype.name == moment_dtype


def test_equal_seeds_round_alike(untaught):
    model = qwen3.load(untaught)

    def embedding(seed):
        config = LearnerConfig(
            max_steps=2, warmup_steps=0, logging_steps=2, param_dtype="bfloat16", seed=seed
        )
        learner = Learner(model, drift, config)
        learner.run([np.float32(1)] * 2)
        return np.asarray(learner.state.params["embed_tokens"]["embedding"][...])

    assert np.array_equal(embedding(0), embedding(0))
    assert not np.array_equal(embedding(0), embedding(1))


def test_gradients_of_embeddings_are_summed_in_float32(untaught):
    """A token that is read 1,000 times gets 1,000 gradients, which bfloat16 would not add up."""
    model = qwen3.load(untaught)
    config = LearnerConfig(max_steps=1, warmup_steps=0, max_grad_norm=1e9, param_dtype="bfloat16")

    def reading(model, ids):
        return Summed(jnp.sum(model.embed_tokens(ids)), jnp.float32(1), {})

    learner = Learner(model, reading, config)
    learner.update(np.full((1, 1, 1000), 7))
    first = learner.state.optimizer[1][0].mu["embed_tokens"]["embedding"][...]
    np.testing.assert_allclose(first[7], (1 - config.adam_beta1) * 1000, rtol=1e-6)
