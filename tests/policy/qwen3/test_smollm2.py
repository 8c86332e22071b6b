"""SmolLM2-135M-Instruct: a real pretrained model through the decoder, the sampler and vLLM.

make smollm2-folder && SMOLLM2=runs/smollm2/start pytest -m slow tests/policy/qwen3/test_smollm2.py
"""

import asyncio
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from policy import qwen3
from policy.agent.tools import SCHEMAS, DecisionTokens, prescription_calls
from policy.qwen3.logprobs import token_logprobs
from policy.qwen3.sampler import Draw, generate
from policy.serving.backend import Sampling
from policy.serving.tokens import ChatTokens
from tests.policy.serving.real import NEEDS_VLLM

FOLDER = os.environ.get("SMOLLM2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER, reason="no folder of SmolLM2: make smollm2-folder, and set SMOLLM2 to it"
    ),
]
CLOSE = 1e-3  # nats; float32 of two programs, 30 layers
LONGEST = 640  # tokens; the schemas of the tools are 400
CHARTS = [
    "Sepsis.\nt 0 MAP 58.0 HR 112 lactate 4.1 urine 60 given [0, 0]",
    "Sepsis.\nt 5 MAP 71.5 HR 84 lactate 1.4 urine 320 given [2, 1]",
    "What is the capital of France?",
]


@pytest.fixture(scope="module")
def model():
    return qwen3.load(FOLDER)


@pytest.fixture(scope="module")
def tokens():
    return ChatTokens.load(FOLDER)


@pytest.fixture(scope="module")
def prompts(tokens):
    return [tokens.first([{"role": "user", "content": text}], SCHEMAS) for text in CHARTS]


@pytest.fixture(scope="module")
def told(model):
    run = nnx.jit(lambda model, ids: token_logprobs(model, ids).logprob)

    def logprobs(prompt, reply):
        ids = np.zeros((1, LONGEST), int)
        ids[0, : len(prompt) + len(reply)] = [*prompt, *reply]
        return np.asarray(run(model, ids))[0, len(prompt) : len(prompt) + len(reply)]

    return logprobs


def test_it_is_a_llama_whose_levels_are_single_tokens(model, tokens):
    assert (model.config.model_type, model.config.num_hidden_layers) == ("llama", 30)
    assert len(DecisionTokens.of(tokens).levels) == 5
    # As the published tokenizer splits: digits alone, spaces before them too.
    assert [tokens.text([one]) for one in tokens.encode("a  12")] == ["a", "  ", "1", "2"]


def test_it_knows_the_capital_of_france(model, tokens):
    prompt = tokens.first([{"role": "user", "content": CHARTS[2]}], ())
    (reply,) = generate(
        model, [Draw(prompt, temperature=0, max_completion_length=16)], stop_ids=[tokens.end_id]
    )
    assert "Paris" in tokens.text(reply.token_ids) and reply.stopped


@pytest.mark.parity
def test_logits_are_those_of_transformers(model, prompts):
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([prompts[0]])).logits.numpy()
    found = nnx.jit(qwen3.logits)(model, np.array([prompts[0]]))
    np.testing.assert_allclose(jax.nn.log_softmax(found), jax.nn.log_softmax(expected), atol=CLOSE)


class TestServed:
    """By vLLM, float32."""

    pytestmark = NEEDS_VLLM

    @pytest.fixture(scope="class")
    def served(self, tmp_path_factory):
        from policy.serving.vllm import ServerOptions, VLLMServer

        options = ServerOptions(Path(FOLDER), name="smol", max_model_len=1024, dtype="float32")
        with VLLMServer(options, log=tmp_path_factory.mktemp("vllm") / "server.log") as server:
            yield server

    def test_log_probabilities_are_those_of_our_model(self, served, prompts, tokens, told):
        """Of what vLLM draws, and of calls that it would not."""
        from policy.serving.client import Endpoint
        from policy.serving.vllm import VLLMGenerator

        sampling = Sampling(temperature=1.0, top_p=1.0, max_completion_length=32)
        call = prescription_calls(tokens)[7]

        async def ask():
            generator = VLLMGenerator(Endpoint(served.url, "smol"), key=served.key)
            try:
                drawn = await asyncio.gather(
                    *(generator.generate(one, sampling=sampling, seed=3) for one in prompts)
                )
                scored = [await generator.score(one, [call]) for one in prompts]
            finally:
                await generator.close()
            return drawn, scored

        drawn, scored = asyncio.run(ask())
        furthest = 0.0
        for prompt, completion, (of_call,) in zip(prompts, drawn, scored, strict=True):
            apart = completion.logprobs - told(prompt, completion.token_ids)
            furthest = max(furthest, float(np.abs(apart).max()))
            assert of_call == pytest.approx(float(told(prompt, call).sum()), abs=CLOSE * len(call))
        print(f"furthest apart: {furthest:.1e} nats")
        assert furthest < CLOSE
