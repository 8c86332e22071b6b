"""The agent behind a real vLLM server, with a tiny Qwen3 that was taught the dialogue.

One start of the server for all tests; needs the serving environment (`make serving`).
"""

import asyncio
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from policy import qwen3
from policy.agent.dialogue import COMPLETED, DialogueConfig, treat_all
from policy.agent.prompts import Prompts
from policy.agent.tools import ActionScorer, prescription_arguments
from policy.qwen3.logprobs import token_logprobs
from policy.serving.backend import Sampling
from policy.serving.client import Endpoint
from policy.serving.openai import ChatOptions, OpenAIBackend
from policy.serving.tokens import ChatTokens, TokenBackend, parse_reply, write_call
from policy.serving.vllm import ServerOptions, VLLMGenerator, VLLMServer
from policy.serving.vllm.control import WeightControl
from tests.policy.agent.conftest import PATIENTS
from tests.policy.serving.real import NEEDS_VLLM

pytestmark = NEEDS_VLLM

LONGEST = 4096
TEMPERATURE = 0.5
CONFIG = DialogueConfig(
    sampling=Sampling(temperature=TEMPERATURE, top_p=1.0, max_completion_length=96)
)
CLOSE = 2e-3  # between float32 of two programs, in nats


@dataclass
class Served:
    server: VLLMServer
    folders: dict[str, Path]  # by version
    tokens: ChatTokens

    def endpoint(self):
        return Endpoint(self.server.url, "tiny", patience_s=30.0)

    def token_backend(self):
        return TokenBackend(VLLMGenerator(self.endpoint(), key=self.server.key), self.tokens)


def moved(folder, to, seed):
    """The same folder with its weights slightly changed."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    noise = np.random.default_rng(seed)
    for name, value in weights.items():
        step = 0.01 * value.std() * noise.standard_normal(value.shape)
        weights[name] = (value + step).astype(value.dtype)
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture(scope="module")
def served(tmp_path_factory, taught):
    place = tmp_path_factory.mktemp("served")
    folder, _ = taught
    folders = {"a": folder, "b": moved(folder, place / "b", 1)}
    options = ServerOptions(folder, name="tiny", max_model_len=LONGEST, dtype="float32", swaps=True)
    with VLLMServer(options, log=place / "server.log") as server:
        yield Served(server, folders, ChatTokens.load(folder))


def treated(make_ward, backend, meanwhile=None, scored=False, patients=PATIENTS):
    """Stays of the first patients; `meanwhile(over)` runs beside them until they are over."""
    stays = []

    async def go():
        over = asyncio.Event()
        side = asyncio.create_task(meanwhile(over)) if meanwhile else None
        pool = make_ward()
        await treat_all(
            range(patients), backend, pool, Prompts("compact"), CONFIG, seeds=[5] * patients,
            concurrency=patients, finished=stays.append,
            scorer=ActionScorer(backend) if scored else None,
        )  # fmt: skip
        pool.close()
        over.set()
        if side is not None:
            await side
        await backend.close()

    asyncio.run(go())
    return stays


class Judge:
    """Log-probabilities of whole dialogues under our own model."""

    def __init__(self, folder):
        self.model = qwen3.load(folder)
        self.score = jax.jit(lambda model, ids: token_logprobs(
            model, ids, temperature=TEMPERATURE).logprob)  # fmt: skip

    def __call__(self, ids):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(self.score(self.model, padded))[0, : len(ids)]


def test_weights_are_swapped_under_dialogues_without_a_stale_token(served, make_ward):
    """Every reply is, token by token, what the version that it is tagged with says."""
    control = WeightControl(served.endpoint(), served.folders["a"], key=served.server.key)
    backend = served.token_backend()
    swaps = []

    async def keep_swapping(over):
        for version in cycle("ba"):
            swaps.append(await control.swap(served.folders[version], version))
            await asyncio.sleep(0.2)
            if over.is_set() and version == "a":
                break
        await control.close()

    stays = treated(make_ward, backend, keep_swapping)
    assert [stay.status for stay in stays] == [COMPLETED] * PATIENTS
    assert len(swaps) >= 3 and all(swap.changed for swap in swaps)

    judges = {version: Judge(folder) for version, folder in served.folders.items()}
    versions = set()
    for stay in stays:
        last = stay.turns[-1].reply
        ids = [*last.prompt_ids, *last.token_ids]
        expected = {version: judge(ids) for version, judge in judges.items()}
        for turn in stay.turns:
            reply = turn.reply
            start = len(reply.prompt_ids)
            assert ids[:start] == list(reply.prompt_ids)
            part = slice(start, start + len(reply.token_ids))
            version = {"default": "a"}.get(reply.weight_version, reply.weight_version)
            np.testing.assert_allclose(reply.logprobs, expected[version][part], atol=CLOSE)
            versions.add(version)
    assert versions == {"a", "b"}
    # The two versions can be distinguished by what is compared.
    assert np.abs(expected["a"] - expected["b"]).max() > 10 * CLOSE


def test_tool_calls_are_read_from_the_servers_tokens(served, make_ward):
    backend = OpenAIBackend(served.endpoint(), ChatOptions(vllm=True), key=served.server.key)
    stays = treated(make_ward, backend)
    assert [stay.status for stay in stays] == [COMPLETED] * PATIENTS
    turns = [turn for stay in stays for turn in stay.turns]
    assert sum(stay.tool_calls for stay in stays) >= 0.9 * len(turns)
    for turn in turns:
        parsed = parse_reply(served.tokens.text(turn.reply.token_ids)).tool_calls
        assert [replace(call, id="") for call in turn.reply.tool_calls] == [
            replace(call, id="") for call in parsed
        ]


def test_exact_probabilities_are_our_models(served, make_ward):
    backend = served.token_backend()
    (stay,) = treated(make_ward, backend, scored=True, patients=1)
    decision = stay.decisions[0]
    turn = next(t for t in stay.turns if t.reply.tool_calls[0].name == "prescription")
    judge = jax.jit(lambda model, ids: token_logprobs(model, ids).logprob)
    model = qwen3.load(served.folders["a"])
    logprobs = []
    for action in range(25):
        text = write_call("prescription", prescription_arguments(action))
        call = [*served.tokens.encode(text), served.tokens.end_id]
        ids = [*turn.reply.prompt_ids, *call]
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(ids)] = ids
        found = np.asarray(judge(model, padded))[0]
        logprobs.append(found[len(ids) - len(call) : len(ids)].sum())
    want = np.exp(np.array(logprobs) - np.logaddexp.reduce(logprobs))
    np.testing.assert_allclose(decision.probabilities, want, atol=2e-3)
    assert sum(decision.probabilities) == pytest.approx(1.0)
