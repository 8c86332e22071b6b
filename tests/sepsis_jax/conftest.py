"""A cohort and a model made by the commands."""

import shutil

import pytest


@pytest.fixture(scope="module")
def cohort(first_cohort, tmp_path_factory):
    """A module's own copy."""
    return shutil.copytree(first_cohort, tmp_path_factory.mktemp("runs") / "cohort")


@pytest.fixture(scope="module")
def model(cohort, first_model):
    """A model of the reference variant, in the published shape; a module's own copy."""
    return shutil.copytree(first_model, cohort.with_name("model"))
