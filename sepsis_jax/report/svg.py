"""Figures as SVG whose ink is the page's: legible in light and dark, and the same bytes each time.

Figures are drawn with stand-in colours, which become CSS variables with the light theme's colour
as what they are where there is no page around them. Text stays text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from worldmodel.files import atomic_file

INK, NOTE, LINE, PAGE = "#010203", "#040506", "#070809", "#0a0b0c"
_BLUE = "#0072b2"  # the darkest of the house's colours, lighter on a dark ground
_THEME = {
    INK: "var(--ink, #1b1f24)",
    NOTE: "var(--note, #57606a)",
    LINE: "var(--line, #d8dee4)",
    PAGE: "var(--page, #fff)",
    _BLUE: f"var(--blue, {_BLUE})",
}
_STYLE: dict[str, str | float | bool] = {
    "font.size": 9.0, "axes.titlesize": 9.0, "axes.labelsize": 8.5, "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0, "legend.fontsize": 8.0,
    "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.edgecolor": NOTE,
    "xtick.color": NOTE, "ytick.color": NOTE, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "grid.color": LINE, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False,
    "svg.fonttype": "none", "svg.hashsalt": "sepsis-jax",
}  # fmt: skip
_FONT = re.compile(r"font-family: [^;\"]*|(?<=px )'DejaVu Sans'[^;\"]*")


@contextmanager
def themed() -> Iterator[None]:
    """Draws in stand-in colours, on no ground."""
    with plt.style.context(_STYLE):
        yield


def css(color: str) -> str:
    """A colour of a figure as the page around it says it."""
    return _THEME.get(color.lower(), color)


def save_svg(figure: Figure, path: Path) -> None:
    """Writes a figure that was drawn `themed`, and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        with plt.style.context(_STYLE):
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
        text = temporary.read_text()
        for stand_in, variable in _THEME.items():
            text = text.replace(stand_in, variable)
        temporary.write_text(_FONT.sub(_family, text))
    plt.close(figure)


def _family(found: re.Match[str]) -> str:
    """The reader's own font, in both ways that matplotlib writes one."""
    family = "system-ui, sans-serif"
    return f"font-family: {family}" if found.group().startswith("font-family") else family


def inline(path: Path, prefix: str, label: str) -> str:
    """An SVG file as an element of a page.

    Args:
      path: that `save_svg` wrote.
      prefix: of its ids, which a page must hold once.
      label: for those who do not see it.
    """
    text = path.read_text()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-")
    opening = re.match(r"<svg[^>]*>", text)
    assert opening is not None
    box = re.search(r'viewBox="[^"]+"', opening.group())
    width = re.search(r'width="([\d.]+)pt"', opening.group())
    assert box is not None and width is not None
    head = (
        f'<svg {box.group()} role="img" aria-label="{html.escape(label)}" '
        f'style="width:{float(width.group(1)) * 4 / 3:.0f}px">'
    )
    return head + text[opening.end() :].strip()
