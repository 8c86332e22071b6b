"""Stage III over two processes, each with a sampler of its own, learns what one process learns."""

import json
import socket

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.policy.train.test_sharded_training import finished, python
from worldmodel.models.checkpoint import save_world_model
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import published_scaler

SETTINGS = """
rl:
  runner:
    {max_steps: 2, templates: compact, concurrency: 4, forecast: {samples: 2}, dialogue:
      {memory: decision, max_invalid: 1,
       sampling: {temperature: 1.0, top_p: 1.0, max_completion_length: 64}}}
  samples: 1
  agentic:
    {iterations: 2, patients: 4, num_minibatches: 2, row_length: 1024, micro_batch_size: 4,
     objective: {beta: 0.1}}
  learner: {learning_rate: 0.001, warmup_steps: 0}
"""
COMMAND = "import sys; from sepsis_jax.cli import main; sys.argv[0] = 'sepsis-jax'; main()"


def run(inputs, llm, out, *more, count):
    """The command in `count` processes of one device each; its metrics and weights."""
    words = ("policy", "rl", "--config", inputs / "small.yaml", "--model", inputs / "model",
             "--llm", llm, "--out", out, *more)  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"SEPSIS_JAX_COORDINATOR": f"127.0.0.1:{port}", "SEPSIS_JAX_PROCESSES": str(count)}
    finished(
        [
            python(
                COMMAND,
                *words,
                JAX_NUM_CPU_DEVICES="1",
                **(job | {"SEPSIS_JAX_PROCESS": str(number)} if count > 1 else {}),
            )
            for number in range(count)
        ]
    )
    lines = (out / "metrics" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """An untrained world model and settings."""
    folder = tmp_path_factory.mktemp("inputs")
    config = ModelConfig(variant="residual", hidden=8, layers=1, embed=4, head=4)
    save_world_model(
        init_world_model(jax.random.key(0), published_scaler(), config), folder / "model"
    )
    (folder / "small.yaml").write_text(SETTINGS)
    return folder


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_two_processes_learn_what_one_does(inputs, taught, tmp_path, staleness):
    folder, _ = taught
    more = ("--set", f"rl.agentic.staleness={staleness}")
    alone, ours = run(inputs, folder, tmp_path / "one", *more, count=1)
    together, found = run(inputs, folder, tmp_path / "two", *more, count=2)
    assert [line["step"] for line in together] == [1, 2]  # written once
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys() and b["played_stays"] == 4  # of both processes
        assert a["learned_tokens"] == b["learned_tokens"]  # the same dialogues, to the token
        for name in ("loss", "grad_norm", "kl", "played_value", "mismatch_max"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-4), name
    start = load_file(folder / "model.safetensors")
    assert any(np.abs(ours[name] - start[name]).max() > 1e-3 for name in start)
    for name in ours:  # but for a few with next to no gradient, of which Adam takes the sign
        apart = np.abs(ours[name] - found[name])
        assert np.mean(apart > 1e-4) < 0.01, name
