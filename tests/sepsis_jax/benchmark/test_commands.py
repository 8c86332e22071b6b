"""`bench` and `profile` from end to end, small."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pandas as pd
import pytest

from policy.qwen3.config import Qwen3Config
from policy.train.loop.metrics import flops_per_token
from sepsis_jax.benchmark import quick
from sepsis_jax.benchmark.bench import BenchOptions, run_bench
from sepsis_jax.benchmark.timing import Contender, Timed
from tests.sepsis_jax.command_line import call, leftovers, refuse
from tests.toy import toy_episodes
from worldmodel.models.checkpoint import load_world_model, save_world_model
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import published_scaler
from worldmodel.simulate.history import start_history

TINY = ("--branches", 4, "--plans", 2, "--samples", 2, "--horizon", 1)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "model"
    config = ModelConfig(variant="reference", hidden=8, layers=1, embed=4, head=4)
    save_world_model(init_world_model(jax.random.key(0), published_scaler(), config), folder)
    return folder


@pytest.fixture(autouse=True)
def little_to_do(monkeypatch):
    """Patients at hand and small matrix products."""

    def patient_pool(world_model, seed):
        return start_history(world_model, toy_episodes(8), 0)

    for module in ("bench", "setup"):
        monkeypatch.setattr(f"sepsis_jax.benchmark.{module}.patient_pool", patient_pool)
    monkeypatch.setattr("sepsis_jax.benchmark.hardware.SHAPES", {"cpu": ((8, 8, 8),)})
    monkeypatch.setattr("sepsis_jax.benchmark.hardware._LEAST", {"cpu": 1e4})


def test_bench(small_model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sepsis_jax.benchmark.bench.torch_installed", lambda: False)
    out = tmp_path / "bench"
    result = call(capfd, "bench", "--model", small_model, *TINY, "--repeats", 2,
                  "--question-samples", 4, "--only", "rollout", "--only", "sharded",
                  "--only", "agent's question", "--out", out, "--json")  # fmt: skip
    assert result.status == 0, result.err
    assert leftovers(out) == ["bench.csv", "bench.json", "scaling.png"]
    assert result.out.count("\n") == 1  # the JSON alone
    table = pd.read_csv(out / "bench.csv")
    assert set(zip(table["name"], table["branches"], strict=True)) == {
        ("rollout", 4),
        ("sharded", 4),
    }
    assert (table["min"] <= table["median"]).all() and (table["median"] <= table["max"]).all()
    assert np.isfinite(table["checksum"]).all() and (table["compile_seconds"] >= 0).all()
    kept = json.loads((out / "bench.json").read_text())
    assert {key: result.last_json[key] for key in kept} == kept
    assert [row["branches"] for row in kept["question"]] == [100, 100]
    assert kept["hardware"]["cores"] >= 1 and kept["versions"]["jax"]
    share = kept["bound"]["shares"]
    assert len(share) == 2 and all(row["median"] > 0 for row in share.values())


def test_torch_takes_its_turns(small_model):
    pytest.importorskip("torch")
    options = BenchOptions(branches=(4,), plans=2, samples=2, horizon=1, repeats=2,
                           only=("sharded", "torch, eager", "torch, one branch"))  # fmt: skip
    result = run_bench(load_world_model(small_model), options)
    assert [row["name"] for row in result["table"]] == list(options.only)
    assert [row["branches"] for row in result["table"]] == [4, 4, 1]
    assert set(result["ratios"]) == {"batched torch", "torch, one branch"}
    assert any(row["name"].startswith("torch") for row in result["peak"])


TINY_LANGUAGE_MODEL = quick.LanguageModel(
    Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, rope_theta=1e6,
        tie_word_embeddings=True,
    ),
    rows=1, length=32, prompts=2, prompt=8, drawn=4,
)  # fmt: skip


def test_quick(small_model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(quick, "ENVIRONMENTS", 3)
    monkeypatch.setattr(quick, "LANGUAGE_MODEL", TINY_LANGUAGE_MODEL)
    monkeypatch.setattr(quick, "synthetic_stays", lambda seed: toy_episodes(8))
    monkeypatch.setattr(quick, "torch_wanted", lambda _: False)
    monkeypatch.setattr("sepsis_jax.benchmark.bench.torch_installed", lambda: False)
    # Nothing reads the flags any more, as the backend has begun.
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path} --xla_of=1")
    out = tmp_path / "quick"
    small = ("--quick", "--model", small_model, *TINY, "--question-samples", 4, "--repeats", 2)
    result = call(capfd, "bench", *small, "--out", out)
    assert result.status == 0, result.err
    assert leftovers(out) == ["quick.json"]
    text = (out / "quick.json").read_text()
    assert str(tmp_path) not in text
    kept = json.loads(text)
    assert kept["hardware"]["xla_flags"] == "--xla_of=1"
    assert kept["versions"]["jax"] and kept["model"] and kept["load_before"] >= 0
    figures = {one["name"]: one for one in kept["figures"]}
    assert [(name, one["unit"]) for name, one in figures.items()][:-1] == [
        ("rollouts, sharded, 4 branches", "branch-steps/s"),
        ("rollouts: share of the bound by matrix products", "%"),
        ("agent's question, 100 branches", "ms"),
        ("agent's question, with mortality, 100 branches", "ms"),
        ("environment, 3 patients, a million steps", "s"),
        ("language model, train step", "tokens/s"),
        ("language model, train step: MFU", "%"),
        ("language model, sampler", "tokens/s"),
        ("language model, sampler: MFU", "%"),
    ]
    for name, one in figures.items():
        assert 0 < one["min"] <= one["median"] <= one["max"]
        assert name in result.out  # a line of the table


def test_quick_counts_what_a_token_costs():
    """A prompt is read once for all tokens that are drawn after it."""
    language = replace(TINY_LANGUAGE_MODEL, prompt=12, drawn=4)
    (sampled, trained, peak) = (
        Timed(Contender(name, run=print, work=1.0), np.array([rate]), None)
        for name, rate in (("sampler", 2.0), ("train step", 3.0), ("products", 1e6))
    )
    found = {one.name: one for one in quick._language_model(language, trained, sampled, peak)}
    training = 3.0 * flops_per_token(language.config, 32)
    assert found["language model, train step: MFU"].median == pytest.approx(100 * training / 1e6)
    forward = 2.0 * flops_per_token(language.config, 16) / 3 * 16 / 4
    assert found["language model, sampler: MFU"].median == pytest.approx(100 * forward / 1e6)


def test_profile(small_model, tmp_path, capfd):
    out = tmp_path / "profile"
    result = call(capfd, "profile", "--model", small_model, *TINY, "--out", out, "--json")
    assert result.status == 0, result.err
    assert leftovers(out) == ["profile.csv", "profile.json", "trace"]
    table = pd.read_csv(out / "profile.csv").set_index("part")
    assert table["share"].sum() == pytest.approx(1.0)
    assert table["share"].drop("idle").between(0, 1).all()
    assert table.loc[["idle"], "share"].item() < 1
    assert result.last_json["devices"] >= 1


def test_profile_of_a_loaded_model_on_two_devices(small_model, tmp_path):
    """A model that was loaded lies on the first device."""
    words = ["profile", "--model", small_model, *TINY, "--out", tmp_path / "profile", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "sepsis_jax", *map(str, words)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--branches", 7), ("branches: got 7", "multiple of 4 plans x 16 samples")),
        (("--only", "numpy"), ("only: 'numpy'", "known")),
        (("--kernel", "cuda"), ("kernel: got cuda", "auto, xla, pallas")),
        (("--precision", "half"), ("precision: got", "highest")),
        (("--repeats", 0), ("repeats",)),
        (("--quick", "--only", "rollout"), ("only: ", "contenders of its own")),
    ],
)
def test_bad_input_is_refused(arguments, words, tmp_path, capfd):
    refuse(call(capfd, "bench", *arguments, "--out", tmp_path / "bench"), *words)
    assert not (tmp_path / "bench").exists()
