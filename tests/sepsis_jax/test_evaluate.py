"""`sepsis-jax evaluate`: an agent in recorded states, rates, and the tables of the paper."""

import json

import jax
import numpy as np
import pandas as pd
import pytest

from policy.registry import make
from sepsis_jax.ope.agent_runs import at_temperature, read_run
from sepsis_jax.pipelines import ope
from sepsis_jax.pipelines.evaluation import policy_table
from sepsis_jax.pipelines.ope import open_policies
from sepsis_jax.pipelines.policy_rates import (
    prescribed_rates,
    rule_counts,
    simulated_rates,
)
from sepsis_jax.report.evaluation import cells, named_table
from sepsis_jax.report.published import POLICIES, STAGES
from sepsis_jax.report.tables import latex
from tests.sepsis_jax.command_line import call, finish, refuse
from worldmodel import schema
from worldmodel.clinical.rules import g1_untreated_hypoperfusion
from worldmodel.episode_files import load_episodes
from worldmodel.errors import InputError

EDGES = {"step_hours": schema.STEP_HOURS, "dose_edges": schema.DEFAULT_DOSE_EDGES}


def test_temperature_works_level_by_level_as_the_sampler_draws():
    rng = np.random.default_rng(0)
    vasopressor, fluid = rng.normal(size=5), rng.normal(size=(5, 5))
    first, second = np.asarray(jax.nn.softmax(vasopressor)), np.asarray(jax.nn.softmax(fluid))
    joint = (first[:, None] * second).reshape(25)
    cold = np.asarray(jax.nn.softmax(vasopressor / 0.3))[:, None]
    cold = cold * np.asarray(jax.nn.softmax(fluid / 0.3))
    np.testing.assert_allclose(at_temperature(joint, 0.3), cold.reshape(25), rtol=1e-4)
    np.testing.assert_allclose(at_temperature(joint, 1.0), joint, rtol=1e-5)
    greedy = at_temperature(joint, 0.0)
    level = vasopressor.argmax()
    assert greedy[5 * level + fluid[level].argmax()] == 1 and greedy.sum() == 1
    sure = at_temperature(np.eye(25)[7], 0.2)
    np.testing.assert_array_equal(sure, np.eye(25)[7])


def test_rates_are_exact_and_equal_the_records(cohort):
    episodes = load_episodes(cohort)
    given = np.eye(25, dtype=np.float32)[np.asarray(episodes.action)]
    found = rule_counts(episodes, given, **EDGES).rates()
    recorded = simulated_rates(episodes, schema.STEP_HOURS)
    assert found["adherence"][0] == pytest.approx(recorded["adherence"])
    assert found["adherence"][1] < found["adherence"][0] < found["adherence"][2]
    # No treatment breaks G1 in every hypoperfused state and G2 in none; no doses are too high.
    none = np.broadcast_to(np.eye(25, dtype=np.float32)[0], given.shape)
    at = {name: episodes.dynamic[..., schema.INDEX[name]] for name in ("meanbp", "lactate")}
    zero = np.zeros_like(at["meanbp"])
    broken = np.asarray(g1_untreated_hypoperfusion(**at, vasopressor=zero, fluid=zero))
    valid = np.asarray(episodes.valid)
    of_none = rule_counts(episodes, none, **EDGES).rates()
    assert of_none["adherence"][0] == pytest.approx(100 * (1 - broken[valid].mean()))
    assert of_none["overdosing"][0] == 0
    assert of_none["unsafe"][0] == pytest.approx(of_none["underdosing"][0])
    # Drawing from probabilities comes to the same.
    half = make("random").action_probs(episodes)
    drawn = prescribed_rates(jax.random.key(0), episodes, np.asarray(half), **EDGES)
    assert rule_counts(episodes, np.asarray(half), **EDGES).rates()["adherence"][0] == (
        pytest.approx(drawn["adherence"], abs=1.0)
    )


@pytest.fixture(scope="module")
def asked(cohort, model):
    """A scripted agent in the recorded states of the test split."""
    out = cohort.with_name("asked")
    finish(
        "agent", "run", "--backend", "scripted", "--model", model, "--episodes", cohort,
        "--templates", "compact", "--set", "keep_to_record=true", "--set",
        "dialogue.memory=decision", "--set", "forecast.samples=3", "--out", out,
    )  # fmt: skip
    return out


