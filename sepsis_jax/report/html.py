"""One self-contained HTML page of tables and figures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from sepsis_jax.console import DISCLAIMER, format_value
from sepsis_jax.runs import JsonDict
from worldmodel.files import atomic_file


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
      title: above it.
      columns: headings.
      rows: values; numbers are shown with up to four significant digits.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Section:
    """A part of a report: text, then pictures, then tables.

    Attributes:
      title: heading.
      text: paragraphs.
      pictures: (PNG file, description) pairs; the description is also the alternative text.
      tables: in order.
    """

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[tuple[Path, str]] = ()
    tables: Sequence[Table] = field(default_factory=tuple)


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes a page with its pictures embedded.

    Args:
      path: HTML file to write.
      title: of the page.
      sections: in order.
    """
    path = Path(path)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["cell"] = format_value
    environment.filters["data"] = lambda file: base64.b64encode(Path(file).read_bytes()).decode()
    template = (files("sepsis_jax.report") / "page.html.j2").read_text()
    page = environment.from_string(template).render(
        title=title, sections=sections, disclaimer=DISCLAIMER
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page)
    return path


MODEL_NAMES = {"model": "world model", "last_value": "last value stays", "linear": "linear model"}
OUTCOME_NAMES = MODEL_NAMES | {"last_value": "SOFA alone"}
STATE_COLUMNS = ("", "MAE", "MAE, imputed too", "NLL", "CRPS", "90% coverage", "ventilation AUC")
OUTCOME_COLUMNS = ("", "AUROC", "AUPRC", "Brier", "ECE", "deaths")


def state_rows(metrics: JsonDict) -> list[tuple[object, ...]]:
    """The State Model beside its baselines, in the columns of `STATE_COLUMNS`."""
    keys = ("mae", "mae_all", "nll", "crps", "coverage", "ventilation_auc")
    return [
        (MODEL_NAMES[name], *(row[key] for key in keys)) for name, row in metrics["state"].items()
    ]


def outcome_rows(metrics: JsonDict) -> list[tuple[object, ...]]:
    """The Outcome Model beside its baseline, in the columns of `OUTCOME_COLUMNS`."""
    keys = ("auroc", "auprc", "brier", "ece", "prevalence")
    return [
        (f"{OUTCOME_NAMES[name]}, {when}", *(row[key] for key in keys))
        for part, when in (("outcome", "last step"), ("outcome_every_step", "every step"))
        for name, row in metrics[part].items()
    ]
