"""`sepsis-jax study`: stages by content, runs that are killed, seeds, and two studies compared."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from policy.agent.records import RECORDS_FILE
from sepsis_jax.pipelines.agent import AgentOptions
from sepsis_jax.pipelines.study import (
    StudyCohort,
    StudyOptions,
    _ask,
    compare_studies,
    over_seeds,
    stages_of,
    study_plan,
)
from sepsis_jax.pipelines.study_stages import (
    DONE,
    GOES_ON,
    TO_RUN,
    Stage,
    fingerprints,
    plan,
    run_all,
)
from sepsis_jax.runs import silent
from tests.sepsis_jax.command_line import call, finish, refuse
from worldmodel.configuration import load_config
from worldmodel.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def chain(log, *, second=1, fails=False):
    """Three stages that write a file each; the second reads the first, the third the second."""

    def stage(name, settings, reads):
        def run(to, progress):
            to.mkdir(exist_ok=True)
            log.append((name, sorted(path.name for path in to.iterdir())))
            (to / "half").write_text("")
            if name == "b" and fails:
                raise KeyboardInterrupt
            (to / "whole").write_text(str(settings))

        return Stage(name, settings, reads, run)

    return [stage("a", {"x": 1}, ()), stage("b", {"x": second}, ("a",)), stage("c", {}, ("b",))]


def test_only_what_changed_runs_again(tmp_path):
    log = []
    assert set(run_all(tmp_path, chain(log)).values()) == {TO_RUN}
    assert [name for name, _ in log] == ["a", "b", "c"]
    assert set(run_all(tmp_path, chain(log)).values()) == {DONE} and len(log) == 3
    changed = chain(log, second=2)
    assert plan(tmp_path, changed) == {"a": DONE, "b": TO_RUN, "c": TO_RUN}
    run_all(tmp_path, changed)
    assert log[3:] == [("b", []), ("c", [])]  # in empty folders
    assert (tmp_path / "b" / "whole").read_text() == "{'x': 2}"


def test_a_stage_that_was_stopped_goes_on_with_what_it_has(tmp_path):
    log = []
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path, chain(log, fails=True))
    assert plan(tmp_path, chain(log)) == {"a": DONE, "b": GOES_ON, "c": TO_RUN}
    run_all(tmp_path, chain(log))
    assert log[2:] == [("b", ["half"]), ("c", [])]
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path, chain(log, second=2, fails=True))
    # Settings that are neither those of what is done nor of what was begun.
    assert plan(tmp_path, chain(log, second=3))["b"] == TO_RUN


def test_hashes_follow_what_a_stage_reads():
    one, other = fingerprints(chain([])), fingerprints(chain([], second=2))
    assert one["a"] == other["a"] and one["b"] != other["b"] and one["c"] != other["c"]
    with pytest.raises(InputError, match="not before it"):
        fingerprints(chain([])[1:])


def test_the_shipped_study_has_every_stage(tmp_path, capsys):
    options = load_config(StudyOptions, ROOT / "configs" / "demo.yaml")
    names = [stage.name for stage in stages_of(tmp_path, options, 0)]
    assert names[:4] == ["cohort", "world_model", "audit", "policies"]
    assert names[-1] == "evaluation" and "asked_rl" in names
    two = replace(options, seeds=(0, 1))
    planned = study_plan(tmp_path, two)
    assert set(planned) == {"seed-0", "seed-1"}
    seeds = [fingerprints(stages_of(tmp_path, two, seed)) for seed in (0, 1)]
    assert all(seeds[0][name] != seeds[1][name] for name in names)
    result = call(capsys, "study", ROOT / "configs" / "demo.yaml", "--out", tmp_path, "--dry-run",
                  "--json")  # fmt: skip
    assert set(result.last_json["stages"]["seed-0"].values()) == {TO_RUN}
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="behavior"):
        StudyOptions(cohort=StudyCohort(data="mimic"))


def test_means_and_spreads_over_seeds():
    tables = {
        seed: pd.DataFrame({"policy": ["a", "b"], "wis": [seed, 5.0], "wis_low": [0.0, 0.0],
                            "trust": [True, False]})
        for seed in (1.0, 3.0)
    }  # fmt: skip
    found = over_seeds(tables)
    assert found.columns.tolist() == ["policy", "seeds", "wis", "wis_sd"]
    assert found.wis.tolist() == [2.0, 5.0]
    assert found.wis_sd.tolist() == [pytest.approx(np.sqrt(2)), 0.0]


def test_two_studies_side_by_side(tmp_path, capsys):
    for name, value in (("one", 1.0), ("other", 1.5)):
        (tmp_path / name).mkdir()
        table = pd.DataFrame({"policy": ["a"], "seeds": [1], "wis": [value], "dr": [2.0]})
        table.to_csv(tmp_path / name / "policies.csv", index=False)
    found = compare_studies(tmp_path / "one", tmp_path / "other")["policies"]
    assert found.set_index("value_of").difference.to_dict() == {"wis": 0.5, "dr": 0.0}
    result = call(capsys, "study", "diff", tmp_path / "one", tmp_path / "other")
    assert result.status == 0 and "1 of 2 numbers differ" in result.out
    refuse(call(capsys, "study", "diff", tmp_path / "one", tmp_path), "no table in common")


WHOLE = """
cohort: {patients: 60}
world_model: WORLD_MODEL
policies: {methods: [iql], patients: 20, iql: {updates: 20}}
simple: [guideline, random]
evaluation: {patients: 20, samples: 1, ope: {n_bootstrap: 50, subgroups: false}}
language_model:
  sft:
    questions: {count: 6, charts: compact}
    training: &training
      {row_length: 512, micro_batch_size: 4, learner:
        {max_steps: 2, warmup_steps: 0, logging_steps: 2, save_steps: 2}}
  bc:
    patients: 2
    runner: &runner
      {max_steps: 2, templates: compact, concurrency: 4, forecast: {samples: 2}, dialogue:
        {memory: decision, max_invalid: 1,
         sampling: {temperature: 1.0, top_p: 1.0, max_completion_length: 8}}}
    replay: {count: 6, charts: compact}
    training: *training
  rl:
    runner: *runner
    samples: 1
    agentic: {iterations: 2, patients: 4, num_minibatches: 1, row_length: 1024, micro_batch_size: 4}
    learner: {learning_rate: 0.001, warmup_steps: 0}
  evaluation: {patients: 4, without_patients: 2, without: [none], comparators: [clinician],
    questions: {kinds: [mortality, vasopressor], count: 12, charts: compact}}
