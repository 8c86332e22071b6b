"""What a benchmark leaves: bench.json, bench.csv and plots of scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from sepsis_jax.report.figures import COLORS
from worldmodel.files import atomic_folder, write_json

RESULT = "bench.json"
_MARKERS = "osD^vP*X"


def write_bench(result: dict[str, Any], out: Path) -> None:
    """Writes a result of `run_bench` with what it was made on.

    Raises:
      InputError: something else is in the way.
    """
    with atomic_folder(out, marker=RESULT) as folder:
        write_json(folder / RESULT, result)
        table = pd.DataFrame(result["table"])
        table.to_csv(folder / "bench.csv", index=False)
        if len(table):
            scaling_figure(table, result, folder / "scaling.png")


def scaling_figure(table: pd.DataFrame, result: dict[str, Any], path: Path) -> None:
    """Branch-steps per second against branches, log-log, with the range of the repeats.

    Args:
      table: rows of `run_bench`'s table.
      result: the whole result, for the bound and the title.
      path: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(8, 5))
    for index, (name, rows) in enumerate(table.groupby("name", sort=False)):
        rows = rows.sort_values("branches")
        color = COLORS[index % len(COLORS)]
        style = "-" if index < len(COLORS) else "--"
        axis.fill_between(rows["branches"], rows["min"], rows["max"], color=color, alpha=0.15, lw=0)
        axis.plot(
            rows["branches"], rows["median"], style, marker=_MARKERS[index % len(_MARKERS)],
            color=color, ms=5, lw=1.5, label=name,
        )  # fmt: skip
    bound = result["bound"]["branch_steps_per_second"]
    branches = sorted(int(key) for key in bound)
    axis.plot(
        branches, [bound[str(key)]["median"] for key in branches], color="black", ls=":",
        label="bound: products alone, float32",
    )  # fmt: skip
    axis.set(
        xscale="log", yscale="log", xlabel="branches", ylabel="branch-steps per second",
        title=f"{result['hardware']['processor']}, {result['hardware']['cores']} cores"
        if result["hardware"]["backend"] == "cpu" else result["hardware"]["device"],
    )  # fmt: skip
    axis.grid(which="both", lw=0.3, alpha=0.5)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
