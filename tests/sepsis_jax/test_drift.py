"""Drift between cohorts: none between two samples of one world, and what was changed is found."""

import csv
import json

import jax
import numpy as np
import pytest
from scipy import stats

from sepsis_jax.pipelines.drift import DriftConfig, compare_cohorts
from tests.sepsis_jax.command_line import call, refuse
from worldmodel import schema
from worldmodel.episode_files import load_episodes, save_episodes
from worldmodel.schema import INDEX
from worldmodel.synthetic import generate

STAYS = 250
CONFIG = DriftConfig(resamples=200)


@pytest.fixture(scope="module")
def worlds():
    """Patients of one world, from two seeds."""
    return [generate(jax.random.key(seed), STAYS, keep_latent=False)[0] for seed in (0, 1)]


def row(found, kind, name):
    table = found.quantities
    return table[(table["kind"] == kind) & (table["name"] == name)].iloc[0]


def test_two_seeds_of_one_world_are_alike(worlds):
    found = compare_cohorts(*worlds, CONFIG)
    assert found.separation.low < 0.5 < found.separation.high
    assert not found.quantities["moved"].any() and found.actions["moved"].sum() <= 1
    assert "cannot be told apart" in found.words[0]
    assert len(found.quantities) == 39 + 38 + 10
    for share in ("share_a", "share_b"):
        assert found.actions[share].sum() == pytest.approx(1)


def test_a_shifted_feature_is_found_first(worlds):
    first, second = worlds
    values = np.array(second.dynamic)
    values[..., INDEX["lactate"]] *= 1.5
    found = compare_cohorts(first, second.replace(dynamic=values), CONFIG)
    assert tuple(found.quantities.iloc[0][["kind", "name"]]) == ("value", "lactate")
    assert found.quantities["moved"].sum() == 1 and found.separation.low > 0.6
    assert "can be told apart" in found.words[0] and found.words[2].startswith("lactate: mean")
    # The other way round: the same difference with another sign.
    back = compare_cohorts(second.replace(dynamic=values), first, CONFIG)
    shift = row(found, "value", "lactate")["smd"]
    assert row(back, "value", "lactate")["smd"] == pytest.approx(-shift)


def test_less_measuring_is_found_first(worlds):
    first, second = worlds
    masks = np.array(second.measured)
    masks[:, 1::2, INDEX["creatinine"]] = False
    found = compare_cohorts(first, second.replace(measured=masks), CONFIG)
    assert tuple(found.quantities.iloc[0][["kind", "name"]]) == ("measured", "creatinine")
    masks[..., INDEX["albumin"]] = False
    found = compare_cohorts(first, second.replace(measured=masks), CONFIG)
    assert "In one of the cohorts only: albumin." in found.words
    assert np.isnan(row(found, "value", "albumin")["smd"])


def test_other_treatment_is_found(worlds):
    first, second = worlds
    dose = np.where(np.asarray(second.fluid_dose) > 0, 40.0, 0.0).astype(np.float32)
    found = compare_cohorts(first, second.replace(fluid_dose=dose), CONFIG)
    assert tuple(found.quantities.iloc[0][["kind", "name"]]) == ("treatment", "fluid_ml")
    shares = found.actions.set_index(["vasopressor", "fluid"])
    assert shares.loc[(0, 1), "moved"] and shares.loc[(0, 1), "low"] > 0
    assert shares["share_b"].loc[:, 2:].sum() == 0


def test_the_figures_are_those_of_means_per_stay(worlds):
    """Against a calculation stay by stay."""
    found = compare_cohorts(*worlds, CONFIG)
    means = []
    for episodes in worlds:
        stays = []
        for n, length in enumerate(np.asarray(episodes.length)):
            values = np.asarray(episodes.dynamic)[n, :length, INDEX["lactate"]]
            known = np.asarray(episodes.measured)[n, :length, INDEX["lactate"]]
            if known.any():
                stays.append(values[known].mean(dtype=np.float64))
        means.append(np.array(stays))
    a, b = means
    lactate = row(found, "value", "lactate")
    assert lactate["mean_a"] == pytest.approx(a.mean()) and lactate["sd_b"] == pytest.approx(
        b.std(ddof=1)
    )
    pooled = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    smd = (b.mean() - a.mean()) / pooled
    assert lactate["smd"] == pytest.approx(smd)
    error = np.sqrt(1 / len(a) + 1 / len(b))
    assert lactate["smd_low"] == pytest.approx(smd - 1.96 * error, abs=0.35 * error)
    assert lactate["smd_high"] == pytest.approx(smd + 1.96 * error, abs=0.35 * error)
    assert lactate["ks"] == pytest.approx(stats.ks_2samp(a, b).statistic)
    assert lactate["share_known_a"] == pytest.approx(len(a) / STAYS)
    died = row(found, "outcome", "died_90d")
    assert died["mean_b"] == pytest.approx(np.asarray(worlds[1].died_90d).mean())
    action = np.asarray(worlds[0].action)
    valid = np.asarray(worlds[0].valid)
    share = np.mean([(one[ok] == 0).mean() for one, ok in zip(action, valid, strict=True)])
    assert found.actions["share_a"][0] == pytest.approx(share)


