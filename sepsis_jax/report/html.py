"""One self-contained HTML page of tables and figures."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sepsis_jax.console import DISCLAIMER, format_value
from sepsis_jax.report.svg import inline
from sepsis_jax.runs import JsonDict
from worldmodel.files import atomic_file


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
      title: above it.
      columns: headings.
      rows: values; numbers are shown with up to four significant digits.
      name: of its files, where it is written as files too (`report.tables`).
      data: what the files hold in numbers; the rows as they are shown if not given.
      notes: paragraphs below it.
      folded: shown when it is asked for, as where a picture says the same.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    name: str = ""
    data: pd.DataFrame | None = None
    notes: Sequence[str] = ()
    folded: bool = False

    @property
    def kinds(self) -> list[str]:
        """What stands in each column: "number" or "text"."""
        return [
            "text" if any(_is_text(row[i]) for row in self.rows) else "number"
            for i in range(len(self.columns))
        ]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _NUMBER.match(value)


_NUMBER = re.compile(r"\s*([-+<]?\s*[\d.]|-$|yes$|no$)")


class Key(NamedTuple):
    """An entry of a legend: its words, and the CSS of the sample beside them."""

    label: str
    style: str


@dataclass(frozen=True)
class Picture:
    """A figure of one or several panels, which stand side by side where there is room.

    Attributes:
      caption: below it; of a single panel the alternative text as well.
      panels: (file, alternative text); PNG, or SVG of `report.svg`.
      legend: of all panels.
    """

    caption: str
    panels: Sequence[tuple[Path, str]]
    legend: Sequence[Key] = ()

    @classmethod
    def of(cls, path: Path, caption: str) -> Picture:
        """A picture of one panel."""
        return cls(caption, ((path, caption),))


class FlowStep(NamedTuple):
    """A step on the way to a cohort, in stays."""

    reason: str
    excluded: int
    remaining: int


@dataclass(frozen=True)
class Dialogue:
    """A conversation, folded up until it is asked for.

    Attributes:
      title: what is seen of it at first.
      headline: above the messages.
      messages: (speaker, text).
    """

    title: str
    headline: str
    messages: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A part of a report: text, then the flow, pictures, tables and dialogues.

    Attributes:
      title: heading.
      text: paragraphs.
      pictures: in order.
      tables: in order.
      flow: who was left out, in order.
      dialogues: in order.
    """

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = field(default_factory=tuple)
    flow: Sequence[FlowStep] = ()
    dialogues: Sequence[Dialogue] = ()

    @property
    def anchor(self) -> str:
        """What a link within the page calls it."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


CONTENTS_FROM = 4  # sections; shorter pages need no table of contents


def write_page(
    path: str | Path, title: str, sections: Sequence[Section], lead: Sequence[str] = ()
) -> Path:
    """Writes a page with its pictures embedded; it needs nothing from anywhere else.

    Args:
      path: HTML file to write.
      title: of the page.
      sections: in order.
      lead: paragraphs before the first section.
    """
    path = Path(path)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = format_value
    numbers = itertools.count(1)
    environment.filters["embed"] = lambda panel: _embedded(panel, f"p{next(numbers)}")
    template = (files("sepsis_jax.report") / "page.html.j2").read_text()
    page = environment.from_string(template).render(
        title=title, sections=sections, lead=lead, disclaimer=DISCLAIMER,
        contents=len(sections) >= CONTENTS_FROM,
    )  # fmt: skip
    with atomic_file(path) as temporary:
        temporary.write_text(page)
    return path


def _embedded(panel: tuple[Path, str], prefix: str) -> Markup:
    path, text = panel
    if path.suffix == ".svg":
        return Markup(inline(path, prefix, text))
    data = base64.b64encode(path.read_bytes()).decode()
    return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(data, text)


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
