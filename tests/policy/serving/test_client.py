"""The clients of language models: faults of a server become waits, never answers."""

import asyncio
import json
import logging
import threading
import time

import pytest

from policy.serving.backend import (
    LENGTH,
    STOP,
    TOOL_CALLS,
    BackendError,
    ContextError,
    Sampling,
)
from policy.serving.client import Client, Endpoint, member
from policy.serving.openai import REASONING_MODELS, ChatOptions, OpenAIBackend
from policy.serving.tokens import write_call
from tests.policy.serving.fake import FakeServer, free_port, send, slow, truncated
from worldmodel.errors import InputError

KEY = "sk-very-secret-7f3a"
ANSWER = {
    "choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "other": None},
}
TOOLS = [{"type": "function", "function": {"name": "treat", "parameters": {"type": "object"}}}]


def endpoint(url, **changes):
    settings = {"model": "m", "timeout_s": 5.0, "attempts": 3, "patience_s": 0.3}
    return Endpoint(url, **(settings | {"first_wait_s": 0.01, "longest_wait_s": 0.05} | changes))


def say(url, options=None, *, messages=(("user", "hello"),), tools=(), key=KEY, **changes):
    """One question; returns the reply."""

    async def ask():
        backend = OpenAIBackend(endpoint(url, **changes), options, key=key)
        try:
            return await backend.open(tools).ask(
                [{"role": role, "content": content} for role, content in messages],
                sampling=Sampling(),
                seed=7,
            )
        finally:
            await backend.close()

    return asyncio.run(ask())


def with_message(finish="stop", **message):
    return {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": finish}]}


def vllm(texts, *answers):
    """Answers of a vLLM server whose tokens have these texts, the last one for ever."""
    left = list(answers)

    def give(handler, request):
        if request["path"] == "/detokenize":
            return {"prompt": "".join(texts.get(token, "") for token in request["body"]["tokens"])}
        return left.pop(0) if len(left) > 1 else left[0]

    return give


CALL = {"id": "c1", "type": "function", "function": {"name": "treat", "arguments": '{"a": 1}'}}


def test_a_reply_is_read():
    with FakeServer(ANSWER) as server:
        reply = say(server.url)
    assert (reply.content, reply.finish_reason, reply.token_ids) == ("hi", STOP, None)
    assert reply.usage == {"prompt_tokens": 3, "completion_tokens": 1}
    sent = server.requests[0]
    assert sent["headers"]["authorization"] == f"Bearer {KEY}"
    assert sent["path"] == "/v1/chat/completions"
    assert sent["body"] == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.7,
        "top_p": 0.95,
        "seed": 7,
        "max_completion_tokens": 1024,
    }


def test_vllm_gives_tokens_and_logprobs():
    answer = {
        "prompt_token_ids": [1, 2],
        "choices": [
            {
                "message": {"content": None, "reasoning": "hm", "tool_calls": [CALL]},
                "finish_reason": "stop",
                "token_ids": [5, 6],
                "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1}]},
            }
        ],
    }
    spoken = "<think>so</think>I treat. " + write_call("treat", '{"b": 2}')
    with FakeServer(vllm({5: spoken}, answer)) as server:
        reply = say(server.url, ChatOptions(vllm=True), tools=TOOLS)
    assert (reply.prompt_ids, reply.token_ids, reply.logprobs) == ((1, 2), (5, 6), (-0.5, -1.0))
    # What counts is what its tokens say, not what the server made of them.
    assert (reply.content, reply.reasoning, reply.finish_reason) == ("I treat.", "so", TOOL_CALLS)
    assert [(c.name, c.arguments) for c in reply.tool_calls] == [("treat", '{"b": 2}')]
    body = server.requests[0]["body"]
    assert body["tools"] == TOOLS and body["logprobs"] and body["return_token_ids"]
    assert body["tool_choice"] == "none"
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0.0, 1.0)
    assert body["presence_penalty"] == body["frequency_penalty"] == 0.0


