"""Dry runs: what they say a job takes is what it takes, and nothing is written."""

import json
import re

import pandas as pd
import pytest

from policy.testing.tiny_qwen3 import make_tiny
from tests.sepsis_jax.command_line import FAST, call, refuse


@pytest.fixture
def run(capsys):
    return lambda *arguments: call(capsys, *arguments)


def numbers(text):
    return [float(found.replace(",", "")) for found in re.findall(r"[\d,.]*\d", text)]


def test_a_sweep_takes_what_its_dry_run_said(run, model, cohort, tmp_path):
    command = (
        "sweep", "--model", model, "--episodes", cohort, "--steps", "0,2", "--horizon", 3,
        "--samples", 4, "--out", tmp_path / "sweep", "--json",
    )  # fmt: skip
    said = run(*command, "--dry-run").last_json
    assert not (tmp_path / "sweep").exists()
    done = run(*command).last_json
    branch_steps, blocks = numbers(said["branch-steps"])
    assert (branch_steps, blocks) == (done["branch_steps"], done["blocks"])
    rows, megabytes = numbers(said["on disk"])
    parts = list((tmp_path / "sweep" / "parts").glob("*.parquet"))
    assert rows == sum(len(pd.read_parquet(part)) for part in parts)
    assert megabytes == pytest.approx(sum(p.stat().st_size for p in parts) / 1e6, abs=0.1)
    assert numbers(said["memory at its most"])[0] > 0


def test_training_takes_what_its_dry_run_said(run, model, cohort, tmp_path):
    said = run(
        "world-model", "train", "--episodes", cohort, "--out", tmp_path / "m", *FAST, "--dry-run",
        "--json",
    ).last_json  # fmt: skip
    assert not (tmp_path / "m").exists()
    learned = json.loads((model / "metrics.json").read_text())
    assert numbers(said["updates, State Model"])[0] == len(learned["history"]["state"])
    stays, _ = numbers(said["stays, transitions to learn from"])
    table = pd.read_parquet(cohort / "episodes.parquet")
    assert stays == table.loc[table["split"] == "train", "stay_id"].nunique()


def test_an_agent_takes_no_more_than_its_dry_run_said(run, model, cohort, tmp_path):
    llm = make_tiny(tmp_path / "llm")
    command = ("agent", "run", "--model", model, "--llm", llm, "--out", tmp_path / "agent",
               "--dry-run", "--json")  # fmt: skip
    said = run(*command, "--patients", 3, "--set", "max_steps=2").last_json
    assert numbers(said["decisions"]) == [6]
    assert numbers(said["replies"])[:2] == [6 * 21, 21]
    weights = sum(file.stat().st_size for file in llm.glob("*.safetensors"))
    assert numbers(said["weights"])[0] == pytest.approx(weights / 2**20, rel=0.02, abs=0.1)
    recorded = run(*command, "--episodes", cohort, "--set", "split=all").last_json
    table = pd.read_parquet(cohort / "episodes.parquet")
    assert numbers(recorded["patients"])[0] == table["stay_id"].nunique()
    assert numbers(recorded["decisions"])[0] == len(table)
    refuse(run(*command[:5], tmp_path / "none", *command[6:]), "none")
    assert not (tmp_path / "agent").exists()
