"""The truth benchmark of off-policy evaluation, from settings to scores, tables and pictures.

Every score has its Monte Carlo error over data sets.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from sepsis_jax.ope.benchmark import (
    BenchmarkOptions,
    gumbel_max_pools,
    icu_sepsis_pools,
    run_pool,
    synthetic_pools,
)
from sepsis_jax.report.figures import accuracy_figure
from sepsis_jax.report.html import Picture, Section, Table, write_page
from sepsis_jax.runs import Progress, provenance, silent
from worldmodel.files import atomic_folder, check_replaceable, write_json

MARKER = "runs.csv"
DATA_SETS_AT_ONCE = 25  # of 1,000 stays and 7 policies: 0.4 GB
SHOWN = ("on_policy", "wis", "wpdis", "dm", "dr", "wdr", "magic", "drl")


def run_benchmark(
    out: str | Path,
    options: BenchmarkOptions,
    *,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Runs the benchmark and writes runs.csv, scores.csv, ranking.csv, summary.csv, report.html.

    Args:
      out: folder to write.
      options: settings.
      progress: called with (phase, share done).

    Returns:
      One row per world and estimator.
    """
    check_replaceable(Path(out), MARKER)
    horizons = len(set(options.horizons))
    makers = {
        "synthetic": (synthetic_pools, len(set(options.confounding))),
        "icu_sepsis": (icu_sepsis_pools, horizons),
        "gumbel_max": (gumbel_max_pools, horizons * len({d > 0 for d in options.confounding})),
    }
    chosen = [makers[name] for name in makers if options.world in (name, "all")]
    pools = -(-options.repeats // DATA_SETS_AT_ONCE)
    total, done, parts = pools * sum(count for _, count in chosen), 0, []
    for maker, _ in chosen:
        progress("worlds and true values", done / total)
        for pool in maker(options, DATA_SETS_AT_ONCE):
            label = f"{pool.setting['world']}, horizon {pool.setting['horizon']}"

            def tell(share: float, done: int = done, label: str = label) -> None:
                progress(label, (done + share) / total)

            parts.append(run_pool(pool, options, tell))
            done += 1
    runs = pd.concat(parts, ignore_index=True)
    scores, ranks, short = accuracy(runs), ranking(runs), summary(runs)
    with atomic_folder(Path(out), marker=MARKER) as folder:
        for name, table in (
            ("runs", runs), ("scores", scores), ("ranking", ranks), ("summary", short)
        ):  # fmt: skip
            table.to_csv(folder / f"{name}.csv", index=False)
        pictures = _pictures(scores, folder)
        write_json(folder / "manifest.json", provenance(options=asdict(options)))
        _page(folder / "report.html", short, scores, ranks, pictures)
    return short


def _pictures(scores: pd.DataFrame, folder: Path) -> list[Picture]:
    """RMSE and coverage by size and by distance, one picture per world and dial."""
    pictures = []
    for (world, confounding, horizon), group in scores.groupby(SETTING[:3], sort=False):
        label = f"{world}, horizon {horizon}, confounding {confounding:g}"
        path = folder / f"{world}_{horizon}_{confounding:g}.png"
        accuracy_figure(group, SHOWN, label, path)
        pictures.append(Picture.of(path, f"RMSE and coverage: {label}"))
    return pictures


def _page(
    path: Path,
    short: pd.DataFrame,
    scores: pd.DataFrame,
    ranks: pd.DataFrame,
    pictures: list[Picture],
) -> None:
    def table(title: str, frame: pd.DataFrame) -> Table:
        return Table(title, list(frame.columns), list(frame.itertuples(index=False)))

    write_page(
        path,
        "Off-policy evaluation beside the truth",
        [
            Section("Summary", ("Means over settings without confounding.",),
                    tables=(table("", short),)),
            Section("Accuracy", ("Coverage is of 95% intervals; trusted is the share of data sets "
                                 "in which no diagnostic spoke against the estimate.",),
                    pictures=pictures, tables=(table("", scores),)),
            Section("Choosing a policy", ("Spearman rank correlation with the true values, and "
                                          "regret@1 as a share of the range of true values; _se "
                                          "are standard errors over data sets.",),
                    tables=(table("", ranks),)),
        ],
    )  # fmt: skip


SETTING = ["world", "confounding", "horizon", "size"]
_ACCURACY = ("bias", "rmse", "coverage")
_RANKING = ("rank", "regret")


def accuracy(runs: pd.DataFrame) -> pd.DataFrame:
    """Bias, RMSE, coverage and share trusted by setting, distance and estimator.

    Args:
      runs: from `sepsis_jax.ope.benchmark.run_pool`.

    Returns:
      One row per setting, distance and estimator; `*_se` are standard errors over data sets.
    """
    by = [*SETTING, "distance", "estimator"]
    table = _over_data_sets(_parts(runs), by, _ACCURACY)
    others = runs.assign(width=runs["high"] - runs["low"], trusted=runs["trust"].astype(float))
    others = others.groupby(by, sort=False).agg(
        width=("width", "median"), ess=("ess", "median"), trusted=("trusted", "mean")
    )
    return table.join(others, on=by)


def ranking(runs: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation and regret@1 of the choice among all policies, by setting and estimator.

    Regret@1 is (best true value - true value of the policy ranked first) / (best - worst true
    value), the convention of DOPE (Fu et al. 2021); 0 is a perfect choice, 1 the worst.
    """
    return _over_data_sets(_ranks(runs), [*SETTING, "estimator"], _RANKING)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per world and estimator: means over all settings without confounding."""
    clean = runs[runs["confounding"] == 0]
    by = ["world", "estimator"]
    table = _over_data_sets(_parts(clean), by, _ACCURACY)
    ranks = _over_data_sets(_ranks(clean), by, _RANKING).set_index(by)
    names = {"rank": "rank_correlation", "regret": "regret_at_1"}
    names |= {f"{old}_se": f"{new}_se" for old, new in names.items()}
    return table.join(ranks.rename(columns=names), on=by)


def _parts(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with what each adds to every score, so that a score is a mean of them.

    RMSE m = sqrt(mean e^2) is linearised: m + (e^2 - m^2) / (2 m), whose mean is m.
    """
    error = runs["estimate"] - runs["truth"]
    runs = runs.assign(bias=error, square=error**2)
    by = [runs[name] for name in (*SETTING, "distance", "estimator")]
    rmse = runs.groupby(by, sort=False)["square"].transform("mean") ** 0.5
    slope = 1 / (2 * rmse.where(rmse > 0, 1.0))
    covered = (runs["low"] <= runs["truth"]) & (runs["truth"] <= runs["high"])
    return runs.assign(
        rmse=rmse + (runs["square"] - rmse**2) * slope, coverage=covered.astype(float)
    )


def _ranks(runs: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation and regret of every data set whose estimates are all defined."""
    return pd.concat([_ranks_of(group) for _, group in runs.groupby("world", sort=False)])


def _ranks_of(runs: pd.DataFrame) -> pd.DataFrame:
    """The same where all data sets have the same policies."""
    by = [*SETTING, "repeat", "estimator"]
    wide = runs.set_index([*by, "policy"])[["estimate", "truth"]].unstack("policy")
    wide = wide[np.isfinite(wide["estimate"]).all(axis=1)]
    estimate, truth = wide["estimate"].to_numpy(), wide["truth"].to_numpy()
    # An estimator that cannot tell policies apart ranks them by chance.
    best = np.isclose(estimate, estimate.max(1, keepdims=True), rtol=0, atol=1e-6)
    chosen = (best * truth).sum(1) / best.sum(1)
    ranks = [rankdata(values, axis=1) for values in (estimate, truth)]
    x, y = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    scale = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    flat = np.ptp(estimate, axis=1) < 1e-6
    table = wide.index.to_frame(index=False)
    table["rank"] = np.where(flat, 0.0, (x * y).sum(1) / np.where(scale > 0, scale, 1.0))
    table["regret"] = (truth.max(1) - chosen) / np.ptp(truth, axis=1)
    return table


def _over_data_sets(parts: pd.DataFrame, by: list[str], names: tuple[str, ...]) -> pd.DataFrame:
    """Means of scores with standard errors; a data set counts once, whatever it holds."""
    each = parts.groupby([*by, "repeat"], sort=False)[list(names)].mean()
    groups = each.groupby(level=by, sort=False)
    table = groups.mean()
    error = groups.sem()
    for name in names:
        table[f"{name}_se"] = error[name]
    return table.reset_index()
