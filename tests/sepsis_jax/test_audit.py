"""The audit of a world model: true models pass, wrong ones fail; and the command."""

import json
from dataclasses import replace

import jax
import numpy as np
import pandas as pd
import pytest

from sepsis_jax.pipelines.audit import (
    STEPS,
    VALUES,
    AuditConfig,
    Recorded,
    Simulated,
    audit_model,
    check_coverage,
    check_doses,
    check_outcomes,
    coverage_table,
    dose_table,
    outcome_table,
    recorded_futures,
)
from sepsis_jax.pipelines.verdicts import FAIL, NOT_RUN, PASS, SUSPECT, rank_among
from tests.sepsis_jax.command_line import call, leftovers, refuse
from worldmodel import schema
from worldmodel.episode_files import load_episodes, load_scaler, save_episodes
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model

PATIENTS, SAMPLES, HORIZON = 600, 40, max(STEPS)


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def run(capsys):
    return lambda *arguments: call(capsys, *arguments)


def futures(random, *, spread=1.0, mortality=1.0, leaving=1.0, discrete=False):
    """A record, and the futures of a model that is true if all numbers are 1."""
    middle = random.normal(size=(PATIENTS, 1, HORIZON))
    record = middle[:, 0] + random.normal(size=(PATIENTS, HORIZON))
    drawn = middle + spread * random.normal(size=(PATIENTS, SAMPLES, HORIZON))
    if discrete:
        record, drawn = np.round(record), np.round(drawn)
    died = random.uniform(0.1, 0.9, PATIENTS)
    risk = np.array([0.05, 0.15])[random.integers(0, 2, (PATIENTS, 1))]
    stayed = random.geometric(risk[:, 0]) - 1
    there = np.arange(1, HORIZON + 1) <= stayed[:, None]
    going_on = (1 - leaving * risk) ** np.arange(1, HORIZON + 1)
    half = np.arange(PATIENTS) % 2 == 0
    recorded = Recorded(
        values=dict.fromkeys(VALUES, record),
        known=dict.fromkeys(VALUES, there),
        steps=stayed,
        died=random.random(PATIENTS) < died,
        groups={"all": np.ones(PATIENTS, bool), "male": half, "tiny": np.arange(PATIENTS) < 3},
    )
    alive = np.broadcast_to(going_on[:, None], drawn.shape)
    return Simulated(dict.fromkeys(VALUES, drawn), alive, mortality * died), recorded


def verdicts(checks):
    return {check.verdict for check in checks}


@pytest.mark.parametrize("discrete", [False, True])
def test_a_true_model_covers_nine_in_ten(random, discrete):
    table = coverage_table(*futures(random, discrete=discrete), random)
    # Few of the 600 stays go on for twelve steps, so that the share is uncertain by then.
    assert (abs(table["coverage"] - 0.9) < 3 * table["error"]).all()
    assert set(table["steps"]) == set(STEPS) and table["stays"].is_unique is False
    assert FAIL not in verdicts(check_coverage(table))


@pytest.mark.parametrize(("spread", "side"), [(0.5, -1), (2.0, 1)])
def test_intervals_that_are_too_narrow_or_wide_fail(random, spread, side):
    checks = check_coverage(coverage_table(*futures(random, spread=spread), random))
    assert verdicts(checks) == {FAIL} and len(checks) == len(VALUES)
    assert all(side * (check.value - 0.9) > 0.05 for check in checks)


def test_draws_of_patients_who_left_do_not_count(random):
    drawn = np.concatenate([random.normal(size=(4000, 20)), np.full((4000, 20), 50.0)], axis=1)
    weight = np.concatenate([np.ones((4000, 20)), np.zeros((4000, 20))], axis=1)
    rank = rank_among(random.normal(size=4000), drawn, weight, random)
    assert np.quantile(rank, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.04)
    # Values that are held are equal: ranks are uniform all the same.
    rank = rank_among(np.full(4000, 7.0), np.full((4000, 9), 7.00001), np.ones((4000, 9)), random)
    assert np.quantile(rank, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.03)


def test_outcomes_of_a_true_model_pass_and_of_wrong_ones_fail(random):
    table = outcome_table(*futures(random))
    assert verdicts(check_outcomes(table)) == {PASS}
    assert set(table["group"]) == {"all", "male"}  # three patients are no group
    mortality, stay = check_outcomes(outcome_table(*futures(random, mortality=0.7)))
    assert (mortality.verdict, stay.verdict) == (FAIL, PASS)
    mortality, stay = check_outcomes(outcome_table(*futures(random, leaving=2.0)))
    assert (mortality.verdict, stay.verdict) == (PASS, FAIL)
    simulated, recorded = futures(random)
    endless = check_outcomes(outcome_table(simulated._replace(alive=None), recorded))
    assert [check.verdict for check in endless] == [PASS, NOT_RUN]


