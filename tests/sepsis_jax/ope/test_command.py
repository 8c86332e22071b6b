"""`sepsis-jax ope` from files to files, and what it refuses."""

import json
import sys

import jax
import numpy as np
import pandas as pd
import pytest

from policy.checkpoint import save_policy
from policy.simple import Constant
from sepsis_jax.cli import main
from sepsis_jax.ope.policies import read_probabilities, soften, write_probabilities
from sepsis_jax.ope.simulated import simulated_value
from sepsis_jax.report.ope import latex
from tests.toy import toy_episodes
from worldmodel.episode_files import save_episodes
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import save_world_model
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler


@pytest.fixture(scope="module")
def episodes():
    return toy_episodes(num_stays=120)


@pytest.fixture(scope="module")
def folder(episodes, tmp_path_factory):
    return save_episodes(episodes, tmp_path_factory.mktemp("ope") / "episodes")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sepsis-jax", "ope", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_of_probabilities_come_back(episodes, tmp_path, suffix):
    probs = np.random.default_rng(0).dirichlet(np.ones(25), (120, 9)).astype(np.float32)
    write_probabilities(tmp_path / f"p{suffix}", episodes, probs)
    valid = np.asarray(episodes.valid)
    shuffled = tmp_path / f"shuffled{suffix}"
    table = (pd.read_csv if suffix == ".csv" else pd.read_parquet)(tmp_path / f"p{suffix}")
    table = table.sample(frac=1, random_state=0)
    table.to_csv(shuffled, index=False) if suffix == ".csv" else table.to_parquet(shuffled)
    found = read_probabilities(shuffled, episodes)
    assert np.allclose(found[valid], probs[valid], atol=1e-6)


def test_incomplete_tables_are_refused(episodes, tmp_path):
    probs = np.full((120, 9, 25), 0.04, np.float32)
    write_probabilities(tmp_path / "p.csv", episodes, probs)
    table = pd.read_csv(tmp_path / "p.csv")
    cases = (
        (table.iloc[1:], "has no row"),
        (pd.concat([table, table.iloc[:1]]), "comes twice"),
        (table.drop(columns="action_3"), "columns missing: action_3"),
        (table.assign(action_0="x"), "not numbers"),
    )
    for flawed, words in cases:
        flawed.to_csv(tmp_path / "bad.csv", index=False)
        with pytest.raises(InputError, match=words):
            read_probabilities(tmp_path / "bad.csv", episodes)


def test_softening_rules():
    greedy = np.eye(25)[None, :1]
    behavior = np.full((1, 1, 25), 0.04)
    assert np.allclose(soften(greedy, "uniform", 0.25)[0, 0, :2], [0.76, 0.01])
    assert np.allclose(soften(greedy, "clinician", 0.5, behavior)[0, 0, :2], [0.52, 0.02])
    with pytest.raises(InputError, match="needs the clinician"):
        soften(greedy, "clinician", 0.5)


def test_command_writes_every_table(folder, episodes, tmp_path, monkeypatch, capsys):
    write_probabilities(tmp_path / "p.parquet", episodes, np.full((120, 9, 25), 0.04))
    out = tmp_path / "out"
    code = run(
        monkeypatch, "--episodes", folder, "--policy", "random",
        "--policy", f"mine={tmp_path / 'p.parquet'}", "--out", out, "--json",
        "--set", "split=all", "--set", "n_bootstrap=50",
    )  # fmt: skip
    assert code == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    table = pd.read_csv(out / "estimates.csv")
    assert len(last["rows"]) == len(table) and set(table["policy"]) == {"random", "mine"}
    # The toy clinician is uniform, so both policies are the clinician.
    wis = table[table["estimator"] == "wis"].set_index("policy")
    assert wis["difference"].abs().max() < 1e-4
    names = ("estimates.json", "estimates.tex", "forest.png", "confounding.csv", "subgroups.csv",
             "ess_by_step.csv", "audit.csv", "report.html", "manifest.json")  # fmt: skip
    assert all((out / name).exists() for name in names)
    assert json.loads((out / "manifest.json").read_text())["stays"] == 120


def test_a_table_of_the_clinician_needs_the_evaluated_stays_alone(
    folder, episodes, tmp_path, monkeypatch
):
    test = episodes.of_split("test")
    write_probabilities(tmp_path / "b.csv", test, np.full((*test.valid.shape, 25), 0.04))
    asked = ("--episodes", folder, "--behavior", tmp_path / "b.csv", "--policy", "clinician",
             "--set", "n_bootstrap=0", "--set", "values=none", "--set", "interval=delta",
             "--set", "subgroups=false")  # fmt: skip
    assert run(monkeypatch, *asked, "--out", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "subgroups.csv").exists()
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["stays"]
    assert 0 < found == test.num_stays < 120
    assert run(monkeypatch, *asked, "--set", "split=all", "--out", tmp_path / "all") == 2