@pytest.mark.parametrize(
    ("finish", "stopped_by", "said"),
    [
        ("stop", None, "five"),
        ("stop", 6, "five"),
        ("stop", "six", "fivesix"),
        ("length", None, "fivesix"),
    ],
)
def test_the_token_that_ended_a_reply_is_not_part_of_it(finish, stopped_by, said):
    answer = {
        "prompt_token_ids": [1],
        "choices": [
            {
                "message": {"content": "whatever"}, "finish_reason": finish,
                "stop_reason": stopped_by, "token_ids": [5, 6],
                "logprobs": {"content": [{"logprob": -1}, {"logprob": -1}]},
            }
        ],
    }  # fmt: skip
    with FakeServer(vllm({5: "five", 6: "six"}, answer)) as server:
        assert say(server.url, ChatOptions(vllm=True)).content == said


def test_what_is_no_call_goes_back_as_the_words_that_it_was():
    """vLLM refuses dialogues with calls whose arguments are no JSON."""
    bad = "Well. <tool_call>{oops}</tool_call>"
    answer = {
        "prompt_token_ids": [1],
        "choices": [
            {"message": {}, "finish_reason": "stop", "token_ids": [5, 6],
             "logprobs": {"content": [{"logprob": -1}, {"logprob": -1}]}}
        ],
    }  # fmt: skip

    async def talk(url):
        backend = OpenAIBackend(endpoint(url), ChatOptions(vllm=True), key=KEY)
        dialogue = backend.open(TOOLS)
        reply = await dialogue.ask([{"role": "user", "content": "u"}], sampling=Sampling(), seed=0)
        (call,) = reply.tool_calls
        tool = {"role": "tool", "tool_call_id": call.id, "name": "", "content": "Error"}
        await dialogue.ask([tool], sampling=Sampling(), seed=0)
        await backend.close()
        return call

    with FakeServer(vllm({5: bad}, answer)) as server:
        assert asyncio.run(talk(server.url)).name == ""
    asked = [r["body"] for r in server.requests if r["path"].endswith("completions")]
    assert asked[1]["messages"][1:] == [
        {"role": "assistant", "content": bad},
        {"role": "user", "content": "Error"},
    ]


def test_calls_in_the_text_of_an_endpoint_that_finds_none_are_read():
    text = "I treat. " + write_call("treat", '{"b": 2}')
    with FakeServer(with_message(content=text)) as server:
        reply = say(server.url, tools=TOOLS)
    assert (reply.content, reply.finish_reason) == ("I treat.", TOOL_CALLS)
    assert [(c.name, c.arguments) for c in reply.tool_calls] == [("treat", '{"b": 2}')]
    with FakeServer(with_message(content=f"<think>{text}</think>")) as server:
        assert say(server.url, tools=TOOLS).tool_calls == ()


@pytest.mark.parametrize(
    ("content", "call"),
    [
        ("<think>What about ", {}),
        ("", {"type": "custom"}),
        ("", {"function": {"name": "treat", "arguments": "{}", "strict": True}}),
    ],
)
def test_a_call_that_an_endpoint_found_where_none_should_be_has_no_name(content, call):
    found = with_message("tool_calls", content=content, tool_calls=[CALL | call])
    with FakeServer(found) as server:
        (call,) = say(server.url, tools=TOOLS).tool_calls
    assert (call.id, call.name) == ("c1", "")


@pytest.mark.parametrize("thinks", [True, False])
def test_thinking_is_switched_in_the_servers_template(thinks):
    options = ChatOptions(
        enable_thinking=thinks, extra={"chat_template_kwargs": {"other": 1}, "top_k": 20}
    )
    with FakeServer(ANSWER) as server:
        say(server.url, options)
    body = server.requests[0]["body"]
    assert body["chat_template_kwargs"] == {"other": 1, "enable_thinking": thinks}
    assert body["top_k"] == 20


def test_an_answer_with_a_name_given_twice_is_a_fault():
    twice = json.dumps(with_message("tool_calls", tool_calls=[CALL]))
    twice = twice.replace('"name": "treat"', '"name": "treat", "name": "prescribe"')
    with FakeServer((200, twice), ANSWER) as server:
        assert say(server.url).content == "hi"