def test_stays_of_one_patient_are_no_new_patients(worlds):
    """Every stay four times, of the same patient: the intervals stay as wide."""
    first, second = worlds
    index = np.repeat(np.arange(STAYS), 4)
    found = compare_cohorts(first, second, CONFIG)
    again = compare_cohorts(first, second.select(index), CONFIG)
    for name in ("lactate", "sofa"):
        one, other = row(found, "value", name), row(again, "value", name)
        assert other["p"] == pytest.approx(one["p"])
        width, wide = (r["smd_high"] - r["smd_low"] for r in (one, other))
        assert wide == pytest.approx(width, rel=0.25)


@pytest.mark.slow
def test_cohorts_alike_are_seldom_told_apart():
    """Thirty pairs of one world: the lower end of the AUROC's interval is above 0.5 in few."""
    everyone, _ = generate(jax.random.key(2), 60 * 100, keep_latent=False)
    parts = [everyone.select(np.arange(100 * n, 100 * (n + 1))) for n in range(60)]
    found = [
        compare_cohorts(a, b, DriftConfig(resamples=100))
        for a, b in zip(parts[::2], parts[1::2], strict=True)
    ]
    assert sum(one.separation.low > 0.5 for one in found) <= 3
    assert sum(one.quantities["moved"].any() for one in found) <= 4


# The command


def test_the_command(capsys, tmp_path, worlds):
    second = worlds[1]
    for name, episodes in zip("ab", worlds, strict=True):
        save_episodes(episodes, tmp_path / name)
    result = call(
        capsys, "cohort", "drift", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "drift",
        "--set", "resamples=100", "--seed", 1, "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    told = json.loads((tmp_path / "drift" / "drift.json").read_text())
    assert told["words"] == result.last_json["words"]
    assert told["cohorts"]["A"]["stays"] == STAYS and told["config"]["seed"] == 1
    with (tmp_path / "drift" / "drift.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 87
    assert (tmp_path / "drift" / "drift.png").read_bytes()[1:4] == b"PNG"
    edges = schema.DoseEdges(vasopressor=(0.01, 0.1, 1.0), fluid=(10.0, 20.0, 30.0))
    levels = {
        "vasopressor": schema.dose_level(second.vasopressor_dose, edges.vasopressor),
        "fluid": schema.dose_level(second.fluid_dose, edges.fluid),
    }
    other = second.replace(**{name: level.astype(np.int32) for name, level in levels.items()})
    save_episodes(other, tmp_path / "edges", dose_edges=edges)
    result = call(
        capsys, "cohort", "drift", tmp_path / "b", tmp_path / "edges", "--out", tmp_path / "drift",
        "--set", "resamples=100",
    )  # fmt: skip
    assert "levels of B are those of A's edges" in result.out
    assert not json.loads((tmp_path / "drift" / "drift.json").read_text())["actions"][0]["moved"]


def test_cohorts_that_cannot_be_compared_are_refused(capsys, tmp_path, worlds):
    save_episodes(worlds[0], tmp_path / "a")
    save_episodes(worlds[0], tmp_path / "hourly", step_hours=1.0)
    save_episodes(worlds[0].select(np.arange(19)), tmp_path / "few")

    def drift(other):
        out = ("--out", tmp_path / "out")
        return call(capsys, "cohort", "drift", tmp_path / "a", tmp_path / other, *out)

    refuse(drift("hourly"), "hourly: steps of 1 h", "4 h", "step_hours")
    refuse(drift("few"), "few: 19 stays, expected 20 or more")
    refuse(drift("none"), "none")
    assert not (tmp_path / "out").exists()


def test_a_model_of_one_cohort_is_evaluated_on_another(capsys, tmp_path, model):
    """A world model that was trained on one world, on patients of another."""
    other = tmp_path / "other"
    made = call(capsys, "cohort", "synthetic", "--patients", 60, "--confounding", 1, "--seed", 9,
                "--out", other)  # fmt: skip
    assert made.status == 0, made.err
    result = call(
        capsys, "world-model", "evaluate", "--model", model, "--episodes", other, "--json"
    )
    assert result.status == 0, result.err
    told = result.last_json
    assert told["stays"] == int((np.asarray(load_episodes(other).split) == 2).sum())
    assert np.isfinite(told["state"]["model"]["mae"])
