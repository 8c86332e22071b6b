"""The loss beside plain sums and beside transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy import qwen3
from policy.qwen3.model import logits
from policy.train.data.packing import Dialogue, pack, written
from policy.train.losses import cross_entropy
from tests.policy.train.conftest import stay_of

summed_up = jax.jit(cross_entropy)


@pytest.fixture(scope="module")
def model(untaught):
    return qwen3.load(untaught)


def test_by_hand(model):
    one = Dialogue(np.array([5, 6, 7, 8], np.int32), np.array([False, True, False, True]))
    rows = pack([one], 6, seed=0)
    found = summed_up(model, rows)
    scores = np.asarray(jax.jit(logits)(model, jnp.asarray(one.ids)[None]))[0].astype(np.float64)
    by_hand = 0.0
    for before, target in ((0, 6), (2, 8)):  # tokens 1 and 3, each from what stands before it
        shifted = scores[before] - scores[before].max()
        by_hand -= shifted[target] - np.log(np.exp(shifted).sum())
    assert float(found.weight) == 2
    np.testing.assert_allclose(float(found.total), by_hand, rtol=1e-5)


def test_a_first_token_counts_for_nothing(model):
    spoken = Dialogue(np.array([5, 6], np.int32), np.array([True, True]))
    assert float(summed_up(model, pack([spoken], 6, seed=0)).weight) == 1


def test_packed_dialogues_do_not_see_each_other(model, tokens):
    members = [one for n in (1, 2) for one in written(stay_of(n, n), tokens)]
    length = sum(map(len, members))
    together = summed_up(model, pack(members, length, seed=0))
    alone = [summed_up(model, pack([one], length, seed=0)) for one in members]
    assert float(together.weight) == sum(float(part.weight) for part in alone)
    np.testing.assert_allclose(
        float(together.total), sum(float(part.total) for part in alone), rtol=1e-5
    )

    def loss(model, rows):
        return cross_entropy(model, rows).total

    gradient = jax.jit(jax.grad(loss))
    packed = gradient(model, pack(members, length, seed=0))
    parts = [gradient(model, pack([one], length, seed=0)) for one in members]
    added = jax.tree.map(jnp.add, *parts)
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(added), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()) + 1e-6)


@pytest.mark.parity
def test_beside_transformers(untaught, model, tokens):
    torch = pytest.importorskip("torch")
    from transformers import Qwen3ForCausalLM

    (found,) = written(stay_of(2, 3), tokens)
    reference = Qwen3ForCausalLM.from_pretrained(str(untaught), dtype=torch.float32)
    ids = torch.tensor(found.ids.tolist())[None]
    labels = torch.where(torch.tensor(found.own.tolist())[None], ids, -100)
    with torch.no_grad():
        expected = float(reference(input_ids=ids, labels=labels).loss)
    rows = jax.tree.map(jnp.asarray, pack([found], len(found) + 7, seed=0))
    chunked = jax.jit(partial(cross_entropy, chunk=64))(model, rows)
    assert abs(float(chunked.total / chunked.weight) - expected) < 1e-5