def test_parameters_can_be_left_out_and_added():
    options = ChatOptions(
        omit=REASONING_MODELS, limit="max_tokens", extra={"reasoning_effort": "low"}
    )
    with FakeServer(ANSWER) as server:
        say(server.url, options)
    assert server.requests[0]["body"].keys() == {
        "model", "messages", "max_tokens", "reasoning_effort"
    }  # fmt: skip


def test_a_conversation_grows_by_what_was_said_and_not_by_what_failed():
    script = [
        with_message("tool_calls", content="so", tool_calls=[CALL]),
        (400, {"error": "no"}),
        ANSWER,
    ]

    async def talk(url):
        backend = OpenAIBackend(endpoint(url), key=KEY)
        dialogue = backend.open(TOOLS)
        system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
        tool = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
        await dialogue.ask([system, user], sampling=Sampling(), seed=0)
        with pytest.raises(BackendError, match="400"):
            await dialogue.ask([tool], sampling=Sampling(), seed=0)
        await dialogue.ask([tool], sampling=Sampling(), seed=0)
        await backend.close()

    with FakeServer(*script) as server:
        asyncio.run(talk(server.url))
    said = server.requests[2]["body"]["messages"]
    assert [m["role"] for m in said] == ["system", "user", "assistant", "tool"]
    assert said[2] == {"role": "assistant", "content": "so", "tool_calls": [CALL]}
    assert server.requests[1]["body"]["messages"] == said


@pytest.mark.parametrize(
    "fault",
    [
        (500, {"error": {"message": "broken"}}),
        (503, ""),
        (429, "slow down"),
        truncated(json.dumps(ANSWER)[:40]),
        (200, json.dumps(ANSWER)[:40]),
        (200, ""),
        (200, "<html>"),
        (200, "null"),
        (200, "[]"),
        {"choices": []},
        {"choices": None},
        {"choices": [{"message": None, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": "x"}, "finish_reason": None}]},
        with_message("tool_calls", content="x"),
        with_message(tool_calls="x"),
        with_message(tool_calls=[{"id": 1, "function": {"name": "a", "arguments": "{}"}}]),
        with_message(tool_calls=[{"id": "1", "function": {"name": "a", "arguments": {}}}]),
        slow(1.0, ANSWER),
    ],
)
def test_faults_are_asked_again(fault):
    with FakeServer(fault, ANSWER) as server:
        changes = {"timeout_s": 0.3} if callable(fault) else {}
        assert say(server.url, **changes).content == "hi"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": None},
        {"token_ids": [1, "2"]},
        {"token_ids": [1, True]},
        {"token_ids": [1]},
        {"logprobs": None},
        {"logprobs": {"content": [{"logprob": "0"}, {"logprob": 0}]}},
    ],
)
def test_tokens_of_the_wrong_form_are_a_fault(change):
    choice = {
        "message": {"content": "x"},
        "finish_reason": "length",
        "token_ids": [1, 2],
        "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]},
    }
    good = {"prompt_token_ids": [3], "choices": [choice]}
    bad = {"prompt_token_ids": [3], "choices": [choice | change]}
    with FakeServer(vllm({1: "x"}, bad, good)) as server:
        reply = say(server.url, ChatOptions(vllm=True))
    asked = [request for request in server.requests if request["path"] != "/detokenize"]
    assert (reply.content, reply.finish_reason, len(asked)) == ("x", LENGTH, 2)


def test_nan_is_no_number():
    text = json.dumps(ANSWER).replace("3", "NaN")
    with FakeServer((200, text), ANSWER) as server:
        assert say(server.url).content == "hi"
    assert len(server.requests) == 2


def test_a_lasting_fault_ends_in_an_error_that_says_what():
    with FakeServer((500, {"error": "cache is full"})) as server:
        with pytest.raises(BackendError, match=r"status 500.*cache is full.*3 tries"):
            say(server.url)
        assert len(server.requests) == 3
    with FakeServer({"choices": []}) as server:
        with pytest.raises(BackendError, match="malformed reply"):
            say(server.url)
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_cannot_be_mended_is_asked_once(status):
    with FakeServer((status, {"error": "no"})) as server:
        with pytest.raises(BackendError, match=f"status {status}"):
            say(server.url)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 4096 tokens, you asked for 5000",
        "prompt is longer than the maximum model length of 4096 (max_model_len)",
    ],
)
def test_a_prompt_beyond_the_context_is_told_apart(said):
    refusal = (400, {"error": {"message": said}})
    with FakeServer(refusal) as server, pytest.raises(ContextError, match="status 400"):
        say(server.url)
    with FakeServer((400, {"error": "another"})) as server:
        with pytest.raises(BackendError) as caught:
            say(server.url)
        assert not isinstance(caught.value, ContextError)


