"""The build as a whole: split, options, report, output folder."""

import json

import numpy as np
import pytest

from sepsis_jax.cohort import CohortOptions, build_cohort, parity_options
from sepsis_jax.cohort.binning import fit_dose_edges
from sepsis_jax.cohort.build import split_of
from tests.sepsis_jax.cohort.tiny import ADMITTED, Tiny
from tests.sepsis_jax.command_line import call, refuse
from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.configuration import resolve_config
from worldmodel.episode_files import load_dose_edges, load_episodes, to_table
from worldmodel.errors import InputError

ALL = (1.0, 0.0, 0.0)


@pytest.fixture
def data(tmp_path):
    tiny = Tiny()
    for subject in range(12):
        tiny.septic_stay(subject)
    tiny.septic_stay(3, number=2, admitted=ADMITTED.replace(year=ADMITTED.year + 1))
    return tiny.write(tmp_path / "data")


def test_split_is_by_patient_and_does_not_depend_on_others():
    patients = np.arange(10_000)
    split = split_of(patients, (0.7, 0.15, 0.15), seed=1)
    shares = np.bincount(split) / len(split)
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.02)
    some = np.array([77, 5, 77, 9_999])
    assert split_of(some, (0.7, 0.15, 0.15), seed=1).tolist() == split[some].tolist()
    assert (split_of(patients, (0.7, 0.15, 0.15), seed=2) != split).mean() > 0.3
    assert set(split_of(patients, (1.0, 0.0, 0.0), seed=1)) == {0}


def test_stays_of_one_patient_share_a_split(data, tmp_path):
    build_cohort(data, tmp_path / "out", CohortOptions(stays="all"))
    episodes = load_episodes(tmp_path / "out")
    assert len(set(episodes.split[episodes.subject_id == 3].tolist())) == 1
    assert set(episodes.split.tolist()) > {0}


def test_the_folder_says_what_made_it(data, tmp_path):
    seen = []
    report = build_cohort(data, tmp_path / "out", progress=lambda *about: seen.append(about))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["options"] == json.loads(json.dumps(report.manifest["options"]))
    assert manifest["consort"][-1]["remaining"] == manifest["stays"] == report.stays == 12
    assert {file["file"] for file in manifest["inputs"]} >= {"icu/chartevents.parquet"}
    assert manifest["versions"]["duckdb"]
    assert sum(manifest["counts"]["imputation"].values()) == report.rows * schema.NUM_FEATURES
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and seen[-1] == ("done", 1.0)
    assert [name for name, _ in seen[:-1]] == list(report.seconds)
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("place", "version"),
    [("mimiciv/3.1", "3.1"), ("mimic-iv-2.2", "2.2"), ("demo/mimic-iv-demo", None)],
)
def test_the_manifest_names_the_release(place, version, tmp_path):
    tiny = Tiny()
    tiny.septic_stay(1)
    report = build_cohort(tiny.write(tmp_path / place), tmp_path / "out", CohortOptions(split=ALL))
    assert report.manifest["release"] == {
        "name": None,
        "version": version,
        "folder": place.split("/")[-1],
        "rows": {"patients": 1, "admissions": 1, "icustays": 1},
    }


def test_dose_edges_may_be_given(data, tmp_path):
    settings = ["vasopressor_edges=[0.08, 0.22, 0.45]", "fluid_edges=[50, 180, 530]"]
    options = resolve_config(CohortOptions, None, settings, source="--option")
    build_cohort(data, tmp_path / "out", options)
    assert load_dose_edges(tmp_path / "out") == schema.DEFAULT_DOSE_EDGES


def test_a_dose_at_a_given_edge_lies_below_it():
    doses = np.array([[0.1, 0.3, 0.7]], np.float32)  # 0.1 and 0.3 are a little more in float32
    given = CohortOptions(vasopressor_edges=(0.1, 0.3, 0.7))
    edges, _ = fit_dose_edges(doses, doses, np.array([True]), given)
    assert schema.dose_level(doses, edges.vasopressor).tolist() == [[1, 2, 3]]


def test_an_optional_list_is_a_list_or_nothing():
    def fluid_edges(text):
        return resolve_config(CohortOptions, None, [f"fluid_edges={text}"], source="-o").fluid_edges

    assert fluid_edges("null") is None and fluid_edges("[1, 2, 3]") == (1.0, 2.0, 3.0)
    with pytest.raises(InputError, match="-o: fluid_edges: got 7, expected a list"):
        fluid_edges("7")


