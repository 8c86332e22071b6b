"""Folders of runs: provenance, resuming, and how jobs report progress."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldmodel.errors import InputError
from worldmodel.files import check_replaceable, read_json, write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# A JSON object: its values are of several types.
JsonDict = dict[str, Any]

MANIFEST = "manifest.json"


@contextmanager
def run_folder(
    out: Path, kind: str, request: JsonDict, *, resume: bool, keeps: Sequence[str]
) -> Iterator[None]:
    """A folder for a run, or one that holds an earlier part of the same.

    A run that is refused before it has anything worth keeping leaves no folder, and one that was
    killed before that may be begun anew, with another request too.

    Args:
      out: the folder.
      kind: what the manifest says it is.
      request: JSON of all that the results depend on.
      resume: going on is wanted.
      keeps: names in the folder, of files and folders that are worth keeping if they hold anything.

    Raises:
      InputError: the folder holds something else, another request, or a run that is not to be
        resumed.
    """
    there = out.exists()
    _begin(out, kind, request, resume=resume, empty=not _kept(out, keeps))
    try:
        yield
    except (InputError, OSError):
        if not _kept(out, keeps):
            for entry in list(out.iterdir()):
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
            if not there:
                out.rmdir()
        raise


def _kept(out: Path, keeps: Sequence[str]) -> bool:
    def filled(path: Path) -> bool:
        if path.is_dir():
            return any(path.iterdir())
        return path.exists() and path.stat().st_size > 0

    return any(filled(out / name) for name in keeps)


def _begin(out: Path, kind: str, request: JsonDict, *, resume: bool, empty: bool) -> None:
    """Writes the manifest, or compares the one that is there."""
    file = out / MANIFEST
    check_replaceable(out, MANIFEST)
    if not file.exists():
        write_json(file, {"kind": kind, **provenance(request=request)})
        return
    found = read_json(file)
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise InputError(f"{file}: not of the kind {kind!r}; choose another folder")
    if empty:
        write_json(file, {"kind": kind, **provenance(request=request)})
        return
    if found.get("request") != request:
        changed = _first_difference(found.get("request"), request)
        raise InputError(f"{out}: was begun with another {changed}; choose another folder")
    if not resume:
        raise InputError(f"{out}: holds a run; resume it, or choose another folder")


def _first_difference(found: object, wanted: JsonDict, prefix: str = "") -> str:
    for name, value in wanted.items():
        there = found.get(name) if isinstance(found, dict) else None
        if there != value:
            path = f"{prefix}{name}"
            return _first_difference(there, value, f"{path}.") if isinstance(value, dict) else path
    return prefix.rstrip(".") or "request"


def plain(options: DataclassInstance) -> JsonDict:
    """A dataclass as JSON holds it: paths as text, tuples as lists."""

    def convert(value: object) -> object:
        if isinstance(value, dict):
            return {name: convert(item) for name, item in value.items()}
        if isinstance(value, tuple | list):
            return [convert(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: convert(item) for name, item in asdict(options).items()}


_PACKAGES = ("sepsis-jax", "jax", "jaxlib", "flax", "optax", "numpy", "pandas", "duckdb")


def provenance(**extra: object) -> JsonDict:
    """A JSON-ready record to keep in a manifest, with `extra` fields added."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "revision": _revision(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        **extra,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


Progress = Callable[[str, float], None]


def silent(phase: str, share: float) -> None:
    """Reports no progress."""
