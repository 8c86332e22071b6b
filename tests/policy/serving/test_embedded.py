"""Many dialogues, one batch, one answer each."""

import asyncio
import time
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from policy import qwen3
from policy.qwen3 import sampler
from policy.serving import embedded
from policy.serving.backend import LENGTH, STOP, BackendError, ContextError, Sampling
from policy.serving.embedded import EmbeddedGenerator
from policy.testing.tiny_qwen3 import make_tiny

SAMPLING = Sampling(temperature=0.8, top_p=0.9, max_completion_length=8)
PROMPTS = [list(range(10, 13 + row)) for row in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("qwen3") / "tiny", initializer_range=0.1)


@pytest.fixture(scope="module")
def model(folder):
    return qwen3.load(folder)


embedded_generator = partial(EmbeddedGenerator, min_batch=8)  # one program for most tests


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the batches that reach the sampler."""
    sizes = []

    def counted(model, draws, **settings):
        sizes.append(len(draws))
        return sampler.generate(model, draws, **settings)

    monkeypatch.setattr(embedded, "generate", counted)
    return sizes


def ask_all(generator, prompts):
    async def run():
        asked = [
            generator.generate(prompt, sampling=SAMPLING, seed=seed)
            for seed, prompt in enumerate(prompts)
        ]
        return await asyncio.gather(*asked)

    return asyncio.run(run())


def test_what_waits_together_is_drawn_together_and_as_if_alone(model, calls):
    generator = embedded_generator(model, stop_ids=[2], version="step-1")
    together = ask_all(generator, PROMPTS)
    assert calls == [7]
    for seed, prompt in enumerate(PROMPTS):
        alone = sampler.generate(
            model, [sampler.Draw(tuple(prompt), seed, 0.8, 0.9, 8)], stop_ids=[2]
        )[0]
        assert together[seed].token_ids == alone.token_ids
        assert together[seed].logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert together[seed].weight_version == "step-1"
        assert together[seed].finish_reason == (STOP if alone.stopped else LENGTH)


def test_batches_have_a_limit_and_a_generator_outlives_an_event_loop(model, calls):
    generator = embedded_generator(model, stop_ids=[], max_batch=4)
    first, second = ask_all(generator, PROMPTS), ask_all(generator, PROMPTS)
    assert calls == [4, 3, 4, 3]
    assert first == second
    assert {reply.finish_reason for reply in first} == {LENGTH}


def test_prompts_of_other_lengths_wait_for_their_own_batch(model, calls):
    generator = embedded_generator(model, stop_ids=[])
    ask_all(generator, [[5] * 10, [5] * 40, [6] * 10])
    assert calls == [2, 1]


def test_the_event_loop_lives_on(model, monkeypatch):
    def slow(model, draws, **settings):
        time.sleep(0.3)
        return sampler.generate(model, draws, **settings)

    monkeypatch.setattr(embedded, "generate", slow)
    generator = embedded_generator(model, stop_ids=[2])

    async def run():
        reply = asyncio.create_task(generator.generate([5], sampling=SAMPLING, seed=0))
        ticks = 0
        while not reply.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(run()) > 10


def test_new_weights_answer_with_their_version(folder, model):
    generator = embedded_generator(model, stop_ids=[2], version="old")
    old = ask_all(generator, PROMPTS[:1])[0]
    other = qwen3.load(folder)
    other.norm.scale[...] = -other.norm.scale[...]
    generator.set_weights(other, "new")
    new = ask_all(generator, PROMPTS[:1])[0]
    assert (old.weight_version, new.weight_version) == ("old", "new")
    assert old.token_ids != new.token_ids
    assert nnx.graphdef(other) == nnx.graphdef(model)  # so nothing was compiled again


def test_turns_go_on_from_the_cache_until_the_weights_change(folder, model, monkeypatch):
    widths = []
    real = sampler.read_prompts
    monkeypatch.setattr(
        sampler, "read_prompts", lambda *a, **k: widths.append(a[3].shape[1]) or real(*a, **k)
    )
    found = {}
    for rows in (0, 16):
        widths.clear()
        generator = embedded_generator(model, stop_ids=[], prefix_rows=rows)
        prompts = [list(range(10, 100 + row)) for row in range(5)]
        first = ask_all(generator, prompts)
        more = [p + list(r.token_ids) + [7] for p, r in zip(prompts, first, strict=True)]
        found[rows] = [reply.token_ids for reply in ask_all(generator, more)]
        if rows:
            generator.set_weights(qwen3.load(folder), "1")
            assert [reply.token_ids for reply in ask_all(generator, more)] == found[0]
            assert widths == [96, 32, 128]
        else:
            assert widths == [96, 128]
    assert found[0] == found[16]


def test_a_bad_request_fails_alone_and_says_why(model):
    generator = embedded_generator(model, stop_ids=[2])

    async def run():
        asked = [
            generator.generate(prompt, sampling=SAMPLING, seed=0) for prompt in ([5], [10**6], [7])
        ]
        return await asyncio.gather(*asked, return_exceptions=True)

    good, bad, also_good = asyncio.run(run())
    assert good.token_ids and also_good.token_ids
    assert isinstance(bad, BackendError) and "token ids must be" in str(bad)


def test_a_prompt_beyond_the_positions_is_told_apart(model):
    generator = embedded_generator(model, stop_ids=[2])
    longest = model.config.max_position_embeddings
    with pytest.raises(ContextError, match=f"context of {longest}"):
        asyncio.run(generator.generate([5] * longest, sampling=SAMPLING, seed=0))


def test_a_cancelled_request_does_not_trouble_the_others(model, calls):
    generator = embedded_generator(model, stop_ids=[2])

    async def run():
        asked = [
            asyncio.create_task(generator.generate([token], sampling=SAMPLING, seed=0))
            for token in (5, 6)
        ]
        await asyncio.sleep(0)
        asked[0].cancel()
        return await asyncio.gather(*asked, return_exceptions=True)

    cancelled, reply = asyncio.run(run())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert reply.token_ids and calls == [1]


def test_scores_of_many_questions(model):
    generator = embedded_generator(model, stop_ids=[2])
    questions = [(prompt, [[3, 4], [5], [6, 7, 8]]) for prompt in PROMPTS[:3]]

    async def run():
        return await asyncio.gather(*(generator.score(*question) for question in questions))

    logits = nnx.jit(qwen3.logits)
    for (prompt, continuations), found in zip(questions, asyncio.run(run()), strict=True):
        for continuation, value in zip(continuations, found, strict=True):
            ids = jnp.zeros((1, 16), int).at[0, : len(prompt) + len(continuation)]
            logprobs = jax.nn.log_softmax(logits(model, ids.set(jnp.array(prompt + continuation))))
            plain = [
                logprobs[0, len(prompt) - 1 + at, token] for at, token in enumerate(continuation)
            ]
            assert value == pytest.approx(float(sum(plain)), abs=1e-4)


def test_a_closed_generator_refuses(model):
    async def run():
        generator = embedded_generator(model, stop_ids=[2])
        waiting = asyncio.create_task(generator.generate([5], sampling=SAMPLING, seed=0))
        await asyncio.sleep(0)
        await generator.close()
        with pytest.raises(BackendError, match="closed"):
            await waiting
        with pytest.raises(BackendError, match="closed"):
            await generator.score([5], [[6]])

    asyncio.run(run())


def test_a_folder_gives_name_and_stop_tokens(folder):
    generator = EmbeddedGenerator.from_folder(folder, version="v0")
    assert generator.name == str(folder)
    assert generator.stop_ids == (2, 0)
