"""The generator over vLLM's token endpoint, against a scripted server."""

import asyncio

import pytest

from policy.serving.backend import BackendError, Sampling
from policy.serving.client import Endpoint
from policy.serving.vllm.generator import VLLMGenerator
from tests.policy.serving.fake import FakeServer


def generator(url, **changes):
    waits = {"attempts": 3, "patience_s": 0.3, "first_wait_s": 0.01, "longest_wait_s": 0.05}
    return VLLMGenerator(Endpoint(url, "m", **(waits | changes)), key="k")


def reply(tokens=(5, 2), *, logprob=-0.5, top=(), versions=("v1",), **changes):
    entries = [{"token_id": t, "logprob": logprob, "top_logprobs": []} for t in tokens]
    if entries:
        entries[0]["top_logprobs"] = [{"token_id": t, "logprob": p} for t, p in top]
    choice = {
        "finish_reason": "stop",
        "token_ids": list(tokens),
        "logprobs": {"content": entries},
        "weight_versions": [{"version": v, "start": 0, "end": 1} for v in versions],
    }
    return {"choices": [choice | changes]}


def run(server, use):
    async def body():
        model = generator(server.url)
        try:
            return await use(model)
        finally:
            await model.close()

    return asyncio.run(body())


def draw(model):
    return model.generate([1, 2, 3], sampling=Sampling(0.7, 0.9, 11), seed=-1)


def test_tokens_in_and_out():
    with FakeServer(reply()) as server:
        completion = run(server, draw)
    assert (completion.token_ids, completion.logprobs) == ((5, 2), (-0.5, -0.5))
    assert (completion.finish_reason, completion.weight_version) == ("stop", "v1")
    body = server.requests[0]["body"]
    assert server.requests[0]["path"] == "/inference/v1/generate"
    assert body["token_ids"] == [1, 2, 3] and "cache_salt" not in body
    assert body["sampling_params"] == {
        "temperature": 0.7, "top_p": 0.9, "max_tokens": 11, "seed": 2**63 - 1, "logprobs": 0,
        "detokenize": False,
        # Whatever the server took from the model's generation_config is off.
        "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }  # fmt: skip


def test_the_cache_is_salted_with_the_version():
    async def twice(model):
        await draw(model)
        await draw(model)
        model.weight_version = "v9"
        await draw(model)

    with FakeServer(reply()) as server:
        run(server, twice)
    assert [r["body"].get("cache_salt") for r in server.requests] == [None, "v1", "v9"]


@pytest.mark.parametrize(
    "bad",
    [
        reply(()),
        reply(token_ids=[5]),
        reply(token_ids=[5, 3]),
        reply(token_ids=None),
        reply(finish_reason="abort"),
        reply(finish_reason=None),
        reply(logprobs=None),
        reply(logprob=None),
        reply(logprob=-9999.0),
        reply(versions=("v1", "v2")),
        reply(versions=(3,)),
        {"choices": [*reply()["choices"], *reply()["choices"]]},
    ],
)
def test_replies_that_make_no_sense_are_asked_again(bad):
    with FakeServer(bad, reply()) as server:
        assert run(server, draw).token_ids == (5, 2)
    assert len(server.requests) == 2


LOGPROBS = {(): {7: -1.0, 8: -2.0}, (7,): {1: -0.1, 2: -0.2}, (8,): {1: -0.3}}


def score_reply(_, request):
    """Answers what the request wants, sums known from LOGPROBS."""
    params, ids = request["body"]["sampling_params"], request["body"]["token_ids"]
    assert params["max_tokens"] == 1 and params["temperature"] == 1.0 and params["top_p"] == 1.0
    wanted = params["logprob_token_ids"]
    assert params["logprobs"] == len(wanted)
    *wanted, last = wanted
    assert last == wanted[-1]
    known = LOGPROBS[tuple(ids[2:])]
    return reply((99,), top=[(token, known[token]) for token in wanted])


def test_scores_share_their_beginnings():
    continuations = [[7, 1], [7, 2], [8, 1], [8], []]
    with FakeServer(score_reply) as server:
        found = run(server, lambda model: model.score([3, 4], continuations))
    assert found == pytest.approx([-1.1, -1.2, -2.3, -2.0, 0.0])
    assert sorted(r["body"]["token_ids"] for r in server.requests) == [[3, 4], [3, 4, 7], [3, 4, 8]]
    assert server.requests[0]["body"]["token_ids"] == [3, 4]
    with FakeServer(score_reply) as server:
        assert run(server, lambda model: model.score([3, 4], [])) == []
        assert run(server, lambda model: model.score([3, 4], [[]])) == [0.0]
    assert not server.requests


def test_a_score_never_mixes_weights():
    old = reply((9,), top=[(7, -1.0)], versions=("v1",))
    new = reply((9,), top=[(7, -3.0), (1, -0.5)], versions=("v2",))
    with FakeServer(old, new) as server:
        assert run(server, lambda model: model.score([3, 4], [[7, 1]])) == [-3.5]
    assert len(server.requests) == 4
    turns = [reply((9,), top=[(7, -1.0), (1, -1.0)], versions=(f"v{i}",)) for i in range(40)]
    with FakeServer(*turns) as server, pytest.raises(BackendError, match="weights changed"):
        run(server, lambda model: model.score([3, 4], [[7, 1]]))


def test_a_score_without_its_tokens_is_asked_again():
    with FakeServer(reply((9,)), reply((9,), top=[(7, -1.0)])) as server:
        assert run(server, lambda model: model.score([3], [[7]])) == [-1.0]
