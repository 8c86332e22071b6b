"""The truth benchmark of off-policy evaluation, from settings to tables and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from sepsis_jax.ope.benchmark import (
    SETTING,
    BenchmarkOptions,
    accuracy,
    icu_sepsis_pools,
    ranking,
    run_pool,
    summary,
    synthetic_pools,
)
from sepsis_jax.provenance import provenance
from sepsis_jax.report.html import Section, Table, write_page
from worldmodel.files import atomic_folder, write_json

MARKER = "runs.csv"
SHOWN = ("on_policy", "wis", "wpdis", "dm", "dr", "wdr", "magic", "drl")


def run_benchmark(
    out: str | Path,
    options: BenchmarkOptions,
    *,
    progress: Callable[[str, float], None] | None = None,
) -> pd.DataFrame:
    """Runs the benchmark and writes runs.csv, scores.csv, ranking.csv, summary.csv, report.html.

    Args:
      out: folder to write.
      options: settings.
      progress: called with (phase, share done).

    Returns:
      One row per world and estimator.
    """
    report = progress or (lambda phase, share: None)
    makers = []
    if options.world != "icu_sepsis":
        makers.append((synthetic_pools, len(set(options.confounding))))
    if options.world != "synthetic":
        makers.append((icu_sepsis_pools, len(set(options.horizons))))
    total, done, parts = sum(count for _, count in makers), 0, []
    for maker, _ in makers:
        report("worlds and true values", done / total)
        for pool in maker(options):
            label = f"{pool.setting['world']}, horizon {pool.setting['horizon']}"

            def tell(share: float, done: int = done, label: str = label) -> None:
                report(label, (done + share) / total)

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
    from sepsis_jax.report.figures import COLORS, plt

    pictures = []
    for keys, group in scores.groupby(SETTING[:3], sort=False):
        world, confounding, horizon = keys
        figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex="col")
        # The middle distance over sizes, the largest size over distances.
        middle = sorted(group["distance"].unique())[len(group["distance"].unique()) // 2]
        views = (
            ("size", group[group["distance"] == middle], f"distance {middle:g}"),
            ("distance", group[group["size"] == group["size"].max()],
             f"{group['size'].max()} stays"),
        )  # fmt: skip
        for column, (axis_name, rows, title) in enumerate(views):
            for i, name in enumerate(SHOWN):
                line = rows[rows["estimator"] == name].sort_values(axis_name)
                style = {"color": COLORS[i % len(COLORS)], "ls": "-" if i < len(COLORS) else "--"}
                axes[0, column].plot(line[axis_name], line["rmse"], "o", label=name, **style)
                axes[1, column].plot(line[axis_name], line["coverage"], "o", **style)
            axes[0, column].set(title=title, ylabel="RMSE", xscale="log", yscale="log")
            axes[1, column].axhline(0.95, color="grey", lw=0.8, ls=":")
            axes[1, column].set(xlabel=axis_name, ylabel="coverage of 95% intervals", ylim=(0, 1))
        axes[0, 0].legend(fontsize=8, ncols=2, frameon=False)
        label = f"{world}, horizon {horizon}, confounding {confounding:g}"
        figure.suptitle(label)
        figure.tight_layout()
        path = folder / f"{world}_{horizon}_{confounding:g}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
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
                                          "regret@1 as a share of the range of true values.",),
                    tables=(table("", ranks),)),
        ],
    )  # fmt: skip
