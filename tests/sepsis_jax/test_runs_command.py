"""`sepsis-jax runs`: folders of runs listed, and two compared; `init`, `tiny-llm`, completion."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import typer.main
import yaml

from sepsis_jax import cli, console
from tests.sepsis_jax.command_line import call, refuse


@pytest.fixture
def run(capsys):
    return lambda *arguments: call(capsys, *arguments)


def make_run(folder, settings, metrics, csv=None, command="sepsis-jax world-model train --out x"):
    folder.mkdir(parents=True)
    manifest = {"command": command, "revision": "0123456789abcdef+", "versions": {"jax": "0.10.2"}}
    (folder / "manifest.json").write_text(json.dumps(manifest | settings))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    if csv:
        (folder / "table.csv").write_text(csv)
    return folder


def test_runs_are_found_at_any_depth(run, tmp_path):
    make_run(tmp_path / "a", {}, {})
    make_run(tmp_path / "b" / "c", {}, {}, command="sepsis-jax demo")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "manifest.json").write_text("not JSON")
    found = run("runs", "list", tmp_path, "--json").last_json["runs"]
    assert [row["run"] for row in found] == [str(tmp_path / "a"), str(tmp_path / "b" / "c")]
    assert found[0]["revision"] == "01234567+" and found[0]["jax"] == "0.10.2"
    assert "world-model train" in run("runs", "list", tmp_path).out


def test_runs_list_refuses_what_is_not_there(run, tmp_path):
    refuse(run("runs", "list", tmp_path / "none"), "no such folder")


def test_two_runs_differ_in_what_differs(run, tmp_path):
    table = "policy,value,low\nguideline,{},1\nnone,2,\n"
    first = make_run(
        tmp_path / "a", {"training": {"seed": 0, "rate": 0.1}, "gone": True},
        {"loss": 1.5, "auc": {"model": 0.8}, "note": "x"}, table.format(3),
    )  # fmt: skip
    second = make_run(
        tmp_path / "b", {"training": {"seed": 1, "rate": 0.1}},
        {"loss": 1.25, "auc": {"model": 0.8}}, table.format(5),
    )  # fmt: skip
    found = run("runs", "diff", first, second, "--json").last_json
    assert found["settings"] == [
        {"name": "training.seed", "first": 0, "second": 1},
        {"name": "gone", "first": True, "second": None},
    ]
    assert found["figures"] == [
        {"name": "metrics.loss", "first": 1.5, "second": 1.25, "difference": -0.25},
        {"name": "table: guideline, value", "first": 3.0, "second": 5.0, "difference": 2.0},
    ]


def test_equal_runs_have_no_difference(run, tmp_path):
    runs = [make_run(tmp_path / name, {"seed": 0}, {"loss": 1.0}) for name in "ab"]
    result = run("runs", "diff", *runs)
    assert "Settings: no difference" in result.out and "Figures: no difference" in result.out


def test_runs_diff_refuses_a_folder_without_a_run(run, tmp_path):
    refuse(run("runs", "diff", make_run(tmp_path / "a", {}, {}), tmp_path), "holds no run")


def test_init_writes_the_shipped_configurations(run, tmp_path):
    files = run("init", tmp_path / "mine", "--json").last_json["files"]
    assert "configs/demo.yaml" in files and "configs/templates_brief/chart.md.j2" in files
    settings = yaml.safe_load((tmp_path / "mine" / "configs" / "demo.yaml").read_text())
    assert settings["cohort"] == {"patients": 4000}
    refuse(run("init", tmp_path / "mine"), "configs: exists")


def test_tiny_llm_refuses_to_replace_other_things(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refuse(run("tiny-llm", "--out", tmp_path), str(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    refuse(run("tiny-llm", "--whole-stays", "--out", tmp_path / "llm"), "add --teach")


def test_the_shell_is_told_what_may_follow():
    asked = os.environ | {
        "_SEPSIS_JAX_COMPLETE": "complete_bash", "COMP_WORDS": "sepsis-jax world-model ",
        "COMP_CWORD": "2",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "sepsis_jax"], env=asked, capture_output=True, text=True, timeout=60
    )
    assert {"train", "evaluate", "effects"} <= set(done.stdout.split())


def commands(command, path=()):
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


FROM_DEMO = {"--episodes": "runs/demo/cohort", "--model": "runs/demo/model"}
WITHOUT = {"world-model export", "policy serve"}  # take what the demo does not make


@pytest.mark.parametrize(
    ("path", "command"),
    [pytest.param(*found, id=" ".join(found[0])) for found in commands(
        typer.main.get_command(cli.app))],
)  # fmt: skip
def test_examples_read_what_the_demo_makes(path, command):
    example = (command.epilog or "").removeprefix("Example: ").split()
    assert example[: len(path) + 1] == ["sepsis-jax", *path] or path == ("study", "run")
    if " ".join(path) not in WITHOUT:
        for option, value in itertools.pairwise(example):
            assert value == FROM_DEMO.get(option, value)


def test_progress_is_told_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.phases("sweep") as update:
        for share in (0.1, 0.25, 0.3, 0.5):
            update("simulating", share)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "sweep: simulating: 25%, 1 min, 2 min left", "sweep: simulating: 50%, 1 min, 1 min left"
    ]  # fmt: skip
