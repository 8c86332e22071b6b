"""`sepsis-jax policy sft|bc|rl|stages` with tiny models, small enough to watch everything."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from policy.qwen3.config import RopeScaling, load_config
from policy.testing.tiny_qwen3 import make_tiny
from sepsis_jax.pipelines.episodes import make_synthetic_cohort
from sepsis_jax.pipelines.llm.setup import ModelOptions, open_policy
from sepsis_jax.pipelines.llm.stages import StagesOptions, _parts
from tests.sepsis_jax.command_line import call, finish, refuse
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import save_world_model
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import published_scaler

SMALL = """
sft:
  questions: {count: 6, charts: compact}
  training: &training
    {row_length: 512, micro_batch_size: 4, learner:
      {max_steps: 4, warmup_steps: 0, logging_steps: 2, save_steps: 2}}
bc:
  patients: 2
  runner: &runner
    {max_steps: 2, templates: compact, concurrency: 4, forecast: {samples: 2}, dialogue:
      {memory: decision, max_invalid: 1,
       sampling: {temperature: 1.0, top_p: 1.0, max_completion_length: 64}}}
  replay: {count: 6, charts: compact}
  training: *training
rl:
  runner: *runner
  samples: 1
  agentic: {iterations: 3, patients: 4, num_minibatches: 1, row_length: 1024, micro_batch_size: 4}
  learner: {learning_rate: 0.001, warmup_steps: 0}
  eval_steps: 2
  eval_patients: 4
