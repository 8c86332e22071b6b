"""`sepsis-jax policy` from files to files, and what it refuses."""

import json

import jax
import numpy as np
import pandas as pd
import pytest

from policy import registry
from policy.checkpoint import load_policy
from policy.simple import GuidelineRules
from sepsis_jax.pipelines import policy_comparison, policy_training
from sepsis_jax.pipelines.policy_values import (
    RATES,
    ModelWorld,
    Outcome,
    TrueWorld,
    prescribed_rates,
    simulated_rates,
    taken,
    value_table,
)
from sepsis_jax.report import policies as report_policies
from tests.sepsis_jax.command_line import call, finish, leftovers, refuse
from worldmodel import schema
from worldmodel.episode_files import load_episodes
from worldmodel.models.checkpoint import load_world_model
from worldmodel.synthetic import true_value

# These tests ask whether it runs, not whether it is good.
TINY = "{updates: 20, batch_size: 32, seeds: 1, hidden: [8]}"
CLONE = "{updates: 20, epochs: 1, hidden: 8}"
FAST = (
    "--set", "methods=[iql, cql]", "--set", f"iql={TINY}", "--set", f"cql={TINY}",
    "--set", f"clone.fit={CLONE}",
    "--set", "ppo.ppo={hidden: [8], iterations: 1, patients: 16, minibatches: 1, batch_size: 16}",
    "--set", "patients=20",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_brackets():
    """Every policy in the true world is compiled once more, so few are used."""
    patch = pytest.MonkeyPatch()
    patch.setattr(policy_comparison, "SIMPLE", {"guideline": GuidelineRules})
    yield
    patch.undo()


@pytest.fixture
def run(capsys):
    return lambda *arguments: call(capsys, "policy", *arguments)


@pytest.fixture(scope="module")
def iql(cohort):
    out = cohort.with_name("iql")
    settings = ("updates=20", "batch_size=32", "seeds=2", "hidden=[8]")
    options = [part for setting in settings for part in ("--set", setting)]
    finish("policy", "train", "--method", "iql", "--episodes", cohort, "--out", out, *options)
    return out


@pytest.fixture(scope="module")
def clone(cohort):
    out = cohort.with_name("clone")
    finish("policy", "train", "--method", "clinician", "--episodes", cohort, "--out", out,
           "--set", f"fit={CLONE}")  # fmt: skip
    return out


@pytest.fixture(scope="module")
def compared(cohort, model):
    out = cohort.with_name("compared")
    finish("policy", "compare", "--episodes", cohort, "--model", model, "--out", out, *FAST)
    return out


@pytest.mark.parametrize("command", ["train", "describe", "compare", "export"])
def test_help_shows_an_example(run, command):
    result = run(command, "--help")
    assert result.status == 0
    assert f"Example: sepsis-jax policy {command}" in " ".join(result.out.split())


def test_a_trained_policy_comes_with_its_record_and_pictures(iql, cohort):
    assert leftovers(iql) == [
        "README.md", "actions.png", "arrays", "losses.csv", "losses.png", "policy.json",
    ]  # fmt: skip
    record = json.loads((iql / "policy.json").read_text())
    assert record["method"] == "iql" and record["config"]["hidden"] == [8]
    assert record["source"] == "synthetic" and "synthetic" in (iql / "README.md").read_text()
    assert record["command"].startswith("sepsis-jax policy train")
    assert len(record["inputs"]["episodes"]) == 64
    losses = pd.read_csv(iql / "losses.csv")
    assert list(losses) == ["update", "seed 0", "seed 1"] and losses["update"].iloc[-1] == 20
    policy = load_policy(iql)
    assert policy.num_seeds == 2
    probs = policy.action_probs(load_episodes(cohort))
    assert np.allclose(probs.sum(-1), 1.0)


def test_training_is_reproducible(run, iql, cohort, tmp_path):
    settings = ("updates=20", "batch_size=32", "seeds=2", "hidden=[8]")
    options = [part for setting in settings for part in ("--set", setting)]
    result = run("train", "--method", "iql", "--episodes", cohort, "--out", tmp_path / "again",
                 *options, "--json")  # fmt: skip
    assert result.status == 0, result.err
    assert (
        result.last_json["fingerprint"]
        == json.loads((iql / "policy.json").read_text())["fingerprint"]
    )
    jax.tree.map(np.testing.assert_array_equal, load_policy(tmp_path / "again"), load_policy(iql))


def test_a_clone_comes_with_its_calibration(clone):
    assert {"reliability.csv", "reliability.png"} <= set(leftovers(clone))
    assert json.loads((clone / "policy.json").read_text())["report"]["nll"] > 0


def test_a_planner_takes_what_it_is_given(run, cohort, model, iql, clone, tmp_path, monkeypatch):
    monkeypatch.setattr(policy_training, "train_offline_policy", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(policy_training, "fit_clone", lambda *_: pytest.fail("fitted"))
    words = ("train", "--method", "planner", "--episodes", cohort, "--model", model,
             "--critic", iql, "--clinician", clone, "--out", tmp_path / "planner")  # fmt: skip
    assert "search=rollout of the planner uses none" in run(*words).err
    one_step = ("--set", "search.search=one-step", "--set", "search.horizon=1")
    result = run(*words, *one_step)
    assert result.status == 0, result.err
    assert load_policy(tmp_path / "planner").past == 12


@pytest.mark.slow
def test_ppo_plays_in_the_world_model(run, cohort, model, tmp_path):
    tiny = "ppo={hidden: [8], iterations: 2, patients: 8, steps: 3, minibatches: 1, batch_size: 8}"
    result = run("train", "--method", "ppo", "--episodes", cohort, "--model", model,
                 "--out", tmp_path / "ppo", "--set", tiny)  # fmt: skip
    assert result.status == 0, result.err
    assert len(pd.read_csv(tmp_path / "ppo" / "losses.csv")) == 2


def test_description_tells_policies_from_the_clinician(run, cohort, iql, clone, tmp_path):
    out = tmp_path / "out"
    result = run("describe", "--policy", f"mine={iql}", "--policy", "guideline", "--policy", "none",
                 "--policy", clone, "--episodes", cohort, "--split", "all", "--clinician", clone,
                 "--out", out, "--json")  # fmt: skip
    assert result.status == 0, result.err
    assert leftovers(out) == [
        "actions.png", "description.csv", "difference.png", "manifest.json", "report.html",
    ]  # fmt: skip
    table = pd.DataFrame(result.last_json["rows"]).set_index("policy")
    assert list(table.index) == ["clinician", "mine", "guideline", "none", "clone"]
    assert table.loc["clinician", "top1"] == 100
    assert table.loc["clone", "kl"] == pytest.approx(0, abs=1e-6)
    assert table.loc["guideline", "adherence"] == 100
    assert table.loc["none", "vasopressor None"] == 100 and table.loc["none", "entropy"] == 0
    levels = [name for name in table if name.startswith("fluid ")]
    assert np.allclose(table[levels].sum(axis=1), 100)


def test_every_policy_has_a_kind_and_every_kind_a_colour():
    compared = {*registry.names(), *registry.TRAINED, policy_comparison.CLONE}
    assert compared == set(policy_comparison.KINDS)
    assert set(policy_comparison.KINDS.values()) <= set(report_policies.KIND_COLORS)


def test_comparison_writes_everything_and_reports_pairs(compared):
    assert leftovers(compared) == [
        "actions.png", "comparison.csv", "comparison.json", "comparison.md", "comparison.png",
        "difference.png", "manifest.json", "policies", "report.html",
    ]  # fmt: skip
    assert leftovers(compared / "policies") == ["clone", "cql", "iql"]
    table = pd.read_csv(compared / "comparison.csv").set_index("policy")
    assert list(table.index) == ["clinician", "guideline", "clone", "iql", "cql"]
    difference = table["value"] - table.loc["clinician", "value"]
    rest = table.index != "clinician"
    assert np.allclose(table["less_clinician"][rest], difference[rest], atol=1e-6)
    assert table.loc["guideline", "adherence"] == 100
    rates = table[["underdosing", "overdosing"]].sum(axis=1)
    assert np.allclose(rates, table["unsafe"])
    assert (compared / "comparison.md").read_text().count("\n| ") == 7


def test_comparison_goes_on_from_policies_that_fit(run, compared, cohort, model, monkeypatch):
    trained = []
    for name in ("train_offline_policy", "fit_clone", "make_planner", "optimise"):
        original = getattr(policy_comparison, name)
        monkeypatch.setattr(
            policy_comparison, name,
            lambda *args, name=name, original=original: trained.append(name) or original(*args),
        )  # fmt: skip
    before = pd.read_csv(compared / "comparison.csv")
    arguments = ("compare", "--episodes", cohort, "--model", model, "--out", compared, *FAST)
    assert run(*arguments).status == 0
    assert trained == []
    pd.testing.assert_frame_equal(pd.read_csv(compared / "comparison.csv"), before)
    # Other settings of one method: it alone is trained again.
    assert run(*arguments, "--set", "cql.cql_alpha=2").status == 0
    assert trained == ["train_offline_policy"]


@pytest.mark.slow
def test_comparison_with_the_planner_and_the_best_policy_known(run, cohort, model, tmp_path):
    out = tmp_path / "all"
    result = run("compare", "--episodes", cohort, "--model", model, "--out", out, *FAST, "--set",
                 "methods=[iql, planner, ppo]", "--json")  # fmt: skip
    assert result.status == 0, result.err
    assert leftovers(out / "policies") == ["clone", "iql", "planner", "ppo"]
    assert result.last_json["best"] == "ppo" and result.last_json["best_offline"] == "iql"


def test_comparison_without_the_truth_asks_the_world_model(run, compared, cohort, model):
    result = run("compare", "--episodes", cohort, "--model", model, "--out", compared, "--no-truth",
                 *FAST, "--set", "horizon=2", "--set", "methods=[iql]", "--json")  # fmt: skip
    assert result.status == 0, result.err
    table = pd.DataFrame(result.last_json["rows"]).set_index("policy")
    assert "ppo" not in table.index and result.last_json["baseline"] == "clone"
    assert table["less_clinician"].drop("clone").notna().all()
    episodes = load_episodes(cohort).of_split("test")
    assert table.loc["clinician", "adherence"] == pytest.approx(
        simulated_rates(episodes, schema.STEP_HOURS)["adherence"]
    )


@pytest.mark.slow
def test_true_outcomes_are_those_of_true_value():
    found = TrueWorld(40, 3, 0.0).outcome(GuidelineRules())
    truth = true_value(jax.random.key(3), GuidelineRules(), 40)
    assert np.allclose(found.total, truth.total, atol=1e-4)
    assert found.died.mean() == pytest.approx(truth.mortality)


def test_paired_differences_and_the_gap():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=500)
    rates = dict.fromkeys(RATES, 0.0)
    outcomes = {
        name: Outcome(noise + shift, noise > 0, 9.0, rates, np.zeros((5, 5)))
        for name, shift in (("clinician", 0.0), ("iql", 1.0), ("planner", 1.5), ("ppo", 2.0))
    }
    kinds = {"clinician": "clinician", "iql": "offline", "planner": "planner", "ppo": "truth"}
    table = value_table(outcomes, kinds, baseline="clinician", best="ppo").set_index("policy")
    # The same noise for every policy: differences are known exactly, values are not.
    assert table.loc["planner", "less_clinician_high"] == pytest.approx(1.5)
    assert table.loc["planner", "less_best_offline"] == pytest.approx(0.5)
    assert table.loc["planner", "gap_closed"] == pytest.approx(75)
    half = table["high"] - table["value"]
    assert np.allclose(half, 1.96 * noise.std(ddof=1) / np.sqrt(500))
    worse = value_table(outcomes, kinds, baseline="ppo", best="clinician")
    assert worse["gap_closed"].isna().all()


def test_prescribed_actions_of_the_clinician_break_the_rules_that_they_broke(cohort):
    episodes = load_episodes(cohort)
    given = prescribed_rates(
        jax.random.key(0), episodes, taken(episodes), step_hours=schema.STEP_HOURS,
        dose_edges=schema.DEFAULT_DOSE_EDGES,
    )  # fmt: skip
    recorded = simulated_rates(episodes, schema.STEP_HOURS)
    for name in ("adherence", "g1", "g2", "dose_jump", "abrupt_stop", "fluid_overload"):
        assert given[name] == pytest.approx(recorded[name]), name


def test_blocks_change_no_value_in_a_world_model(cohort, model, monkeypatch):
    episodes = load_episodes(cohort).of_split("test")
    world = ModelWorld(load_world_model(model), episodes, 2, 2, 0, schema.DEFAULT_DOSE_EDGES)
    whole = world.outcome(GuidelineRules()).total
    name = "sepsis_jax.pipelines.policy_values.patients_per_call"
    monkeypatch.setattr(name, lambda policy: 3)
    assert np.allclose(world.outcome(GuidelineRules()).total, whole, atol=1e-4)


def test_export_writes_transitions(run, cohort, tmp_path):
    out = tmp_path / "data.npz"
    result = run("export", "--episodes", cohort, "--out", out, "--past", 0, "--json")
    assert result.status == 0, result.err
    train = load_episodes(cohort).of_split("train")
    assert result.last_json["transitions"] == int(train.length.sum())
    with np.load(out) as arrays:
        assert len(arrays["actions"]) == int(train.length.sum())


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "sarsa"), ("method: got 'sarsa'", "iql")),
        (("--method", "planner"), ("model: planner needs a world model",)),
        (("--method", "iql", "--model", "m"), ("model: only for method planner and ppo",)),
        (("--method", "iql", "--set", "updates=0"), ("updates: got 0",)),
        (("--method", "iql", "--set", "nope=0"), ("unknown setting 'nope'",)),
        (("--method", "clinician", "--set", "model=best"), ("behaviour model",)),
        (("--method", "ppo", "--model", "{model}", "--critic", "{clone}"),
         ("critic: expected a policy trained by", "iql")),
        (("--method", "iql", "--episodes", "none"), ("none: no such folder",)),
    ],
)  # fmt: skip
def test_bad_training_is_refused(run, cohort, model, clone, tmp_path, arguments, words):
    places = {"{model}": model, "{clone}": clone}
    result = run("train", "--episodes", cohort, "--out", tmp_path / "out",
                 *(places.get(word, word) for word in arguments))  # fmt: skip
    refuse(result, *words)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("policy: none given",)),
        (("--policy", "nothing"), ("'nothing': neither clinician, random",)),
        (("--policy", "{cohort}"), ("policy.json: no such file",)),
        (("--policy", "none", "--policy", "none"), ("none is already there",)),
        (("--policy", "none", "--split", "x"), ("split: got 'x'",)),
    ],
)
def test_bad_descriptions_are_refused(run, cohort, tmp_path, arguments, words):
    given = (str(cohort) if word == "{cohort}" else word for word in arguments)
    refuse(run("describe", "--episodes", cohort, "--out", tmp_path / "out", *given), *words)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "methods=[ppo]"), ("methods: ppo needs iql",)),
        (
            ("--set", "methods=[planner]", "--set", "planner={search: one-step, horizon: 1}"),
            ("methods: planner needs iql",),
        ),
        (("--set", "methods=[best]"), ("methods: got ['best']",)),
        (("--set", "methods=iql"), ("expected a list",)),
        (("--set", "seed=0"), ("seed: 0 made the episodes too",)),
        (("--set", "patients=1"), ("patients: got 1",)),
        (("--model", "none"), ("none: no such folder",)),
    ],
)
def test_bad_comparisons_are_refused(run, cohort, model, tmp_path, arguments, words):
    result = run("compare", "--episodes", cohort, "--model", model, "--out", tmp_path / "out",
                 *FAST, *arguments)  # fmt: skip
    refuse(result, *words)
    assert leftovers(tmp_path) == []


def test_an_unknown_format_and_a_stranger_in_the_way_are_refused(run, cohort, model, tmp_path):
    result = run("export", "--episodes", cohort, "--out", tmp_path / "x", "--format", "csv")
    refuse(result, "format: got 'csv', expected one of d3rlpy, minari")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").touch()
    for command in (("train", "--method", "iql"), ("describe", "--policy", "none"),
                    ("compare", "--model", model)):  # fmt: skip
        result = run(*command, "--episodes", cohort, "--out", tmp_path / "home")
        refuse(result, "home: exists")
    assert leftovers(tmp_path) == ["home"]


def test_every_method_has_settings():
    assert set(policy_training.OPTIONS) == set(registry.TRAINED)