"""
MODEL = """
state: {epochs: 1, batch_size: 64}
outcome: {epochs: 1}
stays: {epochs: 1, batch_size: 16}
model: {variant: reference, hidden: 8, layers: 1, embed: 4, head: 4}
"""


def settings(folder):
    (folder / "world_model.yaml").write_text(MODEL)
    (folder / "study.yaml").write_text(
        WHOLE.replace("WORLD_MODEL", str(folder / "world_model.yaml"))
    )
    return folder / "study.yaml"


def contents(folder):
    """Bytes of every table and model."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".csv", ".safetensors", ".tex", ".jsonl") and path.name != "timing.jsonl"
    }


def test_asking_that_was_killed_begins_anew(tmp_path, monkeypatch):
    """What was said depends, by rounding, on who else was asked at the same time."""
    asked = []
    monkeypatch.setattr(
        "sepsis_jax.pipelines.study.run_agent",
        lambda to, *_, **more: asked.append((to.exists(), more.get("resume", False))),
    )
    to = tmp_path / "asked_bc"
    to.mkdir()
    (to / "records.jsonl").write_text("{}")
    _ask(AgentOptions(), tmp_path, tmp_path, tmp_path, to, silent)
    assert asked == [(False, False)]


@pytest.mark.slow
def test_a_study_that_is_killed_in_every_stage_ends_with_the_same_bytes(tmp_path):
    config, out = settings(tmp_path), tmp_path / "out"
    finish("study", config, "--out", out)
    expected = contents(out)
    out.rename(tmp_path / "whole")  # records name the folder that they were written in
    names = [stage.name for stage in stages_of(out, load_config(StudyOptions, config), 0)]
    command = [sys.executable, "-m", "sepsis_jax", "study", str(config), "--out", str(out)]
    for name in names:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        folder = out / "seed-0" / name
        begun = folder / RECORDS_FILE if name.startswith("asked") else folder
        while process.poll() is None and not begun.exists():
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish("study", config, "--out", out)
    found = contents(out)
    assert sorted(found) == sorted(expected)
    different = [name for name in expected if found[name] != expected[name]]
    assert not different
