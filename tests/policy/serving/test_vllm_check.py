"""Servers that would teach wrong things are refused before anything is asked of them."""

import asyncio

import pytest

from policy.serving.backend import BackendError
from policy.serving.client import Endpoint
from policy.serving.tokens import ChatTokens
from policy.serving.vllm.check import check_server, require_logprobs
from policy.testing.tiny_qwen3 import make_tiny
from tests.policy.serving.fake import FakeServer
from tests.policy.serving.vllm_answers import FakeVLLM
from worldmodel.errors import InputError


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return ChatTokens.load(make_tiny(tmp_path_factory.mktemp("tiny")))


def served(vllm, without=()):
    def answer(handler, request):
        if request["path"] in without:
            return (404, {"error": "Not Found"})
        return vllm(request["path"], request["body"])

    return FakeServer(answer)


def check(url, what=check_server):
    waits = {"attempts": 2, "patience_s": 0.1, "first_wait_s": 0.01, "longest_wait_s": 0.02}
    return asyncio.run(what(Endpoint(url, "m", **waits), key="k"))


@pytest.mark.parametrize("seed", range(5))
def test_processed_logprobs_pass(tokens, seed):
    with served(FakeVLLM(tokens, seed=seed)) as server:
        assert check(server.url) is True
        check(server.url, require_logprobs)
    probes = [r["body"] for r in server.requests if r["path"] == "/v1/completions"]
    assert all(body["top_k"] == 0 and body["repetition_penalty"] == 1.0 for body in probes)


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logits"])
@pytest.mark.parametrize("seed", range(3))
def test_other_modes_are_refused_with_the_mend(tokens, mode, seed):
    for what in (check_server, require_logprobs):
        with (
            served(FakeVLLM(tokens, mode=mode, seed=seed)) as server,
            pytest.raises(InputError, match="--logprobs-mode processed_logprobs"),
        ):
            check(server.url, what)


class OneSided(FakeVLLM):
    """Log-probabilities of the wrong distribution for one of the settings alone."""

    deaf_to = ""

    def _completions(self, body):
        return super()._completions(body | {self.deaf_to: 1.0})


@pytest.mark.parametrize(
    ("setting", "said"), [("temperature", "temperature 2"), ("top_p", "top_p")]
)
def test_both_settings_are_looked_at(tokens, setting, said):
    vllm = OneSided(tokens)
    vllm.deaf_to = setting
    with served(vllm) as server, pytest.raises(InputError, match=said):
        check(server.url)


@pytest.mark.parametrize("without", ["/v1/models", "/detokenize"])
def test_other_endpoints_are_no_vllm(tokens, without):
    with served(FakeVLLM(tokens), without=(without,)) as server:
        assert check(server.url) is False
    with served(FakeVLLM(tokens, owner="openai")) as server:
        assert check(server.url) is False
        assert [request["path"] for request in server.requests] == ["/v1/models"]


def test_a_server_that_is_not_there():
    with pytest.raises(BackendError):
        check("http://127.0.0.1:9/v1")
