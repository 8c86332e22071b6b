"""A real vLLM server on a tiny model: what it says is what our own model says, version by version.

One start of the server, about 40 s on two CPU cores, for all tests, and a second one where it is
killed. Needs the serving environment (`make serving`).
"""

import asyncio
import http.client
import itertools
import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from policy.serving.backend import (
    LENGTH,
    STOP,
    TOOL_CALLS,
    BackendError,
    ContextError,
    Sampling,
)
from policy.serving.client import Endpoint
from policy.serving.openai import ChatOptions, OpenAIBackend
from policy.serving.tokens import ChatTokens
from policy.serving.vllm import ServerOptions, VLLMServer
from policy.serving.vllm.check import check_server, require_logprobs
from policy.serving.vllm.control import WeightControl
from policy.serving.vllm.generator import VLLMGenerator
from tests.policy.serving.real import NEEDS_VLLM
from tests.policy.serving.vllm_answers import hermes
from worldmodel.errors import InputError

pytestmark = NEEDS_VLLM

LONGEST = 512
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_completion_length=12)
CLOSE = 1e-3  # between float32 of two programs, in nats
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "prescribe",
            "description": "Gives a treatment.",
            "parameters": {
                "type": "object",
                "properties": {
                    "fluid": {"type": "integer", "enum": [0, 1, 2, 3, 4]},
                    "vasopressor": {"type": "integer", "enum": [0, 1, 2, 3, 4]},
                },
                "required": ["fluid", "vasopressor"],
                "additionalProperties": False,
            },
            "strict": True,  # last, as vLLM orders what it renders
        },
    }
]


class Reference:
    """Our own Qwen3 on the CPU, in float32."""

    def __init__(self, folder):
        import jax

        from policy import qwen3

        self.model = qwen3.load(folder)
        self.logits = jax.jit(qwen3.logits)

    def logprobs(self, ids):
        """[T, V] of the token after each prefix."""
        import jax

        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(ids)] = ids
        found = jax.nn.log_softmax(self.logits(self.model, padded)[0, : len(ids)])
        return np.asarray(found, np.float64)

    def drawn(self, prompt, tokens):
        """(log-probabilities of tokens after a prompt, how far each is below the best)."""
        table = self.logprobs([*prompt, *tokens])[len(prompt) - 1 : -1]
        chosen = table[np.arange(len(tokens)), list(tokens)]
        return chosen, table.max(1) - chosen


@dataclass
class Served:
    server: VLLMServer
    folders: dict[str, Path]
    models: dict[str, Reference]

    def endpoint(self, **changes):
        return Endpoint(self.server.url, "tiny", **changes)

    def generator(self, **changes):
        return VLLMGenerator(self.endpoint(**changes), key=self.server.key)

    def control(self, current):
        return WeightControl(self.endpoint(), self.folders[current], key=self.server.key)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from policy.testing.tiny_qwen3 import make_tiny

    place = tmp_path_factory.mktemp("vllm")
    folders = {
        name: make_tiny(place / name, seed=seed, initializer_range=0.2)
        for seed, name in enumerate("ab")
    }
    options = ServerOptions(
        folders["a"], name="tiny", max_model_len=LONGEST, dtype="float32", lora_rank=8, swaps=True
    )
    with VLLMServer(options, log=place / "server.log") as server:
        yield Served(server, folders, {name: Reference(path) for name, path in folders.items()})


def prompts(n, length, *, seed=0):
    return np.random.default_rng(seed).integers(10, 600, (n, length)).tolist()


def status(served, path, key=None):
    connection = http.client.HTTPConnection("127.0.0.1", served.server.port, timeout=10)
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
    return connection.getresponse().status


def test_every_path_but_health_asks_for_the_key(served):
    assert status(served, "/health") == 200
    for path in ("/v1/models", "/weight_info", "/metrics", "/server_info", "/docs"):
        assert status(served, path) == status(served, path, "wrong") == 401
    assert status(served, "/v1/models", served.server.key) == 200
    assert served.server.key not in served.server.log.read_text()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert served.server.key.encode() not in (process / "cmdline").read_bytes()
        except OSError:
            continue


