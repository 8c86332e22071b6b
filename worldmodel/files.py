"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.errors import InputError


def check_replaceable(path: Path, marker: str | None) -> None:
    """Makes sure that writing a folder destroys nothing but an older one of its kind.

    Args:
      path: folder to write.
      marker: a name that every folder of this kind holds; None if none may be replaced.

    Raises:
      InputError: a file, or a folder of another kind, is in the way.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: exists and is a file; choose another name")
    if path.exists() and any(path.iterdir()) and not (marker and (path / marker).exists()):
        raise InputError(
            f"{path}: exists and is not a folder that this would replace; choose another name"
        )


@contextmanager
def atomic_folder(path: Path, *, marker: str | None = None) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well.

    Args:
      path: folder to write.
      marker: as for `check_replaceable`.

    Raises:
      InputError: a file, or a folder of another kind, is in the way.
    """
    check_replaceable(path, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        if path.exists():  # aside, not away: deleting takes time, in which we may be killed
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, of the same suffix, renamed when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON; NaN is refused, since it is not JSON."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable JSON ({error})") from None


def digest(arrays: Iterable[Any]) -> str:
    """SHA-256 of the contents of arrays, in order."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
