"""The list of stays to choose from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

import numpy as np
import pandas as pd

from sepsis_jax.explore.address import number
from sepsis_jax.explore.explorer import Explorer
from sepsis_jax.explore.reproduce import patients_code
from sepsis_jax.pipelines.example_futures import START_STEP, chosen_stays
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError

COLUMNS = {
    "stay_id": "stay", "split": "split", "age": "age, years", "male": "sex",
    "sofa": "SOFA", "meanbp": "MAP, mmHg", "lactate": "lactate, mmol/L",
    "highest_lactate": "highest lactate", "rows": "rows recorded", "died_90d": "by day 90",
}  # fmt: skip
"""Columns of `stay_table` with their headings."""
PER_PAGE = 25


def stay_table(episodes: Episodes) -> pd.DataFrame:
    """A row per stay: who it is, values of the first row, how long it lasts and how it ended."""
    static, dynamic = np.asarray(episodes.static), np.asarray(episodes.dynamic)
    first = {name: dynamic[:, 0, schema.INDEX[name]] for name in ("meanbp", "lactate")}
    lactate = np.where(np.asarray(episodes.valid), dynamic[..., schema.INDEX["lactate"]], 0.0)
    return pd.DataFrame(
        {
            "stay_id": np.asarray(episodes.stay_id),
            "split": np.array(schema.SPLITS)[np.asarray(episodes.split)],
            "age": static[:, 0],
            "male": static[:, 1] > 0,
            "sofa": np.asarray(episodes.sofa)[:, 0],
            **first,
            "highest_lactate": lactate.max(1),
            "rows": np.asarray(episodes.length),
            "died_90d": np.asarray(episodes.died_90d),
        }
    )


def patients_page(explorer: Explorer, query: Mapping[str, Sequence[str]]) -> dict[str, object]:
    """What the template of the list needs.

    Args:
      explorer: whose stays are listed.
      query: of the address: split, sort, falls and page.

    Raises:
      InputError: no such split, column or page.
    """
    split = (query.get("split") or ["test"])[-1]
    sort = (query.get("sort") or ["stay_id"])[-1]
    falls = (query.get("falls") or ["0"])[-1]
    if split not in ("all", *schema.SPLITS) or sort not in COLUMNS or falls not in ("0", "1"):
        raise InputError("address: no such split, column or order of stays")
    choice = {"split": split, "sort": sort, "falls": falls}
    episodes = explorer.episodes if split == "all" else explorer.episodes.of_split(split)
    table = stay_table(episodes).sort_values(sort, ascending=falls == "0", kind="stable")
    pages = max(1, math.ceil(len(table) / PER_PAGE))
    page = number("page", (query.get("page") or ["1"])[-1], most=pages)
    rows = table.iloc[max(page - 1, 0) * PER_PAGE :][:PER_PAGE].to_dict("records")

    def link(**changes: object) -> str:
        return "/?" + urlencode(choice | {"page": page} | changes)

    examples = [
        (int(np.asarray(episodes.stay_id)[row]), reason)
        for row, reason in chosen_stays(episodes).items()
    ]
    return {
        "title": "Patients",
        "columns": [
            {"name": name, "heading": heading, "sorted": name == sort,
             "link": link(sort=name, falls=int(name == sort and falls == "0"), page=1)}
            for name, heading in COLUMNS.items()
        ],
        "falls": falls == "1", "rows": rows, "splits": ("all", *schema.SPLITS), "choice": choice,
        "count": len(table), "page": page, "pages": pages,
        "before": link(page=page - 1) if page > 1 else None,
        "after": link(page=page + 1) if page < pages else None,
        "examples": [
            {"stay": stay, "reason": reason, "link": f"/patient?stay={stay}&step={START_STEP}"}
            for stay, reason in examples
        ],
        "runs": [
            {"name": name, "link": "/dialogue?" + urlencode({"run": name}),
             "count": len(run.records)}
            for name, run in explorer.runs.items()
        ],
        "code": patients_code(explorer, choice),
    }  # fmt: skip