def test_greedy_tokens_and_logprobs_are_our_models(served):
    async def draw():
        generator = served.generator()
        try:
            return await asyncio.gather(
                *(generator.generate(p, sampling=GREEDY, seed=0) for p in prompts(8, 40))
            )
        finally:
            await generator.close()

    for prompt, completion in zip(prompts(8, 40), asyncio.run(draw()), strict=True):
        logprobs, behind = served.models["a"].drawn(prompt, completion.token_ids)
        assert behind.max() < CLOSE
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=CLOSE)
        assert completion.finish_reason == (STOP if completion.token_ids[-1] in (0, 2) else LENGTH)


def test_logprobs_are_of_the_distribution_drawn_from(served):
    prompt, sampling = (
        prompts(1, 30)[0],
        Sampling(temperature=0.5, top_p=0.8, max_completion_length=1),
    )

    async def draw():
        generator = served.generator()
        try:
            seeds = [*range(20), *range(20)]
            return await asyncio.gather(
                *(generator.generate(prompt, sampling=sampling, seed=seed) for seed in seeds)
            )
        finally:
            await generator.close()

    drawn = asyncio.run(draw())
    assert [c.token_ids for c in drawn[:20]] == [c.token_ids for c in drawn[20:]]
    probs = np.exp(served.models["a"].logprobs(prompt)[-1] / 0.5)
    probs /= probs.sum()
    order = np.argsort(-probs)
    kept = order[: np.searchsorted(np.cumsum(probs[order]), 0.8) + 1]
    for completion in drawn:
        (token,) = completion.token_ids
        assert token in kept
        expected = np.log(probs[token] / probs[kept].sum())
        assert completion.logprobs[0] == pytest.approx(expected, abs=CLOSE)


def test_seeds_under_load_draw_the_same_again(served):
    many = prompts(64, 100)  # more than is read at once
    sampling = Sampling(temperature=1.0, top_p=1.0, max_completion_length=8)

    async def draw():
        generator = served.generator(attempts=1, patience_s=0.0)
        try:
            return [
                await asyncio.gather(
                    *(generator.generate(p, sampling=sampling, seed=i) for i, p in enumerate(many))
                )
                for _ in range(2)
            ]
        finally:
            await generator.close()

    first, second = asyncio.run(draw())
    assert [c.token_ids for c in first] == [c.token_ids for c in second]


def test_scores_are_our_models(served):
    prompt = prompts(1, 200)[0]
    grid = [[20 + i, 7, 30 + j] for i, j in itertools.product(range(5), range(5))]

    async def score():
        generator = served.generator()
        try:
            return await generator.score(prompt, grid)
        finally:
            await generator.close()

    expected = [served.models["a"].drawn(prompt, tokens)[0].sum() for tokens in grid]
    np.testing.assert_allclose(asyncio.run(score()), expected, atol=CLOSE)


def test_a_dialogue_with_tools(served):
    written = (
        'I treat.\n<tool_call>\n{"name": "prescribe", "arguments": {"fluid": 1}}\n</tool_call>'
    )
    options = ChatOptions(vllm=True, extra={"structured_outputs": {"choice": [written]}})
    asked = [
        {"role": "system", "content": "You treat sepsis."},
        {"role": "user", "content": "The lactate is 4 mmol/L."},
    ]

    async def talk():
        backend = OpenAIBackend(served.endpoint(), options, key=served.server.key)
        try:
            dialogue = backend.open(TOOLS)
            first = await dialogue.ask(asked, sampling=Sampling(1.0, 1.0, 150), seed=5)
            answered = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "done"}
            second = await dialogue.ask([answered], sampling=Sampling(1.0, 1.0, 150), seed=5)
            return first, second
        finally:
            await backend.close()

    first, second = asyncio.run(talk())
    tokens = ChatTokens.load(served.folders["a"])
    assert list(first.prompt_ids) == tokens.first(asked, TOOLS)
    assert (first.content, first.finish_reason) == ("I treat.", TOOL_CALLS)
    assert first.tool_calls[0].name == "prescribe"
    assert json.loads(first.tool_calls[0].arguments) == {"fluid": 1}
    for reply in (first, second):
        assert reply.usage["completion_tokens"] == len(reply.token_ids) == len(reply.logprobs)
    assert second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids


