"""A cohort and a model made by the commands."""

import shutil

import pytest

from tests.sepsis_jax.command_line import FAST, finish
from tests.shared import made_once


@pytest.fixture(scope="session")
def first_cohort(tmp_path_factory, worker_id):
    def make(folder):
        finish("cohort", "synthetic", "--patients", 60, "--out", folder / "cohort")

    return made_once("cohort", make, tmp_path_factory, worker_id) / "cohort"


@pytest.fixture(scope="session")
def first_model(first_cohort, tmp_path_factory, worker_id):
    def make(folder):
        out = folder / "model"
        finish("world-model", "train", "--episodes", first_cohort, "--out", out, *FAST)

    return made_once("model", make, tmp_path_factory, worker_id) / "model"


@pytest.fixture(scope="module")
def cohort(first_cohort, tmp_path_factory):
    """A module's own copy."""
    return shutil.copytree(first_cohort, tmp_path_factory.mktemp("runs") / "cohort")


@pytest.fixture(scope="module")
def model(cohort, first_model):
    """A model of the reference variant, in the published shape; a module's own copy."""
    return shutil.copytree(first_model, cohort.with_name("model"))
