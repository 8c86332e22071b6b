"""What a command writes: one run at a time, in a place that can be written, without leftovers.

A run locks the place that it writes with a file beside it. The system lets go of the lock when
the process ends, however it ends, so that a run that was killed locks nobody out.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from worldmodel.errors import InputError
from worldmodel.files import TEMPORARY_FILE, TEMPORARY_FOLDER


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
        inside = re.compile(rf"\..+\.{TEMPORARY_FILE}(\.\w+)?")
        stale += [entry for entry in out.iterdir() if inside.fullmatch(entry.name)]
    for entry in stale:
        if entry.is_file():
            entry.unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> InputError:
    return InputError(f"{out}: cannot be written ({error.strerror}); choose another place")
