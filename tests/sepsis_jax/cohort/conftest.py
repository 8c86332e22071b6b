"""Builds cohorts of hand-made hospitals."""

import os
from pathlib import Path

import pytest

from sepsis_jax.cohort import CohortOptions, build_cohort
from worldmodel.episode_files import load_episodes
from worldmodel.schema import INDEX

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture
def build(tmp_path):
    """`build(tiny, **options)` -> (episodes, report), with everything in the training split.

    Rows hold their own step and mimic-code's SOFA, which is easiest to reckon by hand;
    test_timing.py builds by the default contract of time.
    """

    def run(tiny, *, form="parquet", **options):
        number = len(list(tmp_path.iterdir()))
        data = tiny.write(tmp_path / f"data{number}", form)
        usual = {"split": (1.0, 0.0, 0.0), "threads": 1, "memory_limit": "1GB"}
        published = {"timing": "same-step", "sofa": "rolling-24h"}
        options = usual | published | options
        report = build_cohort(data, tmp_path / f"out{number}", CohortOptions(**options))
        return load_episodes(report.path), report

    return run


@pytest.fixture
def feature():
    """`feature(episodes, name, stay=0)` -> values of one feature per step."""

    def values(episodes, name, stay=0):
        return episodes.dynamic[stay, : int(episodes.length[stay]), INDEX[name]].tolist()

    return values


@pytest.fixture(scope="session")
def demo():
    """Folder of the open MIMIC-IV demo; the test is skipped where it is not at hand."""
    default = CHECKOUT.parent / "shared" / "data" / "mimic-iv-demo"
    folder = Path(os.environ.get("MIMIC_IV_DEMO", default))
    if not (folder / "icu").is_dir():
        pytest.skip(
            "no MIMIC-IV demo: download 'MIMIC-IV Clinical Database Demo' 2.2 from PhysioNet "
            "(open access) and set MIMIC_IV_DEMO to the folder that holds hosp/ and icu/"
        )
    return folder
