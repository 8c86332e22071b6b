"""The command line: what each command gives, and how bad input ends."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from sepsis_jax.commands import world_model as world_model_commands
from tests.sepsis_jax.command_line import FAST, call, leftovers, refuse
from worldmodel.models.checkpoint import load_world_model, save_world_model
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model

COMMANDS = (
    ("demo",),
    ("audit",),
    ("simulate",),
    ("cohort", "synthetic"),
    ("cohort", "mimic-iv"),
    ("world-model", "train"),
    ("world-model", "evaluate"),
    ("world-model", "effects"),
    ("world-model", "values"),
    ("world-model", "export"),
)


@pytest.fixture
def run(capsys):
    return lambda *arguments: call(capsys, *arguments)


def small_simulation(model, cohort, out):
    return (
        "simulate", "--model", model, "--episodes", cohort, "--out", out, "--step", 1,
        "--horizon", 3, "--samples", 4,
    )  # fmt: skip


# What works


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(run, command):
    result = run(*command, "--help")
    assert result.status == 0
    flat = " ".join(result.out.split())
    assert f"Example: sepsis-jax {' '.join(command)}" in flat


def test_the_installed_program_answers():
    program = Path(sys.executable).with_name("sepsis-jax")
    if not program.exists():
        pytest.skip("sepsis-jax is not installed in this environment")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Not for clinical use" in " ".join(done.stdout.split())
    done = subprocess.run(
        [program, "world-model", "export", "--model", "no-such-folder", "--out", "x"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout


def test_a_synthetic_cohort_is_reproducible(run, cohort, tmp_path):
    result = run("cohort", "synthetic", "--patients", 60, "--out", tmp_path / "again", "--json")
    assert result.status == 0
    assert result.last_json["stays"] == 60
    again, first = (
        pd.read_parquet(folder / "episodes.parquet") for folder in (tmp_path / "again", cohort)
    )
    pd.testing.assert_frame_equal(again, first)
    manifest = json.loads((cohort / "manifest.json").read_text())
    assert manifest["options"] == {"patients": 60, "confounding": 0.0, "seed": 0}
    assert manifest["command"].startswith("sepsis-jax cohort synthetic")


def test_training_leaves_a_model_and_nothing_else(model, first_model):
    assert leftovers(first_model.parent) == ["model"]
    manifest = json.loads((model / "manifest.json").read_text())
    assert manifest["config"]["variant"] == "reference"
    assert manifest["training"]["state"]["epochs"] == 2
    metrics = json.loads((model / "metrics.json").read_text())
    assert len(metrics["history"]["state"]) == 2
    assert metrics["state"]["model"]["mae"] > 0


def test_evaluate_repeats_the_figures_of_training(run, model, cohort):
    result = run("world-model", "evaluate", "--model", model, "--episodes", cohort, "--json")
    assert result.status == 0
    metrics = json.loads((model / "metrics.json").read_text())
    assert result.last_json["split"] == "test"
    for name, value in metrics["state"]["model"].items():
        assert result.last_json["state"]["model"][name] == pytest.approx(value, rel=1e-5), name


def test_evaluate_takes_other_splits(run, model, cohort):
    arguments = ("world-model", "evaluate", "--model", model, "--episodes", cohort, "--json")
    result = run(*arguments, "--split", "validation")
    assert result.last_json["split"] == "validation"


def test_an_exported_folder_is_the_same_model(run, model, tmp_path):
    scaler = load_world_model(model).scaler
    published = init_world_model(jax.random.key(0), scaler, ModelConfig(variant="reference"))
    save_world_model(published, tmp_path / "ours")
    result = run("world-model", "export", "--model", tmp_path / "ours", "--out", tmp_path / "pt")
    assert result.status == 0
    assert leftovers(tmp_path / "pt") == [
        "episode_feature_config.json", "outcome.pt", "scaler_params_log.json",
        "state_model_log.pt",
    ]  # fmt: skip
    exported = load_world_model(tmp_path / "pt")
    jax.tree.map(np.testing.assert_array_equal, exported, published)


def test_a_hugging_face_folder_is_the_same_model_with_its_figures(run, model, cohort, tmp_path):
    hub = tmp_path / "hub"
    result = run("world-model", "export", "--model", model, "--out", hub, "--pretrained")
    assert result.status == 0
    assert leftovers(hub) == ["README.md", "config.json", "model.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, load_world_model(hub), load_world_model(model))
    figure = json.loads((model / "metrics.json").read_text())["state"]["model"]["mae"]
    card = (hub / "README.md").read_text()
    assert f"{figure:.4g}" in card and card == (model / "README.md").read_text()
    # Options that name a world model take it, this command's too.
    assert run(*small_simulation(hub, cohort, tmp_path / "out")).status == 0
    again = tmp_path / "again"
    run("world-model", "export", "--model", hub, "--out", again, "--pretrained")
    assert (again / "README.md").read_text() == card


def test_simulation_writes_what_it_says(run, model, cohort, tmp_path):
    out = tmp_path / "out"
    plans = ("--plan", "rest=0,0", "--plan", "[odd]=4,4;1,0")
    result = run(*small_simulation(model, cohort, out), *plans, "--json")
    assert result.status == 0
    assert result.out.count("\n") == 1  # the JSON alone
    assert leftovers(out) == ["fan_chart.png", "manifest.json", "outcomes.csv", "trajectories.csv"]
    assert [row["plan"] for row in result.last_json["plans"]] == ["rest", "[odd]"]
    table = pd.read_csv(out / "trajectories.csv")
    # 2 plans x (start + 3 steps) x (3 features + SOFA)
    assert len(table) == 2 * 4 * 4 and not table.isna().any().any()
    starts = table[table["hour"] == table["hour"].min()]
    assert (starts["q05"] == starts["q95"]).all()
    again = run(*small_simulation(model, cohort, out), *plans, "--json")
    assert again.last_json == result.last_json  # also: an older simulation is elsewhere
    assert "[odd]" in run(*small_simulation(model, cohort, out), *plans).out


def test_members_of_an_ensemble_share_the_futures_alike(run, model, cohort, tmp_path):
    scaler, config = load_world_model(model).scaler, ModelConfig(variant="reference", hidden=8)
    ensemble = init_world_model(jax.random.key(0), scaler, config, members=3)
    save_world_model(ensemble, tmp_path / "ensemble")
    result = run(*small_simulation(tmp_path / "ensemble", cohort, tmp_path / "out"))
    assert result.status == 0 and "6 futures per plan" in result.out  # of 4 that were asked for


def test_the_default_stay_suits_the_clinicians_plan(run, model, cohort, tmp_path):
    arguments = small_simulation(model, cohort, tmp_path / "out")
    result = run(*arguments, "--plan", "clinician", "--horizon", 6, "--json")
    assert result.status == 0, result.err


def test_interrupted_training_resumes_to_the_same_model(run, cohort, model, tmp_path, monkeypatch):
    """Ctrl-C after the first epoch, then the same command again."""
    arguments = ("world-model", "train", "--episodes", cohort, "--out", tmp_path / "model", *FAST)

    @contextmanager
    def interrupting(title):
        def update(*_):
            raise KeyboardInterrupt

        yield update

    with monkeypatch.context() as patch:
        patch.setattr(world_model_commands, "epochs", interrupting)
        result = run(*arguments)
    assert result.status == 130
    assert leftovers(tmp_path) == ["model.training"]
    assert run(*arguments).status == 0
    assert leftovers(tmp_path) == ["model"]
    for a, b in zip(
        jax.tree.leaves(load_world_model(tmp_path / "model")),
        jax.tree.leaves(load_world_model(model)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


# What does not


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--episodes", "none"), ("none: no such folder", "sepsis-jax cohort synthetic")),
        (("--config", "none.yaml"), ("none.yaml: no such file",)),
        (("--config", "bad.yaml"), ("bad.yaml: unknown setting 'epochs'; known: model,",)),
        (("--config", "broken.yaml"), ("broken.yaml: not readable YAML",)),
        (("--set", "epochs=3"), ("--set: unknown setting 'epochs'",)),
        (("--set", "state.epochs"), ("'state.epochs' is not NAME=VALUE",)),
        (("--set", "state.epochs=many"), ("state: epochs: got 'many', expected int",)),
        (("--set", "state.epochs=[1"), ("is not readable YAML",)),
        (("--set", "state.epochs=0"), ("epochs: got 0, expected at least 1",)),
        (("--set", "members=0"), ("members: got 0",)),
        (("--set", "model.variant=best"), ("variant: got 'best'",)),
        (("--set", "model.linear_rows=9"), ("linear_rows: got 9",)),
    ],
)
def test_bad_training_is_refused(run, cohort, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("epochs: 3\n")
    Path("broken.yaml").write_text("a: [\nb: {\n")
    before = leftovers(tmp_path)
    result = run("world-model", "train", "--episodes", cohort, "--out", "model", *FAST, *arguments)
    refuse(result, *words)
    assert leftovers(tmp_path) == before


def test_something_in_the_way_is_found_before_training(run, cohort, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").touch()
    monkeypatch.setattr(
        "sepsis_jax.pipelines.world_model.train_world_model",
        lambda *_, **__: pytest.fail("trained"),
    )
    result = run("world-model", "train", "--episodes", cohort, "--out", tmp_path / "home")
    refuse(result, "home: exists")
    assert leftovers(tmp_path) == ["home"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--split", "holdout"), ("--split: got 'holdout', expected one of train,",)),
        (("--model", "none"), ("none: no such folder; train one with",)),
        (("--episodes", "none"), ("none: no such folder; make one with",)),
        (("--model", "."), ("manifest.json: no such file",)),
    ],
)
def test_bad_evaluation_is_refused(run, model, cohort, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = run("world-model", "evaluate", "--model", model, "--episodes", cohort, *arguments)
    refuse(result, *words)


def test_a_cohort_is_no_model_and_a_model_no_cohort(run, model, cohort, tmp_path):
    out = tmp_path / "out"
    refuse(run(*small_simulation(cohort, cohort, out)), "cohort: not a world model")
    refuse(run(*small_simulation(model, model, out)), "episodes.parquet: missing")
    assert leftovers(tmp_path) == []


def test_truncated_episodes_are_refused(run, model, cohort, tmp_path):
    copy = tmp_path / "cohort"
    copy.mkdir()
    for file in cohort.iterdir():
        raw = file.read_bytes()
        (copy / file.name).write_bytes(raw[:-50] if file.suffix == ".parquet" else raw)
    result = run("world-model", "train", "--episodes", copy, "--out", tmp_path / "model", *FAST)
    refuse(result, "episodes.parquet: not a readable Parquet file")
    assert leftovers(tmp_path) == ["cohort"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--plan", "x=5,0"), ("level 5 is outside 0 to 4",)),
        (("--plan", "x=1"), ("'1' is not V,F", "such as 2,1")),
        (("--plan", "x=1,1", "--plan", "x=2,2"), ("names must be given and differ",)),
        (("--plan", "=1,1"), ("has no name",)),
        (("--plan", "clinician", "--horizon", "90"), ("clinician",)),
        (("--stay", "999999999"), ("stay 999999999 is not among the 60 episodes",)),
        (("--step", "5000"), ("no stay reaches step 5000",)),
        (("--mode", "quirky"), ("mode: got 'quirky'",)),
    ],
)
def test_bad_simulations_are_refused(run, model, cohort, tmp_path, arguments, words):
    refuse(run(*small_simulation(model, cohort, tmp_path / "out"), *arguments), *words)
    assert leftovers(tmp_path) == []


def test_a_simulation_deletes_no_strangers_folder(run, model, cohort, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")  # such as a folder of runs
    (tmp_path / "thesis.txt").touch()
    refuse(run(*small_simulation(model, cohort, tmp_path)), "exists")
    refuse(run(*small_simulation(model, cohort, tmp_path / "thesis.txt")), "is a file")
    assert leftovers(tmp_path) == ["manifest.json", "thesis.txt"]


def test_a_place_that_cannot_be_written_is_named(run, model, cohort, tmp_path):
    (tmp_path / "thesis.txt").touch()
    result = run(*small_simulation(model, cohort, tmp_path / "thesis.txt" / "out"))
    refuse(result, "thesis.txt")


def test_steps_of_another_length_are_refused(run, model, cohort, tmp_path):
    copy = shutil.copytree(cohort, tmp_path / "cohort")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "step_hours": 1.0}))
    refuse(run("world-model", "evaluate", "--model", model, "--episodes", copy), "steps of 1 h")
    refuse(run(*small_simulation(model, copy, tmp_path / "out")), "trained on 4 h")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("synthetic", "--patients", "3"), ("patients: got 3, expected at least 10",)),
        (("synthetic", "--confounding", "-1"), ("confounding: got -1",)),
        (("mimic-iv", "--data", "none"), ("none",)),
        (("mimic-iv", "--data", "none", "-o", "step_hours=3"), ("step_hours",)),
        (("mimic-iv", "--data", "none", "-o", "colour=red"), ("unknown setting 'colour'",)),
    ],
)
def test_bad_cohorts_are_refused(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    refuse(run("cohort", *arguments, "--out", "cohort"), *words)
    assert leftovers(tmp_path) == []


def test_export_of_another_shape_is_refused(run, model, tmp_path):
    result = run("world-model", "export", "--model", model, "--out", tmp_path / "pt")
    refuse(result, "only the reference variant in its published shape")
    assert leftovers(tmp_path) == []


def test_usage_errors_end_with_status_2(run):
    result = run("world-model", "train")
    assert result.status == 2 and "Missing option" in result.err
    assert run("world-model", "polish").status == 2


def test_the_default_model_answers_beside_the_truth(run, cohort, tmp_path):
    """The recurrent variant through training, simulation and the comparison with the truth."""
    model = tmp_path / "model"
    small = ("--set", "model.hidden=8", "--set", "model.head=8", "--set", "stays.epochs=2")
    trained = run("world-model", "train", "--episodes", cohort, "--out", model, *small)
    assert trained.status == 0
    manifest = json.loads((model / "manifest.json").read_text())
    assert (manifest["config"]["variant"], manifest["stay_steps"]) == ("recurrent", 20)
    shown = run(*small_simulation(model, cohort, tmp_path / "out"), "--json")
    assert all(0 < row["support"] < 1 for row in shown.last_json["plans"])
    asked = ("--patients", 40, "--samples", 1, "--held", 2, "--seed", 3)
    result = run(
        "world-model", "effects", "--model", model, "--out", tmp_path / "e", *asked, "--json"
    )
    assert result.status == 0
    assert leftovers(tmp_path / "e") == [
        "futures.csv", "futures.png", "manifest.json", "metrics.json",
    ]  # fmt: skip
    table = pd.read_csv(tmp_path / "e" / "futures.csv")
    assert len(table) == 25 and table["mortality_true"].between(0, 1).all()
    assert -1 <= result.last_json["mortality"]["spearman"] <= 1
    assert result.last_json["patients"] <= 40
    again = run(
        "world-model", "effects", "--model", model, "--out", tmp_path / "f", *asked, "--json"
    )
    assert again.last_json == result.last_json
