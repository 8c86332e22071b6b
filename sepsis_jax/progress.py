"""How jobs tell of their progress: `progress(phase, share done)`."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]


def silent(phase: str, share: float) -> None:
    """Tells nobody."""
