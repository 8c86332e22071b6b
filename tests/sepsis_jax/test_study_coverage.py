"""Coverage and rank over the seeds of a study, against counts by hand."""

import numpy as np
import pandas as pd
import pytest

from sepsis_jax.pipelines.study_coverage import coverage_of


def table(wis, *, trust, low=-1.0, high=1.0, true=(0.0, 1.0, 2.0, 3.0)):
    names = ["clinician", "a", "b", "c"]
    wis = np.array([0.0, *wis])
    return pd.DataFrame(
        {"policy": names, "wis": wis, "wis_low": wis + low, "wis_high": wis + high,
         "trust": [True, *trust], "true": true}
    )  # fmt: skip


def test_intervals_and_ranks_are_counted():
    tables = {
        0: table([1.5, 2.5, 5.0], trust=[True, False, True]),  # holds two, the right order
        1: table([3.0, 2.0, np.nan], trust=[False, True, False]),  # holds one of two
    }
    found = coverage_of(tables).set_index(["estimator", "verdict"])
    of_all = found.loc["wis", "all"]
    assert of_all["intervals"] == 5 and of_all["covered"] == pytest.approx(60.0)
    assert of_all["covered_low"] == pytest.approx(14.66, abs=0.01)  # Clopper and Pearson
    assert of_all["covered_high"] == pytest.approx(94.73, abs=0.01)
    assert of_all["width"] == pytest.approx(2.0)
    assert of_all["rank"] == of_all["least_rank"] == 1.0  # two policies have no rank
    trusted = found.loc["wis", "trusted"]
    assert trusted["intervals"] == 3 and trusted["covered"] == pytest.approx(200 / 3)


def test_without_truth_there_is_nothing_to_count():
    assert coverage_of({0: table([1, 2, 3], trust=[True] * 3).drop(columns="true")}) is None
    blank = table([1, 2, 3], trust=[False] * 3, true=[np.nan] * 4)
    found = coverage_of({0: blank})
    assert (found["intervals"] == 0).all()
