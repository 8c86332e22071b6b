"""Effective sample size, verdicts, sensitivity, subgroups."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from sepsis_jax.ope import diagnose, weigh
from sepsis_jax.ope.diagnostics import effective_size, verdict
from sepsis_jax.ope.robustness import evaluate_groups, worst_case
from sepsis_jax.report.ope import sections
from tests.sepsis_jax.ope.samples import random_case


def test_effective_size():
    assert float(effective_size(jnp.zeros(7))) == pytest.approx(7)
    assert float(effective_size(jnp.log(jnp.array([1.0, 1.0, 2.0])))) == pytest.approx(16 / 6)
    assert float(effective_size(jnp.array([300.0, -400.0]))) == pytest.approx(1)
    assert float(effective_size(jnp.full(3, -jnp.inf))) == 0


def test_diagnostics_of_the_clinician_are_perfect():
    data, *_ = random_case()
    probs = data.behavior_probs[None]
    found = diagnose(data, probs, weigh(data, probs))
    assert float(found.ess[0]) == pytest.approx(data.num_stays, rel=1e-4)
    assert float(found.mean_ratio[0]) == pytest.approx(1, abs=1e-5)
    assert float(found.largest[0]) == pytest.approx(1 / data.num_stays, rel=1e-4)
    row = {name: float(np.asarray(getattr(found, name)).reshape(-1)[0]) for name in found._fields}
    assert verdict("wis", row, data.num_stays) == ""


def test_verdicts_give_the_reason():
    good = {"matched": 500, "ess": 400.0, "largest": 0.01, "clipped": 0.0, "mean_ratio": 1.0,
            "mean_ratio_z": 0.1, "unsupported": 0.0}  # fmt: skip
    assert verdict("wis", good, 500) == ""
    for change, words in (
        ({"ess": 3.0}, "effective sample size"),
        ({"largest": 0.5}, "one stay holds 50%"),
        ({"clipped": 0.2}, "20% of steps clipped"),
        ({"mean_ratio_z": -6.0, "mean_ratio": 0.2}, "mean weight 0.2, expected 1"),
        ({"unsupported": 0.4}, "40% of the policy"),
        ({"matched": 0}, "no stay followed"),
    ):
        assert words in verdict("wis", {**good, **change}, 500)
    assert "miss the clinician" in verdict("dm", good, 500, fqe_gap=-0.4)
    assert "leaves out the error of the fitted values" in verdict("dm", good, 500, fqe_gap=0.0)


def test_worst_case_equals_trying_every_corner():
    rng = np.random.default_rng(0)
    returns, weight = rng.normal(size=8), rng.gamma(1.0, 1.0, 8)
    corners = []
    for signs in itertools.product((-1, 1), repeat=8):
        w = weight * 1.7 ** np.array(signs)
        corners.append((w * returns).sum() / w.sum())
    low, high = worst_case(jnp.asarray(returns), jnp.log(jnp.asarray(weight))[None], 1.7)
    assert float(low[0]) == pytest.approx(min(corners), abs=1e-5)
    assert float(high[0]) == pytest.approx(max(corners), abs=1e-5)


def test_subgroups_note_how_many_were_looked_at():
    data, probs, fitted = random_case(stays=120, policies=2)
    masks = {"all": np.ones(120, bool), "few": np.arange(120) < 5, "half": np.arange(120) % 2 == 0}
    table = evaluate_groups(
        data, probs, masks, key=jax.random.key(0), fitted=fitted, estimators=("wis", "dr"),
        n_bootstrap=100,
    )  # fmt: skip
    assert table.attrs["tests"] == 6
    assert table.set_index("group").loc["few", "reason"] == "too few stays"
    rows = table[table["group"] == "half"]
    assert set(rows["stays"]) == {60} and len(rows) == 4
    assert (~rows["differs_adjusted"].astype(bool) | rows["differs"].astype(bool)).all()


def test_a_report_of_subgroups_that_are_all_too_small():
    data, probs, fitted = random_case(stays=40, policies=1)
    table = evaluate_groups(
        data, probs, {"few": np.arange(40) < 5}, key=jax.random.key(0), fitted=fitted
    )
    estimates = pd.DataFrame()
    estimates.attrs = {"stays": 40, "level": 0.95, "interval": "t", "n_bootstrap": 0}
    estimates.attrs |= {"gamma": 1.0, "treated": {}}
    *_, found = sections({"estimates": estimates, "subgroups": table})
    (few,) = found.tables[0].rows
    assert few[:2] == ("few", 5) and few[-2:] == (None, None)