CALL = '{"name": "prescribe", "arguments": {"fluid": 1}}'


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"Hm.<think>What about <tool_call>{CALL}</tool_call>? No.</think>No.", []),
        (f"<tool_call>{CALL}", [""]),
        (f'<tool_call>{CALL[:-1]}, "why": 1}}</tool_call>', [""]),
        (f'<tool_call>{CALL[:-1]}, "arguments": {{"fluid": 4}}}}</tool_call>', [""]),
        (f'<tool_call>{CALL[:-2]}, "fluid": 4}}}}</tool_call>', [""]),
    ],
)
def test_what_the_servers_parser_takes_is_no_call_to_us(served, text, names):
    extra = {"structured_outputs": {"choice": [text]}}

    async def talk(options):
        backend = OpenAIBackend(served.endpoint(), options, key=served.server.key)
        try:
            dialogue = backend.open(TOOLS)
            said = [{"role": "user", "content": "The lactate is 4 mmol/L."}]
            first = await dialogue.ask(said, sampling=Sampling(1.0, 1.0, 150), seed=5)
            refused = [
                {"role": "tool", "tool_call_id": call.id, "name": "", "content": "Error"}
                for call in first.tool_calls
            ]
            await dialogue.ask(refused or said, sampling=Sampling(1.0, 1.0, 150), seed=5)
            return first
        finally:
            await backend.close()

    assert len(hermes(text)[1]) == 1
    reply = asyncio.run(talk(ChatOptions(vllm=True, extra=extra)))
    assert [call.name for call in reply.tool_calls] == names
    spoken = ChatTokens.load(served.folders["a"]).text(reply.token_ids)
    assert spoken.removesuffix("<|endoftext|>") == text  # either of two tokens ends it


def test_the_server_is_found_to_be_one_that_can_be_read(served):
    assert asyncio.run(check_server(served.endpoint(), key=served.server.key)) is True


@pytest.mark.slow
def test_a_server_with_raw_logprobs_is_refused(served, tmp_path):
    raw = ("--logprobs-mode", "raw_logprobs")
    options = ServerOptions(served.folders["a"], name="tiny", max_model_len=LONGEST, extra=raw)
    with VLLMServer(options, log=tmp_path / "server.log") as server:
        endpoint = Endpoint(server.url, "tiny")
        with pytest.raises(InputError, match="processed_logprobs"):
            asyncio.run(require_logprobs(endpoint, key=server.key))


def test_a_prompt_that_does_not_fit_is_an_error_at_once(served):
    async def draw():
        generator = served.generator()
        try:
            await generator.generate([7] * (LONGEST + 1), sampling=GREEDY, seed=0)
        finally:
            await generator.close()

    with pytest.raises(ContextError, match="status 400"):
        asyncio.run(draw())


def test_swaps_under_load_leave_no_stale_token(served):
    swaps, pool = 6, prompts(4, 300)  # long ones, so that the prefix cache has whole blocks

    async def under_load():
        control, generator = served.control("a"), served.generator()
        drawn, done = [], asyncio.Event()

        async def work(i):
            for prompt in itertools.cycle(pool[i % 4 :] + pool[: i % 4]):
                if done.is_set():
                    return
                if i % 2:
                    generator.weight_version = None  # without the salt, the reset must do
                drawn.append((prompt, await generator.generate(prompt, sampling=GREEDY, seed=0)))

        workers = [asyncio.create_task(work(i)) for i in range(8)]
        reports = []
        try:
            first = await control.checksums()
            for i in range(swaps):
                await asyncio.sleep(0.4)
                name = "ba"[i % 2]
                reports.append(await control.swap(served.folders[name], f"{name}-{i}"))
            await asyncio.sleep(0.4)
            done.set()
            await asyncio.gather(*workers)
            return drawn, reports, first, await control.checksums(), await control.weight_version()
        finally:
            await asyncio.gather(*workers, return_exceptions=True)
            await control.close()
            await generator.close()

    drawn, reports, before, after, version = asyncio.run(under_load())
    assert before == after and version == f"a-{swaps - 1}"
    assert all(report.changed for report in reports)
    expected = {}
    seen = set()
    for prompt, completion in drawn:
        seen.add(completion.weight_version)
        name = "a" if completion.weight_version == "default" else completion.weight_version[0]
        key = (name, tuple(prompt), completion.token_ids)
        if key not in expected:
            expected[key] = served.models[name].drawn(prompt, completion.token_ids)
        logprobs, behind = expected[key]
        assert behind.max() < CLOSE, f"stale tokens under {completion.weight_version}"
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=CLOSE)
    assert len(seen) == swaps + 1
    assert len(expected) == 2 * len(pool)  # either model has its own answers
    print(f"{len(drawn)} completions; swaps took {[round(r.seconds, 3) for r in reports]} s")