def test_a_pressure_that_falls_with_the_dose_fails(random):
    patients = random.normal(60, 10, (50, 1))
    groups = {"all": np.ones(50, bool), "shock": patients[:, 0] < 60}
    rising = patients + 2.0 * np.arange(5) + random.normal(0, 0.5, (50, 5))
    assert verdicts(check_doses(dose_table(rising, groups))) == {PASS}
    everyone, shock = check_doses(dose_table(rising[:, ::-1], groups))
    assert everyone.verdict == shock.verdict == FAIL and everyone.value > 1
    flat = patients + random.normal(0, 5, (50, 5))
    assert FAIL not in verdicts(check_doses(dose_table(flat, groups)))
    nobody = groups | {"shock": np.zeros(50, bool)}
    assert check_doses(dose_table(rising, nobody))[1].verdict == NOT_RUN


def test_what_was_recorded_lines_up_with_the_steps(cohort):
    episodes = load_episodes(cohort)
    chosen = np.flatnonzero(np.asarray(episodes.length) > 3)
    episodes = episodes.select(chosen)
    recorded = recorded_futures(episodes, 2, all_entries=False)
    pressure = np.asarray(episodes.dynamic)[..., schema.INDEX["meanbp"]]
    assert np.array_equal(recorded.values["meanbp"][:, 0], pressure[:, 3])
    assert np.array_equal(recorded.steps, np.asarray(episodes.length) - 3)
    assert np.array_equal(recorded.known["sofa"].sum(1), np.minimum(recorded.steps, HORIZON))
    lactate = recorded.known["lactate"]
    whole = recorded_futures(episodes, 2, all_entries=True).known["lactate"]
    assert (whole >= lactate).all() and lactate.sum() < whole.sum()
    groups = recorded.groups
    assert (groups["shock"] ^ groups["no shock"]).all()
    assert groups["shock"][pressure[:, 2] < 65].all()


def test_a_recurrent_model_is_audited(cohort):
    """An untrained one, whose intervals and treatments are not those of patients."""
    episodes = load_episodes(cohort)
    config = ModelConfig(variant="recurrent", hidden=6, head=5)
    world_model = init_world_model(
        jax.random.key(0), load_scaler(cohort), config, stay_steps=episodes.num_steps
    )
    checks, tables = audit_model(world_model, episodes, AuditConfig(samples=8, stays=40))
    assert len(checks) == len(VALUES) + 4
    assert tables["outcomes"]["stays"].max() == 40
    stay = next(check for check in checks if check.name == "length of stay")
    assert stay.verdict == FAIL  # it ends half of the stays in every step
    again, _ = audit_model(world_model, episodes, AuditConfig(samples=8, stays=40))
    assert again == checks


# The command


def test_the_command_writes_what_it_says(run, cohort, model, tmp_path):
    out = tmp_path / "audit"
    arguments = ("audit", "--episodes", cohort, "--model", model, "--out", out, "--json")
    result = run(*arguments, "--set", "samples=2", "--set", "split=all")
    assert result.status == 0, result.err
    assert leftovers(out) == [
        "audit.csv", "audit.json", "columns.csv", "coverage.csv", "doses.csv", "manifest.json",
        "outcomes.csv", "report.html",
    ]  # fmt: skip
    checks = json.loads((out / "audit.json").read_text())["checks"]
    assert checks == result.last_json["checks"]
    table = pd.read_csv(out / "audit.csv")
    assert list(table["name"]) == [check["name"] for check in checks]
    assert {"patients in two splits", "90% intervals of meanbp", "mortality by group"} <= set(
        table["name"]
    )
    assert set(table["verdict"]) <= {PASS, SUSPECT, FAIL, NOT_RUN}
    assert json.loads(result.out) == result.last_json  # and nothing else
    assert "patients in two splits" in (out / "report.html").read_text()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["samples"] == 2 and manifest["model"] == str(model)
    assert set(pd.read_csv(out / "doses.csv")["level"]) == set(range(5))


def test_strict_ends_with_a_status(run, cohort, tmp_path):
    episodes = load_episodes(cohort)
    arguments = ("audit", "--out", tmp_path / "audit", "--strict", "--episodes")
    assert run(*arguments, cohort).status == 0
    one_patient = replace(episodes, subject_id=0 * episodes.subject_id)
    leaky = save_episodes(one_patient, tmp_path / "leaky")
    result = run(*arguments, leaky)
    assert result.status == 1 and "fail: patients in two splits" in " ".join(result.out.split())
    assert run("audit", "--out", tmp_path / "audit", "--episodes", leaky).status == 0


def test_bad_input_is_refused(run, cohort, model, tmp_path):
    arguments = ("audit", "--episodes", cohort, "--model", model, "--out", tmp_path / "audit")
    refuse(run(*arguments, "--set", "step=500"), "step", "500")
    refuse(run(*arguments, "--set", "split=none"), "split", "none")
    refuse(run(*arguments, "--set", "steps=2"), "steps")
    assert leftovers(tmp_path) == []
