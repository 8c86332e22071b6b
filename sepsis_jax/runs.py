"""Runs: their folders, provenance and progress, and one run at a time in a place.

A run locks the place that it writes with a file beside it. The system lets go of the lock when
the process ends, however it ends, so that a run that was killed locks nobody out.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldmodel.errors import InputError
from worldmodel.files import (
    TEMPORARY_FILE,
    TEMPORARY_FOLDER,
    UNFINISHED_FILE,
    atomic_folder,
    check_replaceable,
    read_json,
    write_json,
)

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
    program = Path(sys.argv[0])
    module = program.parts[-2:] == ("sepsis_jax", "__main__.py")  # python -m sepsis_jax
    return {
        "command": shlex.join(["sepsis-jax" if module else program.name, *sys.argv[1:]]),
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


def write_result(out: Path, name: str, result: JsonDict) -> None:
    """Writes a JSON result as the only file of a folder, which may replace an older one.

    Raises:
      InputError: something else is in the way.
    """
    with atomic_folder(out, marker=name) as folder:
        write_json(folder / name, result)


Progress = Callable[[str, float], None]


def silent(phase: str, share: float) -> None:
    """Reports no progress."""


@contextmanager
def claimed(out: Path, *, part: str | None = None) -> Iterator[None]:
    """Keeps other runs away from a file or folder while the block runs.

    What killed runs left half-written beside it and in it is removed first. Folders that are
    made above it are removed again if nothing was written.

    Args:
      out: the file or folder to write.
      part: of runs that share a folder, the part that this one writes; None for all of it.

    Raises:
      InputError: another run writes there, or the place cannot be written.
    """
    out = Path(os.path.abspath(out))  # "." has no name
    made = _make_parent(out)
    try:
        with _locked(_beside(out, "lock"), out, shared=part is not None):
            if part is None:
                _sweep_up(out)
                yield
            else:
                with _locked(_beside(out, f"{part}.lock"), out):
                    yield
    finally:
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _beside(out: Path, suffix: str) -> Path:
    return out.parent / f".{out.name}.{suffix}"


def _make_parent(out: Path) -> list[Path]:
    """Makes the folders above `out`; returns what was missing, `out` first."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from None
    return missing


@contextmanager
def _locked(file: Path, out: Path, *, shared: bool = False) -> Iterator[None]:
    handle = _lock(file, out, shared=shared)
    try:
        yield
    finally:
        # Other holders of a shared lock keep the file.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink(missing_ok=True)
        os.close(handle)


def _lock(file: Path, out: Path, *, shared: bool) -> int:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _unwritable(out, error) from None
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InputError(
                f"{out}: another run is writing there; wait for its end, or choose another place"
            ) from None
        except OSError:  # a file system without locks
            return handle
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        os.close(handle)  # its holder removed it in between


def _sweep_up(out: Path) -> None:
    """Removes what runs that were killed left; the lock makes sure that none is at work."""
    name = re.escape(out.name)
    half = re.compile(rf"\.{name}\.(work\.)?{TEMPORARY_FOLDER}(\.old)?")
    for entry in list(out.parent.iterdir()):
        if half.fullmatch(entry.name) and entry.is_dir():
            if entry.name.endswith(".old") and not out.exists():
                entry.rename(out)  # killed between the two renames: the older one is whole
            else:
                shutil.rmtree(entry, ignore_errors=True)
    files = re.compile(rf"\.{re.escape(out.stem)}\.{TEMPORARY_FILE}{re.escape(out.suffix)}")
    stale = [entry for entry in out.parent.iterdir() if files.fullmatch(entry.name)]
    if out.is_dir():
        stale += [entry for entry in out.iterdir() if UNFINISHED_FILE.fullmatch(entry.name)]
    for entry in stale:
        if entry.is_file():
            entry.unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> InputError:
    return InputError(f"{out}: cannot be written ({error.strerror}); choose another place")