def test_a_swap_that_cannot_be_is_refused_and_the_old_weights_serve_on(served, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(served.folders["b"], broken)
    with next(broken.glob("*.safetensors")).open("r+b") as file:
        file.truncate(1000)

    async def swap():
        control, generator = served.control("a"), served.generator()
        try:
            version = await control.weight_version()
            with pytest.raises(BackendError, match="not a whole safetensors file"):
                await control.swap(broken, "broken")
            prompt = prompts(1, 20)[0]
            return version, prompt, await generator.generate(prompt, sampling=GREEDY, seed=0)
        finally:
            await control.close()
            await generator.close()

    version, prompt, completion = asyncio.run(swap())
    assert completion.weight_version == version
    assert served.models["a"].drawn(prompt, completion.token_ids)[1].max() < CLOSE


def adapter(folder, base, *, seed, rank=4, alpha=8.0):
    """Writes an adapter in PEFT's form; returns the base's tensors with the adapter added."""
    rng = np.random.default_rng(seed)
    weights = load_file(next(base.glob("*.safetensors")))
    parts = {}
    for name in sorted(weights):
        if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            out, wide = weights[name].shape
            a = 0.3 * rng.standard_normal((rank, wide)).astype(np.float32)
            b = 0.3 * rng.standard_normal((out, rank)).astype(np.float32)
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            parts |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            weights[name] = weights[name] + alpha / rank * b @ a
    folder.mkdir()
    save_file(parts, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return weights


def test_adapters_are_loaded_while_serving(served, tmp_path):
    merged, prompt = [], prompts(1, 300)[0]
    for i in range(2):
        weights = adapter(tmp_path / f"adapter-{i}", served.folders["a"], seed=i)
        shutil.copytree(served.folders["a"], tmp_path / f"merged-{i}")
        save_file(weights, next((tmp_path / f"merged-{i}").glob("*.safetensors")))
        merged.append(Reference(tmp_path / f"merged-{i}"))

    async def speak():
        control = served.control("a")
        generator = VLLMGenerator(served.endpoint(), key=served.server.key)
        try:
            drawn = []
            for i in range(2):  # the second in the place of the first
                await control.load_adapter("careful", tmp_path / f"adapter-{i}")
                generator.use_adapter("careful")
                drawn.append(await generator.generate(prompt, sampling=GREEDY, seed=0))
            await control.unload_adapter("careful")
            with pytest.raises(BackendError, match="status 404"):
                await generator.generate(prompt, sampling=GREEDY, seed=0)
            return drawn
        finally:
            await control.close()
            await generator.close()

    for model, completion in zip(merged, asyncio.run(speak()), strict=True):
        assert completion.weight_version == "careful"
        logprobs, behind = model.drawn(prompt, completion.token_ids)
        assert behind.max() < CLOSE
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=CLOSE)


def test_requests_outlive_a_server_that_is_killed_and_comes_back(served):
    many = prompts(32, 100, seed=5)
    long = Sampling(temperature=0.0, top_p=1.0, max_completion_length=400)

    async def survive():
        generator = served.generator(patience_s=300.0, longest_wait_s=2.0)

        def ask(prompt):
            return asyncio.create_task(generator.generate(prompt, sampling=long, seed=0))

        try:
            control = served.control("a")
            await control.swap(served.folders["a"], "before")
            await control.close()
            pending = [ask(prompt) for prompt in many[:16]]
            await asyncio.sleep(0.1)
            # Half of the requests meet a server that never answers, however fast it is; replies
            # that are on their way arrive before those that never will are counted.
            os.killpg(served.server.pid, signal.SIGSTOP)
            pending += [ask(prompt) for prompt in many[16:]]
            await asyncio.sleep(0.3)
            unfinished = sum(not task.done() for task in pending)
            os.killpg(served.server.pid, signal.SIGKILL)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(served.server.start)
            return unfinished, await asyncio.gather(*pending)
        finally:
            await generator.close()

    unfinished, completions = asyncio.run(survive())
    versions = [completion.weight_version for completion in completions]
    assert set(versions) <= {"before", "default"}
    assert versions.count("default") >= unfinished >= 16
    for prompt, completion in zip(many, completions, strict=True):
        assert served.models["a"].drawn(prompt, completion.token_ids)[1].max() < CLOSE