def test_a_table_is_checked_by_the_command(capsys, tmp_path):
    table = to_table(toy_episodes(6, 4))
    table.to_parquet(tmp_path / "own.parquet")
    table.assign(temp_c=98.6, sofa=99).to_csv(tmp_path / "own.csv", index=False)
    assert call(capsys, "cohort", "check", "--table", tmp_path / "own.parquet").status == 0
    result = call(capsys, "cohort", "check", "--table", tmp_path / "own.csv", "--json")
    assert result.status == 2
    assert [problem.split("column ")[1].split()[0] for problem in result.last_json["problems"]] == [
        "temp_c",
        "sofa",
    ]
    refuse(call(capsys, "cohort", "check", "--table", tmp_path / "own.xlsx"), "neither .parquet")
    refuse(call(capsys, "cohort", "check", "--table", tmp_path / "no.csv"), "no.csv: unreadable")


def test_episodes_keep_their_promises(data, tmp_path):
    build_cohort(data, tmp_path / "out", CohortOptions(max_hours=16))
    episodes = load_episodes(tmp_path / "out")
    assert episodes.num_steps == 4
    assert np.isnan(episodes.behavior_prob).all()
    dynamic = np.asarray(episodes.dynamic)
    assert ((dynamic >= schema.LOW) & (dynamic <= schema.HIGH)).all()


def test_a_foreign_folder_is_not_overwritten(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a folder of episodes"):
        build_cohort(data, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_folders_are_not_mixed_up(data, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for out, derived, message in (
        ("out", "thesis", "other files than derived tables"),
        ("out", "out", "must lie outside"),
        ("out", "out/derived", "must lie outside"),
        ("file", "derived", "is a file"),
    ):
        with pytest.raises(InputError, match=message):
            build_cohort(data, tmp_path / out, CohortOptions(derived_out=tmp_path / derived))
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_a_failed_build_leaves_the_old_episodes(data, tmp_path):
    report = build_cohort(data, tmp_path / "out")
    with pytest.raises(InputError, match="no stay is left"):
        build_cohort(data, tmp_path / "out", CohortOptions(min_age=100))
    assert load_episodes(tmp_path / "out").num_stays == report.stays


def test_derived_tables_hold_every_stay(data, tmp_path):
    import pandas as pd

    options = CohortOptions(derived_out=tmp_path / "derived")
    build_cohort(data, tmp_path / "out", options)
    assert len(pd.read_parquet(tmp_path / "derived" / "sepsis3.parquet")) == 13
    assert load_episodes(tmp_path / "out").num_stays == 12


def test_an_empty_training_split_is_an_error(tmp_path):
    tiny = Tiny()
    tiny.septic_stay(1)
    data = tiny.write(tmp_path / "data")
    with pytest.raises(InputError, match="training split is empty"):
        build_cohort(data, tmp_path / "out", CohortOptions(split=(1e-9, 0.5, 0.5 - 1e-9)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"step_hours": 3},
        {"max_hours": 2},
        {"min_steps": 0},
        {"min_steps": 21},
        {"split": (0.5, 0.5, 0.5)},
        {"split": (0.0, 0.5, 0.5)},
        {"threads": 0},
        {"sofa": "daily"},
        {"death_days": 0},
        {"max_urine_ml": 0},
        {"min_age": -1},
        {"fluid_edges": (1.0, 2.0)},
        {"vasopressor_edges": (0.3, 0.2, 0.4)},
    ],
)
def test_options_are_checked(wrong):
    with pytest.raises(InputError, match=f"option {next(iter(wrong))}"):
        CohortOptions(**wrong)


def test_a_malformed_memory_limit_is_an_error(data, tmp_path):
    with pytest.raises(InputError, match="option memory_limit: 'plenty'"):
        build_cohort(data, tmp_path / "out", CohortOptions(memory_limit="plenty"))


def test_too_little_memory_is_an_error(data, tmp_path):
    with pytest.raises(InputError, match="option memory_limit"):
        build_cohort(data, tmp_path / "out", CohortOptions(memory_limit="1MB"))
    assert list(tmp_path.glob(".*")) == []


def test_parity_options_take_changes():
    assert parity_options(step_hours=1).step_hours == 1
    assert parity_options().age == "fractional"
    assert parity_options("2026-07").age == "years"