def test_an_agent_is_asked_in_every_recorded_state(asked, cohort):
    """What is prescribed is not given: every state is the recorded one."""
    episodes = load_episodes(cohort).of_split("test")
    lines = [json.loads(x) for x in (asked / "records.jsonl").read_text().splitlines()]
    by_stay = {line["patient"]: line for line in lines}
    assert sorted(by_stay) == sorted(np.asarray(episodes.stay_id).tolist())
    different = 0
    for row, stay in enumerate(np.asarray(episodes.stay_id).tolist()):
        decisions = by_stay[stay]["decisions"]
        assert len(decisions) == int(episodes.length[row])
        for step, decision in enumerate(decisions):
            pressure = float(episodes.dynamic[row, step, schema.INDEX["meanbp"]])
            assert decision["meanbp"] == pytest.approx(pressure, abs=1e-3)
            before = 0 if step == 0 else int(episodes.vasopressor[row, step - 1])
            assert decision["previous_vasopressor"] == before
            different += decision["action"] != int(episodes.action[row, step])
    assert different > 0


def test_a_run_without_scores_has_its_drawn_prescriptions(asked, cohort, tmp_path):
    episodes = load_episodes(cohort).of_split("test")
    found = read_run(asked, episodes)
    valid = np.asarray(episodes.valid)
    assert found.drawn == 1 and found.failed == 0
    assert set(np.unique(found.probs[valid])) == {0.0, 1.0}
    np.testing.assert_allclose(found.probs.sum(-1), 1)
    # Half of the record is lost: what is left of each stay counts as no treatment.
    half = tmp_path / "half"
    half.mkdir()
    (half / "manifest.json").write_bytes((asked / "manifest.json").read_bytes())
    lines = [json.loads(x) for x in (asked / "records.jsonl").read_text().splitlines()]
    for line in lines:
        line["decisions"] = line["decisions"][:1]
    (half / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    left = read_run(half, episodes)
    assert left.failed == pytest.approx(1 - episodes.num_stays / valid.sum())
    assert (left.probs[:, 1:][valid[:, 1:]].argmax(-1) == 0).all()
    with pytest.raises(InputError, match="is missing"):
        read_run(asked, load_episodes(cohort).of_split("train"))


def test_a_run_in_simulation_is_no_policy_of_records(capsys, cohort, model, tmp_path):
    fast = ("--backend", "scripted", "--templates", "compact", "--set", "forecast.samples=3")
    finish("agent", "run", "--model", model, "--patients", 2, *fast, "--out", tmp_path / "run")
    with pytest.raises(InputError, match="keep_to_record"):
        read_run(tmp_path / "run", load_episodes(cohort))
    kept = (*fast, "--set", "keep_to_record=true", "--out", tmp_path / "no")
    memory = ("--set", "dialogue.memory=decision")
    refuse(call(capsys, "agent", "run", "--model", model, *kept, *memory), "recorded stays")
    refuse(
        call(capsys, "agent", "run", "--model", model, "--episodes", cohort, *kept),
        "dialogue.memory=decision",
    )


def test_all_tables(capsys, cohort, model, asked, tmp_path, monkeypatch):
    """Every row and column, the truth beside the estimates, and nothing that was not given."""
    opened = []
    monkeypatch.setattr(
        ope, "open_policies", lambda *given: opened.append(given) or open_policies(*given)
    )
    fast = ("--backend", "scripted", "--templates", "compact", "--set", "forecast.samples=3")
    finish("agent", "run", "--model", model, "--patients", 5, *fast, "--out", tmp_path / "free")
    stages = tmp_path / "stages"
    stages.mkdir()
    pd.DataFrame(
        {"stage": ["clinician", "bc", "rl"], "completed": [np.nan, 99.0, 99.0],
         "value": [1.0, 1.5, 2.0], "low": [0.5, 1.0, 1.5], "high": [1.5, 2.0, 2.5],
         "valid": [np.nan, 98.0, 98.0], "adherence": [np.nan, 96.0, 97.0],
         "mortality_auroc": [np.nan, np.nan, 0.7]}
    ).to_csv(stages / "stages.csv", index=False)  # fmt: skip
    out = tmp_path / "out"
    result = call(
        capsys, "evaluate", "--episodes", cohort, "--model", model, "--policy", "guideline",
        "--policy", "random", "--policy", f"bc={asked}", "--policy", f"rl={asked}",
        "--treated", f"rl={tmp_path / 'free'}", "--stages", stages, "--compare", "published",
        "--set", "patients=20", "--set", "samples=1", "--set", "ope.n_bootstrap=100",
        "--out", out, "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert len(opened) == 1  # probabilities are computed once
    table = pd.read_csv(out / "policies.csv").set_index("policy")
    assert table.index.tolist() == ["clinician", "guideline", "random", "bc", "rl"]
    # A stage's model has the value of its evaluation, unless a run of its own is given.
    assert table.loc["bc", ["true", "true_low", "true_high"]].tolist() == [1.5, 1.0, 2.0]
    assert table.loc["rl", "true"] != 2.0
    assert table["true"].notna().all() and table.loc["guideline", "adherence"] == 100
    returns = pd.read_csv(out / "ope" / "estimates.csv")
    on_policy = returns[returns.estimator == "on_policy"].estimate.iloc[0]
    assert table.loc["clinician", "wis"] == pytest.approx(on_policy)
    wis = returns[(returns.estimator == "wis") & (returns.policy == "random")]
    assert table.loc["random", "wis"] == pytest.approx(wis.estimate.iloc[0])
    of_stages = pd.read_csv(out / "stages.csv")
    assert of_stages.stage.tolist() == ["bc", "rl"] and of_stages["true"].tolist() == [1.5, 2.0]
    assert of_stages.adherence[1] == pytest.approx(table.loc["rl", "adherence"])
    of_model = pd.read_csv(out / "world_model.csv").set_index(["who", "metric"])
    error = of_model.loc[("world model", "state MAE")]
    assert error.low < error.value < error.high
    page = (out / "report.html").read_text()
    assert "Example dialogues" in page and "Futures of single patients" in page
    assert "rl: patient" in page
    assert "SepsisAgent" in page and "no estimate of the value" in page
    tables = json.loads((out / "tables.json").read_text())
    assert {"world_model", "policies", "stages", "rank_correlation"} <= set(tables)
    assert r"\toprule" in (out / "policies.tex").read_text()
    refuse(call(capsys, "evaluate", "--episodes", cohort, "--out", tmp_path / "no", "--compare",
                "mine"), "published")  # fmt: skip
    refuse(call(capsys, "evaluate", "--episodes", cohort, "--out", tmp_path / "no", "--audit",
                tmp_path), "audit.json")  # fmt: skip


def test_nothing_is_made_up_where_nothing_is_known():
    estimates = pd.DataFrame(
        {"policy": ["a", "a"], "estimator": ["on_policy", "wis"], "estimate": [5.0, 7.0],
         "low": [4.0, 6.0], "high": [6.0, 8.0], "difference": [np.nan, 2.0],
         "difference_low": [np.nan, 1.0], "difference_high": [np.nan, 3.0], "ess": [50.0, 9.0],
         "trust": [True, False], "reason": ["", "few"]}
    )  # fmt: skip
    rates = {name: dict.fromkeys(("adherence", "unsafe", "underdosing", "overdosing"),
                                 (90.0, 80.0, 100.0)) for name in ("clinician", "a")}  # fmt: skip
    table = policy_table(estimates, rates, {}).set_index("policy")
    assert table.loc["clinician", "dr"] == 5 and np.isnan(table.loc["clinician", "wpdis_alive"])
    assert table.loc["a", "wis"] == 7 and np.isnan(table.loc["a", "dr"])
    assert not table.loc["a", "trust"] and "true" not in table
    columns, rows = cells("policies", table.reset_index())
    assert rows[1][columns.index("value, DR")] is None and "7.00 (6.00 to 8.00)" in rows[1]
    written = latex(named_table("policies", table.reset_index(), ""))
    assert "--" in written and r"7.00 (6.00 to 8.00)" in written


def test_published_figures_are_those_of_the_paper():
    """Table 2 and 3 of the paper: the clinicians' own mean return is 5.27."""
    by = POLICIES.set_index("policy")
    assert by.loc["clinician", "wis"] == 5.27 and by.loc["SepsisAgent", "adherence"] == 97.95
    assert STAGES.set_index("stage").loc["rl", "vasopressor_auroc"] == 0.7996
