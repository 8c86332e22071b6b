"""The configurations that ship with the software, written where a project can change them."""

from __future__ import annotations

import shutil
from pathlib import Path

from worldmodel.errors import InputError

SHIPPED = Path(__file__).resolve().parents[1] / "configs"


def write_configurations(folder: Path) -> list[str]:
    """Copies all shipped configurations and templates to `configs` in a folder.

    Args:
      folder: made if it is not there.

    Returns:
      Names of the files, relative to the folder.

    Raises:
      InputError: it has a `configs` already.
    """
    to = folder / "configs"
    if to.exists():
        raise InputError(f"{to}: exists, and may hold changes of yours; choose another folder")
    shutil.copytree(SHIPPED, to, ignore=shutil.ignore_patterns("__pycache__"))
    return sorted(str(file.relative_to(folder)) for file in to.rglob("*") if file.is_file())
