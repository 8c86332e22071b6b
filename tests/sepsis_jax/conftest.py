"""A cohort and a model made by the commands."""

import pytest

from tests.sepsis_jax.command_line import FAST, finish


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cohort"
    finish("cohort", "synthetic", "--patients", 60, "--out", out)
    return out


@pytest.fixture(scope="module")
def model(cohort):
    """A model of the reference variant, in the published shape."""
    out = cohort.with_name("model")
    finish("world-model", "train", "--episodes", cohort, "--out", out, *FAST)
    return out
