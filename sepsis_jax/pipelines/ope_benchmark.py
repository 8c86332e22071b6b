"""The truth benchmark of off-policy evaluation, from settings to tables and pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pandas as pd

from sepsis_jax.ope.benchmark import (
    BenchmarkOptions,
    icu_sepsis_pools,
    run_pool,
    synthetic_pools,
)
from sepsis_jax.ope.scores import SETTING, accuracy, ranking, summary
from sepsis_jax.report.figures import accuracy_figure
from sepsis_jax.report.html import Section, Table, write_page
from sepsis_jax.runs import Progress, provenance, silent
from worldmodel.files import atomic_folder, write_json

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
    makers = []
    if options.world != "icu_sepsis":
        makers.append((synthetic_pools, len(set(options.confounding))))
    if options.world != "synthetic":
        makers.append((icu_sepsis_pools, len(set(options.horizons))))
    pools = -(-options.repeats // DATA_SETS_AT_ONCE)
    total, done, parts = pools * sum(count for _, count in makers), 0, []
    for maker, _ in makers:
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


def _pictures(scores: pd.DataFrame, folder: Path) -> list[tuple[Path, str]]:
    """RMSE and coverage by size and by distance, one picture per world and dial."""
    pictures = []
    for (world, confounding, horizon), group in scores.groupby(SETTING[:3], sort=False):
        label = f"{world}, horizon {horizon}, confounding {confounding:g}"
        path = folder / f"{world}_{horizon}_{confounding:g}.png"
        accuracy_figure(group, SHOWN, label, path)
        pictures.append((path, f"RMSE and coverage: {label}"))
    return pictures


def _page(
    path: Path,
    short: pd.DataFrame,
    scores: pd.DataFrame,
    ranks: pd.DataFrame,
    pictures: list[tuple[Path, str]],
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
