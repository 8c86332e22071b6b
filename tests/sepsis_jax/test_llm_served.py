"""Stage III with a real vLLM server in the loop: weights travel, tokens say whose they are."""

import json

import jax
import pytest

from policy.serving.vllm import ServerOptions, VLLMServer
from policy.train.loop.optimizer import LearnerConfig
from sepsis_jax.pipelines.agent import BackendOptions
from sepsis_jax.pipelines.llm.rl import RLOptions, run_rl
from sepsis_jax.pipelines.llm.setup import ModelOptions, RunnerOptions
from tests.policy.serving.real import NEEDS_VLLM
from worldmodel.configuration import from_mapping
from worldmodel.models.checkpoint import save_world_model
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import published_scaler

pytestmark = NEEDS_VLLM

ITERATIONS, PATIENTS = 4, 6
CLOSE = 2e-3  # between float32 of two programs, in nats
RANK = 8


def options(publish="weights", **agentic):
    runner = {
        "templates": "compact", "max_steps": 2, "concurrency": PATIENTS, "forecast": {"samples": 2},
        "dialogue": {"memory": "decision", "max_invalid": 1,
                     "sampling": {"temperature": 1.0, "top_p": 1.0, "max_completion_length": 64}},
    }  # fmt: skip
    values = {
        "iterations": ITERATIONS,
        "patients": PATIENTS,
        "row_length": 1024,
        "micro_batch_size": 4,
    }
    return RLOptions(
        runner=from_mapping(RunnerOptions, runner, source="test"),
        agentic=from_mapping(type(RLOptions().agentic), values | agentic, source="test"),
        learner=LearnerConfig(learning_rate=5e-3 if publish == "weights" else 0.05, warmup_steps=0),
        model=ModelOptions(lora_rank=0 if publish == "weights" else RANK),
        publish=publish,
        samples=1,
    )


@pytest.fixture(scope="module")
def world_model(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "model"
    config = ModelConfig(variant="residual", hidden=8, layers=1, embed=4, head=4)
    save_world_model(init_world_model(jax.random.key(0), published_scaler(), config), out)
    return out


@pytest.fixture(scope="module")
def server(taught, tmp_path_factory):
    folder, _ = taught
    chosen = ServerOptions(folder, name="tiny", max_model_len=1024, dtype="float32", swaps=True,
                           lora_rank=RANK)  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "server.log"
    with VLLMServer(chosen, log=log) as running:
        yield running


# Adapters first: they need the server's first weights beneath them.
@pytest.mark.parametrize(
    ("publish", "staleness"), [("adapters", 0), ("weights", 0), ("weights", 1)]
)
def test_the_server_draws_with_the_weights_that_were_learned(
    taught, world_model, server, tmp_path, monkeypatch, publish, staleness
):
    """Were a weight stale or a token re-read, trainer and server would not agree on it.

    A step of the learning rate moves log-probabilities by far more than `CLOSE`, which the
    mismatch with one version of staleness shows.
    """
    folder, _ = taught
    monkeypatch.setenv("TEST_KEY", server.key)
    backend = BackendOptions(
        kind="vllm", llm=str(folder), url=f"{server.url}/v1", key_variable="TEST_KEY",
        served_name="tiny",
    )  # fmt: skip
    out = tmp_path / "run"
    run_rl(
        out, options(publish, staleness=staleness), llm=folder, model=world_model, backend=backend
    )
    lines = [json.loads(x) for x in (out / "metrics" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, ITERATIONS + 1))
    for line in lines:
        behind = min(line["step"] - 1, staleness)
        assert line["staleness"] == behind
        assert line["lost_stays"] == 0
        assert line["mismatch_max"] < CLOSE or behind
        assert {"mismatch_mean", "mismatch_kl", "correction", "played_value"} <= line.keys()
    if staleness:
        assert max(line["mismatch_max"] for line in lines) > 5 * CLOSE
    assert (out / "model" / "config.json").exists()
    assert len(list((out / "versions").iterdir())) == 1  # older ones are gone
