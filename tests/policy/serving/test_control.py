"""Swaps of weights against a scripted server: what happens when something fails half-way."""

import asyncio
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from policy.serving.backend import BackendError
from policy.serving.client import Endpoint
from policy.serving.vllm.control import WeightControl
from tests.policy.serving.fake import FakeServer

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


READING = {"/weight_info", "/weight_checker", "sepsis_jax_packed_checksums"}


class FakeWeights(FakeServer):
    """A server that remembers whether it is paused and what it has loaded."""

    def __init__(self, loaded, *, fail=()):
        super().__init__(self.answer)
        self.loaded, self.version, self.paused = str(loaded), "default", False
        self.fail = dict(fail)  # path -> how many calls fail
        self.steps = []
        self.drift = ""

    def answer(self, _, request):
        path, body = request["path"].split("?")[0], request["body"] or {}
        path = path if body.get("method") not in READING else body["method"]
        if path not in READING:
            self.steps.append(request["path"])
        if self.fail.get(path, 0):
            self.fail[path] -= 1
            return 500, {"error": f"no {path}"}
        match path:
            case "/pause" | "/resume":
                self.paused = path == "/pause"
                return {"status": "ok"}
            case "sepsis_jax_packed_checksums":
                return {"results": [{"packed": f"product of {self.loaded}"}]}
            case "/collective_rpc":
                assert self.paused and body["method"] == "sepsis_jax_swap"
                self.loaded = body["kwargs"]["folder"]
                return {"results": [None]}
            case "/reset_prefix_cache":
                return {"success": self.fail.pop("busy", 0) == 0}
            case "/update_weight_version":
                self.version = body["new_version"]
                return {"success": True}
            case "/weight_info":
                return {"weight_version": self.version}
            case "/weight_checker":
                known = f"sum of {self.loaded}{self.drift}"
                sums = {"dp0:tp0:x.weight": known, "tp0:packed.weight": EMPTY, "tp0:y": EMPTY}
                return {"checksums": sums}
            case "/v1/load_lora_adapter" | "/v1/unload_lora_adapter":
                return 200, "Success: it is there."
        raise AssertionError(path)


def folder(path, *, rows=3, name="embedding"):
    path.mkdir()
    save_file({name: np.zeros((rows, 2), np.float32)}, path / "model.safetensors")
    return path


@pytest.fixture
def folders(tmp_path):
    return folder(tmp_path / "a"), folder(tmp_path / "b")


def run(server, current, use):
    async def body():
        control = WeightControl(Endpoint(server.url, "m", timeout_s=5.0), current, key="k")
        try:
            return await use(control)
        finally:
            await control.close()

    return asyncio.run(body())


def test_a_swap_goes_step_by_step(folders):
    old, new = folders
    with FakeWeights(old) as server:
        swap = run(server, old, lambda control: control.swap(new, "step-1"))
    assert server.steps == [
        "/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version",
        "/resume",
    ]  # fmt: skip
    assert (server.loaded, server.version, server.paused) == (str(new), "step-1", False)
    assert (swap.version, swap.changed, swap.unseen) == ("step-1", True, 1)
    assert all(r["headers"]["authorization"] == "Bearer k" for r in server.requests)


@pytest.mark.parametrize(
    "step", ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
)
def test_a_failed_swap_goes_back_and_resumes(folders, step):
    old, new = folders
    with FakeWeights(old, fail={step: 1}) as server:
        server.paused = step == "/pause"  # it may have paused all the same
        with pytest.raises(BackendError, match=f"no {step}"):
            run(server, old, lambda control: control.swap(new, "step-1"))
    assert (server.loaded, server.version, server.paused) == (str(old), "default", False)


def test_weights_that_are_neither_are_never_served(folders):
    old, new = folders
    with (
        FakeWeights(old, fail={"/collective_rpc": 2}) as server,
        pytest.raises(BackendError, match=r"going back failed too.*restart it"),
    ):
        run(server, old, lambda control: control.swap(new, "step-1"))
    assert server.paused and "/resume" not in server.steps


def test_the_same_files_must_give_the_same_checksums(folders):
    old, new = folders

    async def there_and_back(control):
        for path in (new, old, new, old):
            await control.swap(path, path.name)
        server.drift = " with a flipped bit"
        with pytest.raises(BackendError, match=r"b: loaded again, .* other checksums"):
            await control.swap(new, "b")

    with FakeWeights(old) as server:
        run(server, old, there_and_back)
    assert server.version == "a"


def test_a_server_that_was_started_anew_is_at_its_first_weights(folders):
    old, new = folders

    async def after_a_restart(control):
        await control.swap(new, "step-1")
        server.loaded, server.version, server.fail = str(old), "default", {"/reset_prefix_cache": 1}
        with pytest.raises(BackendError, match="no /reset_prefix_cache"):
            await control.swap(new, "step-2")
        assert (server.loaded, server.version, server.paused) == (str(old), "default", False)
        await control.swap(new, "step-2")
        server.version = "of somebody else"
        with pytest.raises(BackendError, match="this controller did not load"):
            await control.swap(old, "step-3")

    with FakeWeights(old) as server:
        run(server, old, after_a_restart)
    assert (server.loaded, server.paused) == (str(new), False)


def test_a_busy_cache_is_emptied_later(folders):
    old, new = folders
    with FakeWeights(old, fail={"busy": 1}) as server:
        run(server, old, lambda control: control.swap(new, "1"))
    assert server.steps.count("/reset_prefix_cache") == 2


def test_an_unfit_folder_touches_nothing(folders, tmp_path):
    old, new = folders
    whole = (new / "model.safetensors").read_bytes()
    unfit = [
        (folder(tmp_path / "wide", rows=4), "embedding is 4x2"),
        (folder(tmp_path / "named", name="other"), "embedding is missing"),
        (tmp_path / "absent", "no weights"),
    ]
    with FakeWeights(old) as server:
        for path, why in unfit:
            with pytest.raises(BackendError, match=why):
                run(server, old, lambda control, path=path: control.swap(path, "1"))
        (new / "model.safetensors").write_bytes(whole[:-3])
        with pytest.raises(BackendError, match="not a whole safetensors file"):
            run(server, old, lambda control: control.swap(new, "1"))
    assert not server.requests


def test_adapters_come_and_go(folders):
    adapter = folders[1]
    with FakeWeights(folders[0]) as server:
        with pytest.raises(BackendError, match=r"adapter_config\.json"):
            run(server, folders[0], lambda control: control.load_adapter("x", adapter))
        (adapter / "adapter_config.json").write_text(json.dumps({"r": 4}))
        run(server, folders[0], lambda control: control.load_adapter("x", adapter))
        run(server, folders[0], lambda control: control.unload_adapter("x"))
    assert server.requests[0]["body"] == {
        "lora_name": "x", "lora_path": str(adapter), "load_inplace": True
    }  # fmt: skip
    assert server.steps == ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
