"""The open demo with the default options, and the replication script."""

import importlib.util

import numpy as np
import pytest

from sepsis_jax.cohort import CohortOptions, build_cohort
from tests.sepsis_jax.cohort.conftest import CHECKOUT
from tests.sepsis_jax.cohort.tiny import Tiny
from worldmodel import schema
from worldmodel.episode_files import load_dose_edges, load_episodes


@pytest.mark.demo_data
def test_demo_cohort(demo, tmp_path):
    report = build_cohort(demo, tmp_path / "out")
    remaining = [line["remaining"] for line in report.consort]
    assert remaining[:5] == [140, 140, 140, 100, 57]
    assert 36 <= report.stays <= 44  # depends on the release of the charts
    assert sum(report.seconds.values()) < 30
    episodes = load_episodes(tmp_path / "out")
    assert (episodes.num_stays, episodes.num_steps) == (report.stays, 20)
    valid = np.asarray(episodes.valid)
    assert np.isfinite(np.asarray(episodes.dynamic)).all()
    # Most steps have vital signs; a third have the daily laboratory panel.
    recorded = np.asarray(episodes.measured)
    measured = recorded[:, 1:][valid[:, 1:]].mean(0)
    assert measured[schema.INDEX["heart_rate"]] > 0.95
    assert 0.2 < measured[schema.INDEX["creatinine"]] < 0.6
    # What is known at ICU admission are laboratory results, rarely vital signs.
    assert recorded[:, 0, schema.INDEX["heart_rate"]].mean() < 0.5
    edges = load_dose_edges(tmp_path / "out")
    assert 0 < edges.vasopressor[0] < edges.vasopressor[1] < edges.vasopressor[2] < 1
    levels = np.bincount(np.asarray(episodes.fluid)[valid], minlength=5)
    assert (levels > 0).all()


def load_script():
    path = CHECKOUT / "scripts" / "replicate_mimic.py"
    spec = importlib.util.spec_from_file_location("replicate_mimic", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", ["csv.gz", "parquet"])
def test_copies_are_new_patients_with_the_same_content(tmp_path, form):
    tiny = Tiny()
    for subject in (1, 2):
        tiny.septic_stay(subject, age=60 + subject)
    data = tiny.write(tmp_path / "data")
    load_script().replicate(data, tmp_path / "big", 3, form, threads=1)
    options = CohortOptions(split=(1.0, 0.0, 0.0))
    one = build_cohort(data, tmp_path / "one", options)
    many = build_cohort(tmp_path / "big", tmp_path / "many", options)
    assert (many.stays, many.patients, many.rows) == (6, 6, 3 * one.rows)
    episodes = load_episodes(tmp_path / "many")
    assert sorted(episodes.static[:, 0].tolist()) == [61] * 3 + [62] * 3
