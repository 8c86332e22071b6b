"""Log-probabilities piece by piece equal those of whole logits, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from policy import qwen3
from policy.qwen3.logprobs import chunked_logprobs, token_logprobs

TARGETS = np.random.default_rng(0).integers(0, 50, (2, 11))


@pytest.fixture
def hidden(key):
    return jax.random.normal(key, (2, 11, 8))


@pytest.fixture
def head(key):
    return jax.random.normal(jax.random.fold_in(key, 1), (8, 50))


def plain(hidden, head, temperature):
    logprobs = jax.nn.log_softmax(hidden @ head / temperature)
    logprob = jnp.take_along_axis(logprobs, TARGETS[..., None], axis=-1)[..., 0]
    return logprob, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


@pytest.mark.parametrize("chunk", [4, None])
def test_values_and_gradients(hidden, head, chunk):
    weights = jnp.arange(22.0).reshape(2, 11)

    def loss(function, hidden, head):
        logprob, entropy, *_ = function(hidden, head)
        return jnp.sum(weights * logprob) + jnp.sum(entropy)

    def chunked(hidden, head):
        return chunked_logprobs(hidden, head, TARGETS, temperature=0.7, chunk=chunk)

    expected = plain(hidden, head, 0.7)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        tuple(chunked(hidden, head))[:2],
        expected,
    )
    gradients = jax.grad(loss, argnums=(1, 2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        gradients(chunked, hidden, head),
        gradients(lambda hidden, head: plain(hidden, head, 0.7), hidden, head),
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_of_wanted_tokens_alone(hidden, head, share):
    wanted = jnp.asarray(np.random.default_rng(1).random((2, 11)) < share)
    weights = jnp.arange(22.0).reshape(2, 11)

    def loss(hidden, head, wanted_only):
        found = chunked_logprobs(
            hidden, head, TARGETS, choices=(3, 7), wanted=wanted if wanted_only else None
        )
        each = weights * found.logprob + found.entropy + found.choices.sum(-1)
        return jnp.sum(jnp.where(wanted, each, 0.0))

    both = [jax.value_and_grad(loss, (0, 1))(hidden, head, only) for only in (True, False)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *both)


def test_what_is_not_wanted_costs_nothing(hidden, head):
    """Pieces without a wanted token are not computed: a NaN there would reach the gradient."""
    wanted = jnp.zeros((2, 11), bool).at[:, 5].set(True)

    def loss(hidden):
        found = chunked_logprobs(hidden, head, TARGETS, wanted=wanted, chunk=1)
        return found.logprob[:, 5].sum()

    spoiled = hidden.at[:, 6:].set(jnp.nan)
    assert np.isfinite(jax.grad(loss)(spoiled)).all()


def test_no_array_of_all_logits(hidden):
    """Of a large vocabulary only a piece's logits exist, in both directions."""
    batch, length, vocab, chunk = 2, 64, 5000, 4
    hidden = jnp.zeros((batch, length, 8))

    def loss(hidden, head):
        return chunked_logprobs(hidden, head, jnp.zeros((batch, length), int), chunk=chunk)[0].sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, jnp.zeros((8, vocab))).compile()
    assert program.memory_analysis().temp_size_in_bytes < batch * length * vocab * 4 / 2


def test_of_a_model_with_packed_sequences(model):
    ids = np.array([[5, 9, 3, 7, 4, 8, 0, 0]])
    segments = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    positions = np.array([[0, 1, 2, 3, 0, 1, 0, 0]])
    found = token_logprobs(model, ids, positions=positions, segments=segments, temperature=0.5)
    logits = qwen3.logits(model, ids, positions=positions, segments=segments)
    logprobs = jax.nn.log_softmax(logits / 0.5)
    expected = [0.0, *(logprobs[0, at, ids[0, at + 1]] for at in range(3)), 0.0]
    expected += [logprobs[0, 4, 8], 0.0, 0.0]
    np.testing.assert_allclose(found.logprob[0], expected, atol=1e-5)
    assert (np.asarray(found.entropy[0]) > 0).tolist() == [value != 0 for value in expected]


def test_gradients_reach_every_parameter(model):
    graphdef, state = nnx.split(model)

    def loss(state):
        merged = nnx.merge(graphdef, state)
        return token_logprobs(merged, TARGETS, remat="full").logprob.sum()

    gradients = jax.jit(jax.grad(loss))(state)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients))
