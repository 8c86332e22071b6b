"""Generation equals transformers' where it is greedy, and its own distribution where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from policy import qwen3
from policy.qwen3 import sampler
from policy.qwen3.config import Qwen3Config
from policy.qwen3.lora import add_adapters
from policy.qwen3.model import Cache, Qwen3
from policy.qwen3.prefix_cache import PrefixCache
from policy.qwen3.sampler import Draw, draw_token, generate, nucleus, score
from worldmodel.errors import InputError
from worldmodel.resources import bucket

RNG = np.random.default_rng(0)
PROMPTS = [tuple(RNG.integers(0, 640, count).tolist()) for count in (3, 17, 30)]
NEW = 12


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, [Draw(ids, temperature=0, max_completion_length=NEW) for ids in PROMPTS])


@pytest.fixture(scope="module")
def drawn(model):
    return generate(model, draws())


def draws(*, seeds=(0, 1, 2), limits=(NEW, NEW, NEW)):
    return [
        Draw(ids, seed=seed, temperature=0.8, top_p=0.9, max_completion_length=limit)
        for ids, seed, limit in zip(PROMPTS, seeds, limits, strict=True)
    ]


@pytest.mark.parity
def test_greedy_tokens_are_those_of_transformers(folder, greedy, one_torch_thread):
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder)
    for ids, reply in zip(PROMPTS, greedy, strict=True):
        out = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
        )
        # min_new_tokens forbids the end of turn, which must not have been due anyway.
        assert not {0, 2} & set(reply.token_ids)
        assert tuple(out[0, len(ids) :].tolist()) == reply.token_ids


def test_greedy_tokens_are_those_without_a_cache(model, greedy):
    run = jax.jit(lambda ids: qwen3.logits(model, ids).argmax(-1))
    for ids, reply in zip(PROMPTS, greedy, strict=True):
        padded = np.zeros((1, 64), int)
        padded[0, : len(ids) + NEW] = ids + reply.token_ids
        best = np.asarray(run(padded))[0, len(ids) - 1 : len(ids) - 1 + NEW]
        assert tuple(best.tolist()) == reply.token_ids
        assert set(reply.logprobs) == {0.0} and not reply.stopped


def test_draws_depend_on_neither_batch_nor_padding(model, drawn):
    alone = generate(model, draws()[1:2], min_rows=4)[0]
    reordered = generate(model, [*draws()[::-1], Draw((5,) * 40, max_completion_length=2)])
    for other in (alone, reordered[1]):
        assert other.token_ids == drawn[1].token_ids
        np.testing.assert_allclose(other.logprobs, drawn[1].logprobs, atol=1e-4)
    assert reordered[0].token_ids == drawn[2].token_ids
    assert len(reordered[3].token_ids) == 2


def test_seeds_matter_to_the_last_bit(model, drawn):
    for far in (1, 2**32, 2**63):
        again = generate(
            model, [Draw(**(vars(draw) | {"seed": draw.seed + far})) for draw in draws()]
        )
        assert [reply.token_ids for reply in again] != [reply.token_ids for reply in drawn]
    assert generate(model, draws()) == drawn


def test_logprobs_are_those_of_the_distributions(model, drawn):
    run = jax.jit(lambda ids: qwen3.logits(model, ids))
    for ids, reply in zip(PROMPTS, drawn, strict=True):
        padded = np.zeros((1, 64), int)
        padded[0, : len(ids) + len(reply.token_ids)] = ids + reply.token_ids
        logits = np.asarray(run(padded))[0, len(ids) - 1 :]
        for at, token in enumerate(reply.token_ids):
            own = jax.nn.log_softmax(logits[at])
            assert reply.model_logprobs[at] == pytest.approx(float(own[token]), abs=1e-4)
            probs = np.asarray(jax.nn.softmax(logits[at] / 0.8), np.float64)
            order = np.argsort(-probs)
            kept = order[: np.searchsorted(np.cumsum(probs[order]), 0.9) + 1]
            assert token in kept
            expected = np.log(probs[token] / probs[kept].sum())
            assert reply.logprobs[at] == pytest.approx(expected, abs=1e-4)


def test_one_program_per_bucket(model, drawn):
    def programs():
        return sampler.read_prompts._cache_size(), sampler.draw_replies._cache_size()

    before = programs()
    generate(model, [Draw((5,) * count, max_completion_length=count) for count in (1, 8, 32)])
    assert programs() == before


def test_the_next_turn_reads_only_what_is_new(model, drawn):
    prefixes = PrefixCache(rows=16)
    first = generate(model, draws(), prefixes=prefixes)
    for a, b in zip(first, drawn, strict=True):  # another program, so up to rounding
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    asked = [
        Draw((*ids, *reply.token_ids, *RNG.integers(0, 640, new).tolist()), seed=seed,
             max_completion_length=NEW)
        for seed, (ids, reply, new) in enumerate(zip(PROMPTS, first, (1, 9, 4), strict=True))
    ]  # fmt: skip
    for chosen in (asked, asked[::-1], asked[1:2]):
        whole = generate(model, chosen)
        found = prefixes.find([draw.prompt_ids for draw in chosen])
        read = {
            len(ids) + len(reply.token_ids) - 1 for ids, reply in zip(PROMPTS, first, strict=True)
        }
        assert read >= set(found.lengths.tolist())
        part = generate(model, chosen, prefixes=prefixes)
        for a, b in zip(whole, part, strict=True):
            assert a.token_ids == b.token_ids
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    # The third turn begins with the second; beside a prompt that is new, all is read.
    third = Draw((*asked[1].prompt_ids, *part[0].token_ids, 5), max_completion_length=NEW)
    assert prefixes.find([third.prompt_ids]).lengths == len(third.prompt_ids) - 2
    together = [third, Draw((9, 8, 7), max_completion_length=NEW)]
    assert prefixes.find([draw.prompt_ids for draw in together]) is None
    for a, b in zip(
        generate(model, together), generate(model, together, prefixes=prefixes), strict=True
    ):
        assert a.token_ids == b.token_ids


@pytest.mark.parametrize("reading", [(2, 90), (90, 2)])
def test_a_row_with_much_to_read_takes_no_slots_of_the_others(model, reading):
    """Padding of what is read would reach beyond the cache of the row that was read to its end."""
    prefixes = PrefixCache(rows=16)
    begun = [Draw(tuple(RNG.integers(0, 640, 120).tolist())), Draw((7, 8, 9))]
    begun = [Draw(draw.prompt_ids, max_completion_length=4) for draw in begun]
    replies = generate(model, begun, prefixes=prefixes)
    asked = [
        Draw((*draw.prompt_ids, *reply.token_ids, *RNG.integers(0, 640, new).tolist()),
             max_completion_length=4)
        for draw, reply, new in zip(begun, replies, reading, strict=True)
    ]  # fmt: skip
    whole = generate(model, asked)
    part = generate(model, asked, prefixes=prefixes)
    for a, b in zip(whole, part, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    cache = prefixes.find([(*asked[0].prompt_ids, *part[0].token_ids, 1)]).cache
    longest = max(len(draw.prompt_ids) for draw in asked)
    slots = jax.tree.leaves(cache)[0].shape[-1]
    assert slots <= bucket(longest) + sampler.SMALLEST_BUCKET  # which the generator counts


@pytest.mark.parametrize("bias", [False, True])
def test_adapters_and_biases_are_those_of_the_whole_model(bias):
    config = Qwen3Config(
        vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_theta=1e4,
        tie_word_embeddings=False, attention_bias=bias,
    )  # fmt: skip
    model = add_adapters(Qwen3(config, rngs=nnx.Rngs(0)), rank=2, alpha=2.0, rngs=nnx.Rngs(1))
    state = nnx.state(model)
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(state))))
    nnx.update(
        model, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), state)
    )
    asked = [Draw(ids, temperature=0, max_completion_length=4) for ids in PROMPTS]
    apart = sampler.layers_apart(model)
    replies = generate(model, asked)
    assert generate(model, asked, layers=apart) == replies
    for ids, reply in zip(PROMPTS, replies, strict=True):
        every = np.array([ids + reply.token_ids])
        best = np.asarray(qwen3.logits(model, every).argmax(-1))[0]
        assert tuple(best[len(ids) - 1 : -1].tolist()) == reply.token_ids


def test_a_prefix_is_all_that_a_row_read_and_drew():
    def cache(rows):
        return Cache(jnp.zeros((1, rows, 8, 1, 2)), jnp.zeros((1, rows, 8, 1, 2)))

    prefixes = PrefixCache(rows=4)
    prefixes.keep([(1, 2, 3), (1, 2)], cache(2))
    assert prefixes.find([(1, 2, 3)]).lengths == 2  # at least one token is new
    assert prefixes.find([(1, 2, 3, 4)]).rows == 0
    assert prefixes.find([(1,)]) is None and prefixes.find([(1, 3, 2)]) is None
    prefixes.keep([(7, 8)], cache(2))
    assert [prefixes.number_of(ids) for ids in [(1, 2, 9), (7, 8, 9), (9, 9, 9)]] == [0, 1, None]
    assert prefixes.find([(1, 2, 9), (7, 8, 9)]) is None  # not in one batch
    prefixes.keep([(5, 6)], cache(4))
    assert prefixes.number_of((7, 8, 9)) is None  # the older ones had to go


def test_stop_tokens_end_rows(model, drawn):
    stop = drawn[0].token_ids[4]
    first = drawn[0].token_ids.index(stop)
    reply = generate(model, draws(), stop_ids=[stop])[0]
    assert reply.stopped
    assert reply.token_ids == drawn[0].token_ids[: first + 1]
    assert len(reply.logprobs) == len(reply.model_logprobs) == first + 1
    # A limit far beyond makes a larger cache, of which little is read.
    far = generate(model, draws(limits=(700,) * 3)[:1], stop_ids=[stop])[0]
    assert far.token_ids == reply.token_ids and far.stopped
    np.testing.assert_allclose(far.logprobs, reply.logprobs, atol=1e-4)


def test_limits_are_per_row(model, drawn):
    mixed = [
        Draw(**(vars(draw) | {"max_completion_length": n}))
        for draw, n in zip(draws(), (1, 5, 9), strict=True)
    ]
    for reply, whole, count in zip(generate(model, mixed), drawn, (1, 5, 9), strict=True):
        assert reply.token_ids == whole.token_ids[:count]
        assert not reply.stopped


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.0, [1]), (0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]), (0.71, [0, 1, 2, 3]), (1.0, range(5))],
)
def test_nucleus_is_the_least_set_with_the_mass(top_p, expected):
    probs = jnp.array([0.125, 0.4, 0.125, 0.3, 0.05])
    assert np.flatnonzero(nucleus(probs, jnp.float32(top_p))).tolist() == list(expected)


def test_frequencies_are_the_probabilities():
    logits = jnp.array([1.0, 2.0, 0.5, 3.0, -2.0])
    draw = jax.jit(jax.vmap(draw_token, (None, 0, None, None, None)))
    seeds = jnp.stack([jnp.arange(20000), jnp.zeros(20000, int)], -1).astype(jnp.uint32)
    token, logprob, own = draw(logits, seeds, 7, 0.7, 0.95)
    probs = np.array(jax.nn.softmax(logits / 0.7))
    probs[[2, 4]] = 0  # 0.95 is reached without them
    probs /= probs.sum()
    np.testing.assert_allclose(np.bincount(token, minlength=5) / 20000, probs, atol=0.012)
    np.testing.assert_allclose(logprob, np.log(probs[token]), atol=1e-5)
    np.testing.assert_allclose(own, jax.nn.log_softmax(logits)[token], atol=1e-5)


def test_scores_are_sums_of_logprobs(model, drawn, monkeypatch):
    questions = [
        (ids, [reply.token_ids, reply.token_ids[:3], ()])
        for ids, reply in zip(PROMPTS, drawn, strict=True)
    ]
    found = score(model, questions)
    for reply, row in zip(drawn, found, strict=True):
        own = np.cumsum((0.0, *reply.model_logprobs))
        np.testing.assert_allclose(row, own[[NEW, 3, 0]], atol=1e-3)
    monkeypatch.setattr("policy.qwen3.sampler.TOKENS_PER_ROW", 13)
    np.testing.assert_allclose(score(model, questions), found, atol=1e-3)
    assert score(model, [((5,), [])]) == [[]]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (Draw(()), "prompt of 0 tokens"),
        (Draw((1,) * 40000), "expected 1 to 32767"),
        (Draw((640,)), "token ids must be 0 to 639"),
        (Draw((1,), temperature=-1.0), "temperature -1"),
        (Draw((1,), top_p=1.5), "top_p 1.5"),
        (Draw((1,), max_completion_length=0), "max_completion_length 0"),
    ],
)
def test_bad_requests_are_refused(model, draw, message):
    with pytest.raises(InputError, match=message):
        generate(model, [draw])


def test_buckets():
    assert [bucket(size) for size in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert bucket(5, 32) == 32


def test_prompts_read_in_parts_are_read_as_a_whole(model, monkeypatch):
    """Among them one that ends with a part, one that begins it, and padding over whole parts."""
    draws = [
        Draw(tuple(RNG.integers(0, 640, count).tolist()), seed=count, max_completion_length=6)
        for count in (3, 32, 33, 64, 100)
    ]
    whole = generate(model, draws)
    assert sampler.prefill_width(8, 128) == 128
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 8 * 32)
    jax.clear_caches()  # the size is no argument of the program
    assert sampler.prefill_width(8, 128) == 32
    for one, other in zip(generate(model, draws), whole, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    jax.clear_caches()


@pytest.mark.parametrize(
    ("rows", "width", "part"),
    [
        (1, 64, 64),
        (256, 4096, 128),
        (64, 4096, 512),
        (2**12, 4096, 32),
        (64, 40_960, 512),
        (64, 97, 97),
    ],
)
def test_parts_divide_the_width(rows, width, part):
    assert sampler.prefill_width(rows, width) == part