def test_policy_folders_are_evaluated_and_played_in_a_world_model(
    folder, episodes, tmp_path, monkeypatch
):
    save_policy(Constant(7), tmp_path / "seven")
    write_probabilities(tmp_path / "p.csv", episodes, np.full((120, 9, 25), 0.04))
    config = ModelConfig(variant="reference", hidden=8, layers=1, embed=4, head=4)
    world_model = init_world_model(jax.random.key(0), Scaler.fit(episodes), config)
    save_world_model(world_model, tmp_path / "model")
    out = tmp_path / "out"
    code = run(
        monkeypatch, "--episodes", folder, "--policy", f"seven={tmp_path / 'seven'}",
        "--policy", "none", "--policy", f"table={tmp_path / 'p.csv'}",
        "--model", tmp_path / "model", "--out", out, "--set", "split=all",
        "--set", "n_bootstrap=0", "--set", "values=none", "--set", "soften=uniform",
        "--set", "soften_share=0.5", "--set", "horizon=2", "--set", "samples=2",
        "--set", "interval=delta",
    )  # fmt: skip
    assert code == 0
    table = pd.read_csv(out / "estimates.csv")
    rows = table[table["estimator"] == "world_model"].set_index("policy")
    assert list(rows.index) == ["seven", "none", "table"] and not rows["trust"].any()
    expected = simulated_value(
        world_model, jax.random.key(0), episodes, Constant(7), horizon=2, samples=2
    )
    assert rows.loc["seven", "estimate"] == pytest.approx(expected.value, abs=1e-4)
    assert rows.loc["seven", "se"] == pytest.approx(expected.se, rel=1e-3)
    assert rows.loc["seven", "spread"] == 0
    assert np.isnan(rows.loc["table", "estimate"]) and "cannot be played" in rows["reason"]["table"]
    # Softening is of the probabilities that the records are weighed with.
    taken = np.asarray(episodes.action)[np.asarray(episodes.valid)]
    weights = table[table["estimator"] == "is"].set_index("policy")
    assert 0 < weights.loc["seven", "ess"] < 120 and (taken == 7).any()


def test_latex_of_a_table():
    row = {"estimate": 1.234, "low": 1.0, "high": 2.0, "trust": True}
    table = pd.DataFrame(
        [
            {"policy": "a_1", "estimator": "wis", **row},
            {"policy": "b%", "estimator": "wis", **row, "trust": False},
            {"policy": "a_1", "estimator": "dm", **row, "low": np.nan},
            {"policy": "b%", "estimator": "dm", **row, "estimate": np.nan, "low": np.nan},
        ]
    )
    lines = latex(table).splitlines()
    assert lines[1] == r"\begin{tabular}{lrr}" and lines[-1] == r"\end{tabular}"
    assert lines[3] == r"estimator & a\_1 & b\% \\"
    assert lines[5] == r"wis & 1.23 & 1.23$^\dagger$ \\"
    assert lines[7:9] == [r"dm & 1.23 & -- \\", r" &  &  \\"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--policy", "random"), "give --episodes"),
        (("--episodes", "{folder}", "--out", "x"), "policy: none given"),
        (("--episodes", "{folder}", "--out", "x", "--policy", "nope"), "not built in"),
        (("--episodes", "{folder}", "--out", "x", "--policy", "clinician"), "needs the clinician"),
        (("--episodes", "{folder}", "--out", "x", "--policy", "a=none.csv"), "no such file"),
        (("--episodes", "{folder}", "--out", "x", "--policy", "a={folder}"), "policy.json"),
        (("--episodes", "{folder}", "--out", "x", "--policy", "none", "--model", "m"),
         "m: no such folder"),
        (("--episodes", "nowhere", "--out", "x", "--policy", "random"), "no such folder"),
        (("--episodes", "{folder}", "--out", "x", "--policy", "random", "--set", "split=x"),
         "split: got"),
        (("--episodes", "{folder}", "--out", "x", "--policy", "random", "--set", "values=x"),
         "method: got"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_line_and_status_2(
    folder, monkeypatch, capsys, tmp_path, arguments, words
):
    monkeypatch.chdir(tmp_path)
    code = run(monkeypatch, *(a.replace("{folder}", str(folder)) for a in arguments))
    assert code == 2
    assert words in " ".join(capsys.readouterr().err.split())
