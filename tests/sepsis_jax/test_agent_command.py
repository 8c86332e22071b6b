"""`sepsis-jax agent`: runs that can be stopped, and pages about them."""

import json

import jax
import numpy as np
import pytest

from policy.agent.tools import prescription_arguments
from policy.serving.tokens import ChatTokens, write_call
from policy.testing.tiny_qwen3 import make_tiny
from tests.policy.serving.fake import FakeServer
from tests.policy.serving.vllm_answers import FakeVLLM
from tests.sepsis_jax.command_line import call, finish, refuse
from worldmodel.models.checkpoint import save_world_model
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import published_scaler

FAST = ("--backend", "scripted", "--set", "max_steps=3", "--set", "forecast.samples=3",
        "--templates", "compact")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained one, which is made at once."""
    out = tmp_path_factory.mktemp("runs") / "model"
    config = ModelConfig(variant="residual", hidden=8, layers=1, embed=4, head=4)
    save_world_model(init_world_model(jax.random.key(0), published_scaler(), config), out)
    return out


@pytest.fixture(scope="module")
def done(model):
    """A run over six synthetic patients, whole."""
    out = model.with_name("agent")
    finish("agent", "run", "--model", model, "--patients", 6, *FAST, "--out", out)
    return out


def records(folder):
    lines = (folder / "records.jsonl").read_text().splitlines()
    found = {}
    for line in map(json.loads, lines):
        assert line["patient"] not in found
        found[line["patient"]] = line
    return found


def test_a_run_has_every_patient_once(done):
    found = records(done)
    assert sorted(found) == list(range(6))
    summary = json.loads((done / "summary.json").read_text())
    assert summary["completed"] == 6 and summary["tool_calls"] == 2 * summary["decisions"]
    manifest = json.loads((done / "manifest.json").read_text())
    assert manifest["request"]["options"]["max_steps"] == 3


def test_kept_keys_and_values_change_no_reply(capsys, model, tmp_path):
    llm = make_tiny(tmp_path / "llm")
    found = []
    for kept in (False, True):
        out = tmp_path / f"kept-{kept}"
        run = ("agent", "run", "--model", model, "--patients", 3, "--llm", llm, "--out", out)
        settings = (
            "max_steps=1", "templates=compact", "attempts=1", "dialogue.max_invalid=2",
            "dialogue.sampling.max_completion_length=12", f"prefix_caching={kept}",
        )  # fmt: skip
        words = [word for text in settings for word in ("--set", text)]
        assert call(capsys, *run, *words).status == 2
        found.append(records(out))
    for patient, record in found[0].items():  # every stay fails, after three replies
        pairs = list(zip(record["turns"], found[1][patient]["turns"], strict=True))
        assert len(pairs) == 3
        for one, other in pairs:
            logprobs = [turn["reply"].pop("logprobs") for turn in (one, other)]
            np.testing.assert_allclose(*logprobs, rtol=1e-5)
            assert one == other


def test_a_run_that_was_killed_goes_on(capsys, done, model, tmp_path):
    """Half of it and half a line are left; the rest comes out as in a whole run."""
    out = tmp_path / "half"
    out.mkdir()
    (out / "manifest.json").write_bytes((done / "manifest.json").read_bytes())
    lines = (done / "records.jsonl").read_bytes().splitlines(keepends=True)
    (out / "records.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:50])
    command = ("agent", "run", "--model", model, "--patients", 6, *FAST, "--out", out)
    refuse(call(capsys, *command), "--resume")
    result = call(capsys, *command, "--resume", "--json")
    assert result.status == 0 and result.last_json["completed"] == 6
    whole = records(done)
    for patient, record in records(out).items():
        assert record["decisions"] == whole[patient]["decisions"]
    other = ("agent", "run", "--model", model, "--patients", 7, *FAST, "--out", out, "--resume")
    refuse(call(capsys, *other), "options.patients")


def test_recorded_stays_live_in_the_world_model(capsys, cohort, model, tmp_path):
    out = tmp_path / "recorded"
    result = call(
        capsys, "agent", "run", "--model", model, "--episodes", cohort, "--patients", 4, *FAST,
        "--set", "split=train", "--out", out, "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert result.last_json["stays"] == 4
    for record in records(out).values():
        assert record["real"]["trajectory_length"] >= len(record["decisions"])
    published = tmp_path / "published.json"
    assert call(capsys, "agent", "show", "--run", out, "--out", published).status == 0
    entries = json.loads(published.read_text())
    assert len(entries) == 4 and entries[0]["metadata"]["real"]["outcome"] in ("release", "death")


def test_the_published_inference_runs(capsys, cohort, model, tmp_path):
    """With all quirks: the published terminal reward, and one noisy future without an interval."""
    out = tmp_path / "reference"
    result = call(
        capsys, "agent", "run", "--model", model, "--episodes", cohort, "--patients", 4,
        "--backend", "scripted", "--set", "split=train", "--set", "mode=reference", "--out", out,
    )  # fmt: skip
    assert result.status == 0, result.err
    found = records(out).values()
    assert {record["decisions"][-1]["reward"] for record in found} <= {-15.0, 15.0}
    answers = [
        message["content"]
        for record in found
        for turn in record["turns"]
        for message in turn["messages"]
        if message["content"].startswith("Predicted state")
    ]
    assert answers and not any(" to " in line for a in answers for line in a.splitlines()[1:])
    options = json.loads((out / "manifest.json").read_text())["request"]["options"]
    assert options["dialogue"]["sampling"]["max_completion_length"] == 8192
    assert options["forecast"]["mode"] == "reference"


def test_an_endpoint_treats(capsys, model, tmp_path, monkeypatch):
    function = {"name": "prescription", "arguments": '{"vasopressor": 1, "iv_fluid": 1}'}
    calls = [{"id": "c", "type": "function", "function": function}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    answer = {"choices": [{"message": message, "finish_reason": "tool_calls"}]}
    monkeypatch.setenv("SOME_KEY", "sk-hidden")
    with FakeServer(answer) as server:
        result = call(
            capsys, "agent", "run", "--backend", "openai", "--llm", "some-model", "--url",
            server.url, "--key-variable", "SOME_KEY", "--reasoning", "--extra",
            "reasoning_effort=low", "--patients", 6, "--templates", "compact", "--set",
            "max_steps=3", "--out", tmp_path / "o3", "--json",
        )  # fmt: skip
    assert result.status == 0 and result.last_json["completed"] == 6, result.err
    sent = server.requests[-1]
    assert sent["headers"]["authorization"] == "Bearer sk-hidden"
    assert sent["body"]["reasoning_effort"] == "low" and "temperature" not in sent["body"]
    assert [tool["function"]["name"] for tool in sent["body"]["tools"]] == ["prescription"]
    kept = "".join(file.read_text() for file in (tmp_path / "o3").iterdir())
    assert "sk-hidden" not in kept + result.out + result.err


def served(tmp_path, text, **changes):
    """A server as `policy serve` starts it, whose model says one thing."""
    vllm = FakeVLLM(ChatTokens.load(make_tiny(tmp_path / "tiny")), text, **changes)
    return FakeServer(lambda handler, request: vllm(request["path"], request["body"]))


def test_our_own_server_is_read_by_its_tokens(capsys, model, tmp_path):
    """Its parser finds a call in a thought, and the last of two levels; neither is given."""
    asked = ("agent", "run", "--backend", "openai", "--llm", "m", "--patients", 6, "--templates",
             "compact", "--set", "max_steps=2", "--set", "attempts=1")  # fmt: skip
    good = write_call("prescription", prescription_arguments(7))
    for name, text in {
        "thought": f"<think>What about {write_call('prescription', prescription_arguments(24))}?"
        f"</think>No. {good}",
        "twice": good.replace('"iv_fluid"', '"vasopressor": 4, "iv_fluid"'),
    }.items():
        with served(tmp_path / name, text) as server:
            out = tmp_path / f"run-{name}"
            found = call(capsys, *asked, "--no-thinking", "--url", server.url, "--out", out)
        given = {d["action"] for record in records(out).values() for d in record["decisions"]}
        assert (found.status, given) == ((0, {7}) if name == "thought" else (2, set())), found.err
        asked_last = [r["body"] for r in server.requests if r["path"].endswith("chat/completions")]
        assert asked_last[-1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_server_whose_logprobs_are_others_is_refused(capsys, tmp_path):
    with served(tmp_path / "raw", "", mode="raw_logprobs") as server:
        tokens = tmp_path / "raw" / "tiny"
        for backend in (("vllm", "--llm", tokens), ("openai", "--llm", "m")):
            refuse(
                call(capsys, "agent", "run", "--patients", 2, "--backend", *backend, "--url",
                     server.url, "--out", tmp_path / "out"),
                "processed_logprobs",
            )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_pages(capsys, done, tmp_path):
    shown = call(capsys, "agent", "show", "--run", done, "--json")
    assert shown.status == 0 and shown.last_json["completed"] == 6
    assert "Patient 2" in call(capsys, "agent", "show", "--run", done, "--patient", 2).out
    for name in ("stay.html", "stay.md"):
        file = tmp_path / name
        assert not call(
            capsys, "agent", "show", "--run", done, "--patient", 2, "--out", file
        ).status
        assert "prescription" in file.read_text()


def test_bad_input(capsys, done, cohort, tmp_path):
    refuse(call(capsys, "agent", "show", "--run", tmp_path), "records.jsonl")
    refuse(call(capsys, "agent", "show", "--run", done, "--patient", 99), "99")
    refuse(call(capsys, "agent", "show", "--run", done, "--out", tmp_path / "x.csv"), ".json")
    out = ("--out", tmp_path / "new")
    refuse(call(capsys, "agent", "run", *out), "llm: name")
    refuse(call(capsys, "agent", "run", "--backend", "oracle", *out), "backend: got", "embedded")
    refuse(
        call(capsys, "agent", "run", "--llm", "x", "--backend", "openai", *out),
        "url: the openai backend",
    )
    refuse(call(capsys, "agent", "run", "--llm", tmp_path / "none", *out), "none")
    refuse(call(capsys, "agent", "run", *FAST, "--episodes", cohort, *out), "model: recorded stays")
    refuse(call(capsys, "agent", "run", *FAST, "--set", "attempts=0", *out), "attempts")
    refuse(
        call(capsys, "agent", "run", *FAST, "--set", "quirks.lagged_actions=true", *out),
        "lagged_actions", "recorded stays",
    )  # fmt: skip
    refuse(call(capsys, "agent", "run", *FAST, "--no-thinking", *out), "enable_thinking")
    assert not (tmp_path / "new").exists()
