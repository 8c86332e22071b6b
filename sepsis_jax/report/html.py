"""One self-contained HTML page: tables and pictures, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from sepsis_jax.console import DISCLAIMER, format_value
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
    rows: Sequence[Sequence[Any]]


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
    """Writes a page with its pictures inside it.

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
