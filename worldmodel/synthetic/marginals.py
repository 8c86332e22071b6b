"""Recorded rows of the synthetic world beside the published means and standard deviations."""

from __future__ import annotations

import numpy as np
import pandas as pd

from worldmodel import published, schema
from worldmodel.episodes import Episodes

# Published base excess was filtered to positive values; the world aims at physiologic ones.
EXEMPT: tuple[str, ...] = ("base_excess",)


def marginals(episodes: Episodes) -> pd.DataFrame:
    """One row per feature over all valid rows, urine as log(1 + mL).

    Columns: `mean`, `published_mean`, `shift` (difference of means in published SDs), `std`,
    `published_std`, `ratio` (of the SDs), `measured` (share of rows recorded; urine is always),
    `median` (of recorded values, schema units).
    """
    valid = np.asarray(episodes.valid)
    rows = np.asarray(episodes.dynamic)[valid].astype(np.float64)
    measured = np.asarray(episodes.measured)[valid]
    measured = np.concatenate([measured, np.ones((len(rows), 1), bool)], axis=1)
    median = [
        np.median(rows[taken, i]) if (taken := measured[:, i]).any() else np.nan
        for i in range(schema.NUM_FEATURES)
    ]
    rows[:, schema.URINE] = np.log1p(rows[:, schema.URINE])
    mean, std = rows.mean(0), rows.std(0)
    return pd.DataFrame(
        {
            "mean": mean,
            "published_mean": published.MEAN,
            "shift": (mean - published.MEAN) / published.STD,
            "std": std,
            "published_std": published.STD,
            "ratio": std / published.STD,
            "measured": measured.mean(0),
            "median": median,
        },
        index=list(schema.FEATURE_NAMES),
    )