def test_a_filter_is_an_error():
    with FakeServer(with_message("content_filter", content="x")) as server:
        with pytest.raises(BackendError, match="content_filter"):
            say(server.url)
        assert len(server.requests) == 1


def test_an_absent_server_may_come_back():
    port = free_port()
    done = threading.Event()

    def come_back():
        time.sleep(0.5)
        with FakeServer(ANSWER, port=port):
            done.wait(20.0)

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        reply = say(f"http://127.0.0.1:{port}", attempts=1, patience_s=20.0)
    finally:
        done.set()
        thread.join()
    assert reply.content == "hi"


def test_patience_ends():
    begun = time.monotonic()
    with pytest.raises(BackendError, match="no connection"):
        say(f"http://127.0.0.1:{free_port()}/v1", patience_s=0.2)
    assert 0.2 <= time.monotonic() - begun < 2.0


def test_an_outage_is_told_once(caplog):
    async def many(url):
        client = Client(endpoint(url), key="")
        read = lambda found: member(found, "ok", int)  # noqa: E731
        await asyncio.gather(*(client.post("/x", {}, read) for _ in range(5)))
        await client.close()

    with caplog.at_level(logging.INFO), FakeServer(*[(503, "")] * 5, {"ok": 1}) as server:
        asyncio.run(many(server.url))
    said = [r.getMessage() for r in caplog.records if r.name == "policy.serving.client"]
    assert len(said) == 2 and "503" in said[0] and said[1].endswith("answers again")


def test_retry_after_is_kept():
    def busy(handler, _):
        send(handler, "{}", 429, Retry_After="0.4")

    begun = time.monotonic()
    with FakeServer(busy, ANSWER) as server:
        assert say(server.url).content == "hi"
    assert time.monotonic() - begun >= 0.4


def test_requests_at_a_time_are_limited():
    async def many(url):
        client = Client(endpoint(url, concurrency=3), key="")
        await asyncio.gather(
            *(client.post("/x", {}, lambda found: member(found, "ok", int)) for _ in range(12))
        )
        await client.close()

    with FakeServer(slow(0.03, {"ok": 1})) as server:
        asyncio.run(many(server.url))
    assert len(server.requests) == 12 and server.most == 3


def test_the_key_is_in_no_log_and_no_error(caplog):
    echo = (500, {"error": f"bad key {KEY}"})
    with (
        caplog.at_level(logging.DEBUG),
        FakeServer(echo) as server,
        pytest.raises(BackendError) as caught,
    ):
        say(server.url)
    trail, error = [], caught.value
    while error is not None:
        trail += [str(error), repr(error)]
        error = error.__cause__
    assert "another try" in caplog.text
    assert KEY not in "".join(trail) + caplog.text + repr(endpoint(server.url))


def test_keys_come_from_a_variable_or_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_KEY", KEY)
    file = tmp_path / "key"
    with FakeServer(ANSWER) as server:
        say(server.url, key=None, key_variable="SOME_KEY")
        monkeypatch.delenv("SOME_KEY")
        with pytest.raises(InputError, match=r"no key in \$SOME_KEY or .*key; put it there"):
            say(server.url, key=None, key_variable="SOME_KEY", key_file=file)
        file.write_text("other\n")
        say(server.url, key=None, key_variable="SOME_KEY", key_file=file)
    sent = [request["headers"]["authorization"] for request in server.requests]
    assert sent == [f"Bearer {KEY}", "Bearer other"]


def test_a_url_must_be_one():
    with pytest.raises(InputError, match="expected a URL"):
        say("localhost:8000")
