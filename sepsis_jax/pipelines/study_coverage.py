"""How often a study's intervals hold the truth, and how well its estimates rank policies.

Where the patients are synthetic every policy has a true value. Over many seeds the intervals of the
table of policies can be counted against it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from policy.registry import CLINICIAN
from sepsis_jax.pipelines.evaluation import ESTIMATORS
from sepsis_jax.pipelines.policy_values import rank_correlation

TRUE = "true"


def coverage_of(tables: Mapping[int, pd.DataFrame]) -> pd.DataFrame | None:
    """Coverage and rank correlation by estimator, of all policies but the clinician.

    The clinician made the records and is their mean; it would be easy.

    Args:
      tables: by seed, of `policy_table`.

    Returns:
      One row per estimator and verdict ("all", "trusted"): `intervals`, `covered` in percent with
      exact 95% interval over them (policies of one seed are alike, so that it is too narrow by
      somewhat), `width` (median), and for "all" the Spearman correlation with the truth over the
      policies of a seed, mean and least over seeds (`rank`, `least_rank`). None without truth.
    """
    known = {
        seed: table[(table["policy"] != CLINICIAN) & table[TRUE].notna()]
        for seed, table in tables.items()
        if TRUE in table
    }
    if not known:
        return None
    together = pd.concat(known.values())
    rows = []
    for estimator in (name for name in ESTIMATORS if name in together):
        ranks = [
            rank
            for table in known.values()
            if (rank := _rank(table[estimator].to_numpy(), table[TRUE].to_numpy())) is not None
        ]
        trusted = together[together["trust"].astype(bool)]
        for verdict, some in (("all", together), ("trusted", trusted)):
            row = {"estimator": estimator, "verdict": verdict, **_covered(some, estimator)}
            if verdict == "all" and ranks:
                row |= {"rank": float(np.mean(ranks)), "least_rank": float(np.min(ranks))}
            rows.append(row)
    return pd.DataFrame(rows)


def _covered(table: pd.DataFrame, estimator: str) -> dict[str, float]:
    low, high = table[f"{estimator}_low"], table[f"{estimator}_high"]
    asked = low.notna() & high.notna()
    count = int(asked.sum())
    if not count:
        return {"intervals": 0}
    hits = int(((low <= table[TRUE]) & (table[TRUE] <= high))[asked].sum())
    bounds = binomtest(hits, count).proportion_ci(0.95)
    return {
        "intervals": count,
        "covered": 100.0 * hits / count,
        "covered_low": 100.0 * bounds.low,
        "covered_high": 100.0 * bounds.high,
        "width": float((high - low)[asked].median()),
    }


def _rank(estimates: np.ndarray, true: np.ndarray) -> float | None:
    known = np.isfinite(estimates)
    return rank_correlation(estimates[known], true[known])