baselines: [episode]
baseline_num_generations: 2
evaluation: {patients: 4, comparators: [clinician, titration],
  questions: {kinds: [mortality, vasopressor], count: 12, charts: compact}}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Episodes, an untrained world model and settings."""
    folder = tmp_path_factory.mktemp("inputs")
    make_synthetic_cohort(folder / "episodes", patients=60)
    config = ModelConfig(variant="residual", hidden=8, layers=1, embed=4, head=4)
    world_model = init_world_model(jax.random.key(0), published_scaler(), config)
    save_world_model(world_model, folder / "model")
    (folder / "small.yaml").write_text(SMALL)
    return folder


def lines(folder):
    return [json.loads(x) for x in (folder / "metrics/metrics.jsonl").read_text().splitlines()]


def test_all_stages(inputs, tmp_path, capsys):
    """Every stage leaves a model, the next begins with it, and each is evaluated."""
    out = tmp_path / "stages"
    given = ("--model", inputs / "model", "--episodes", inputs / "episodes")
    finish("policy", "stages", "--config", inputs / "small.yaml", *given, "--out", out)
    table = pd.read_csv(out / "stages.csv")
    stages = ["sft", "bc", "rl", "rl_episode"]
    endings = ("", ", simulator shuffled", ", simulator none")
    rows = [f"{stage}{ending}" for stage in stages[:3] for ending in endings] + stages[3:]
    assert table.stage.tolist() == ["clinician", "titration", *rows]
    assert (table.stays == 4).all() and table.mortality_auroc[2:].between(0, 1).all()
    values = table.set_index("stage").value
    begins_with = {"sft": None, "bc": "sft", "rl": "bc", "rl_episode": "bc"}
    for row in rows:
        before = row.split(",")[0] if "," in row else begins_with[row]
        expected = np.nan if before is None else values[row] - values[before]
        gain = table.set_index("stage").gain[row]
        np.testing.assert_allclose(gain, expected, atol=1e-9)
    for name in ("clinician", "titration"):
        less = table.set_index("stage")[f"less_{name}"]
        np.testing.assert_allclose(less[2:], values[2:] - values[name], atol=1e-9)
    for stage in stages:
        assert (out / stage / "model" / "config.json").exists()
    weights = [load_file(out / stage / "model" / "model.safetensors") for stage in ("sft", "bc")]
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])
    first, second, _ = lines(out / "rl")
    assert "held_out_value" in second and "held_out_value" not in first
    assert first["mismatch_max"] < 1e-4 and first["played_stays"] == 4
    speeds = [json.loads(x) for x in (out / "rl/metrics/timing.jsonl").read_text().splitlines()]
    assert len(speeds) == 3 and all(one["sampled_per_s"] > 0 for one in speeds)
    assert "read_per_s" not in speeds[0] and speeds[1]["read_per_s"] > 0
    assert (out / "curves.png").stat().st_size > 10_000
    before = (out / "stages.csv").read_bytes()
    again = ("policy", "stages", "--config", inputs / "small.yaml", *given, "--out", out)
    refuse(call(capsys, *again), "--resume")
    finish(*again, "--resume")
    assert (out / "stages.csv").read_bytes() == before


def test_a_given_llama_is_evaluated_before_it_is_trained(inputs, tmp_path):
    """With and without a simulator; comparators are cut off where its stays are."""
    out = tmp_path / "stages"
    start = make_tiny(
        tmp_path / "llama", model_type="llama", rope_scaling=RopeScaling("linear", 2.0), vocab=680
    )
    given = ("--model", inputs / "model", "--episodes", inputs / "episodes", "--llm", start)
    finish(
        "policy", "stages", "--config", inputs / "small.yaml", *given, "--out", out,
        "--set", "baselines=[]", "--set", "evaluation.without=[none]",
        "--set", "evaluation.without_stages=[start, bc]", "--set", "rl.agentic.iterations=1",
        "--set", "rl.eval_steps=0", "--set", "sft.training.model.lora_rank=2",
        "--set", "evaluation.questions.kinds=[mortality]",
        "--set", "sft.training.row_length=1024", "--set", "bc.training.row_length=1024",
    )  # fmt: skip
    table = pd.read_csv(out / "stages.csv").set_index("stage")
    expected = ["start", "start, simulator none", "sft", "bc", "bc, simulator none", "rl"]
    assert table.index.tolist() == ["clinician", "titration", *expected]
    assert table.loc["sft", "gain"] == pytest.approx(table.value["sft"] - table.value["start"])
    assert np.isnan(table.loc["start", "gain"])
    # Two steps have neither an outcome nor its 15 points.
    assert table.value[["clinician", "titration"]].abs().max() < 8
    saved = load_config(out / "rl" / "model")
    assert (saved.model_type, saved.rope_scaling) == ("llama", RopeScaling("linear", 2.0))


def rl(inputs, folder, out, *more):
    return [
        "policy", "rl", "--llm", folder, "--model", inputs / "model", "--config",
        inputs / "small.yaml", "--out", out, *more,
    ]  # fmt: skip


def test_a_killed_run_goes_on_to_the_same_end(inputs, taught, tmp_path):
    """SIGKILL after a checkpoint, wherever it happens to be; metrics and weights byte for byte."""
    folder, _ = taught
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(*rl(inputs, folder, whole))
    command = [sys.executable, "-c", "from sepsis_jax.cli import main; main()"]
    process = subprocess.Popen(
        [*command, *map(str, rl(inputs, folder, cut))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (cut / "checkpoints" / "steps" / "1").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "model").exists()
    finish(*rl(inputs, folder, cut, "--resume"))
    for name in ("metrics/metrics.jsonl", "model/model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_bad_requests_end_with_one_line(inputs, taught, tmp_path, capsys):
    folder, _ = taught
    for number, (more, word) in enumerate(
        (
            (("--set", "rl.runner.dialogue.sampling.top_p=0.9"), "top_p"),
            (("--set", "rl.agentic.advantages.kind=step"), "num_generations"),
            (("--backend", "openai", "--url", "http://127.0.0.1:9/v1"), "embedded or vllm"),
        )
    ):
        refuse(call(capsys, *rl(inputs, folder, tmp_path / str(number), *more)), word)
    refuse(call(capsys, "policy", "bc", "--llm", folder, "--out", tmp_path / "c"), "records")


def test_devices_that_cannot_be_shared_out_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    for options in (ModelOptions(fsdp=16), ModelOptions(fsdp=3), ModelOptions(tensor=8)):
        with pytest.raises(InputError, match="does not divide 4 devices"):
            options.mesh()


def test_a_seed_moves_every_seed():
    before, after = StagesOptions(), StagesOptions(seed=7).seeded()

    def seeds(options):
        return {
            "tiny": options.tiny.seed, "sft": options.sft.seed, "bc": options.bc.seed,
            "bc.runner": options.bc.runner.seed, "rl": options.rl.seed,
            "rl.runner": options.rl.runner.seed, "rl.eval": options.rl.eval_seed,
            "evaluation": options.evaluation.seed,
        }  # fmt: skip

    assert seeds(after) == {name: seed + 7 for name, seed in seeds(before).items()}


def test_a_planner_by_name_needs_a_world_model_and_records(inputs):
    for given in ({}, {"episodes": inputs / "episodes"}, {"model": inputs / "model"}):
        with pytest.raises(InputError, match="needs a world model to search, and recorded stays"):
            open_policy("planner", **given)


def test_recorded_stays_replace_demonstrations(inputs, taught, tmp_path, capsys):
    """Only the accepted stays of an agent's run are learned from."""
    folder, _ = taught
    run = tmp_path / "agent"
    finish(
        "agent", "run", "--llm", folder, "--model", inputs / "model", "--patients", 8,
        "--templates", "compact", "--set", "max_steps=2", "--set", "forecast.samples=2",
        "--set", "dialogue.sampling.max_completion_length=64", "--out", run,
    )  # fmt: skip
    asked = ("policy", "bc", "--llm", folder, "--records", run, "--config", inputs / "small.yaml")
    finish(*asked, "--set", "bc.training.row_length=2112",
           "--set", "bc.rejection.violations=2", "--out", tmp_path / "bc")  # fmt: skip
    assert (tmp_path / "bc" / "model" / "config.json").exists()
    none = ("--set", "bc.rejection.total_reward=1000", "--out", tmp_path / "none")
    refuse(call(capsys, *asked, *none), "good enough")


def test_progress_of_all_stages_never_goes_back():
    told = []
    for part in _parts(lambda phase, share: told.append((share, phase)), ["rl_episode"]).values():
        part("begins", 0.0)
        part("ends", 1.0)
    assert told == sorted(told, key=lambda one: one[0])
    assert told[0] == (0.0, "records: begins") and told[-1][0] == pytest.approx(1.0)
