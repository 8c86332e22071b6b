"""Compiled programs that commands keep on the disk, so that later processes need not compile them.

JAX reads its settings from the environment as it is imported, so this module imports no JAX.
Whoever can write to the folder can run code as its user: it is used only if nobody else can.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import stat
import time
import warnings
from importlib.metadata import version
from pathlib import Path

FOLDER = "JAX_COMPILATION_CACHE_DIR"
MOST_BYTES = 2**30  # of one version of JAX on one kind of processor; the least used go first
_LEAST_SECONDS = 0.2  # programs that compile faster are not kept
_UNUSED = 60 * 24 * 3600.0  # seconds after which the programs of another version or machine go
_WRITING = 60.0  # seconds; nothing takes longer to be written
_PROGRAM, _LAST_USED = "-cache", "-atime"  # JAX's endings: a program, and when it was last read


def keep_compiled_programs() -> None:
    """Has JAX keep programs in the user's cache folder; call before JAX is imported.

    Does nothing where the environment names a folder (`JAX_COMPILATION_CACHE_DIR`; an empty one
    keeps nothing), or where there is none that the user alone can write.
    `JAX_ENABLE_COMPILATION_CACHE=0` has JAX keep and read nothing.
    """
    if FOLDER in os.environ:
        return
    try:
        folder = _private_folder()
    except (OSError, RuntimeError):  # no home, or nothing can be written there
        return
    if folder is None:
        return
    os.environ[FOLDER] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MOST_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(_LEAST_SECONDS))
    # A full disk or a folder that another process has locked costs time, and nothing else.
    failures = "Error (reading|writing) persistent compilation cache"
    warnings.filterwarnings("ignore", message=failures)


def cache_folder() -> Path:
    """`sepsis-jax` in the user's cache folder, `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
      RuntimeError: the user has no home.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "sepsis-jax"


def unsafe_place() -> Path | None:
    """What keeps the folder from being used: a part of it that others can write; None if nothing.

    Raises:
      RuntimeError: the user has no home.
    """
    return next((place for place in _places() if place.exists() and not _is_private(place)), None)


def machine() -> str:
    """Names the version of JAX and the instructions of the processor, which programs depend on.

    Homes are shared between machines, and a program may use what another processor lacks.
    """
    cpu = Path("/proc/cpuinfo")
    flags = re.search(r"^(flags|Features).*$", cpu.read_text(), re.M) if cpu.exists() else None
    found = f"{version('jax')} {version('jaxlib')} {flags[0] if flags else platform.platform()}"
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def _private_folder() -> Path | None:
    """The folder of this machine's programs, tidied; None where others can write to it."""
    above, _, folder = _places()
    above.parent.mkdir(parents=True, exist_ok=True)
    for place in _places():
        place.mkdir(mode=0o700, exist_ok=True)
        if not _is_private(place):
            return None
    folder.chmod(0o700)
    _drop_half_written(folder)
    os.utime(folder)
    _drop_unused(folder.parent)
    return folder


def _places() -> tuple[Path, Path, Path]:
    above = cache_folder()
    return above, above / "compiled", above / "compiled" / machine()


def _is_private(place: Path) -> bool:
    """Whether this is a folder, not a link to one, that the user has and nobody else can write."""
    found = place.lstat()
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not others


def _drop_half_written(folder: Path) -> None:
    """Removes what killed processes left: programs of which no use was noted.

    JAX would neither replace them nor, at the limit of size, get past them.
    """
    for program in folder.glob(f"*{_PROGRAM}"):
        noted = program.with_name(program.name.removesuffix(_PROGRAM) + _LAST_USED)
        if not noted.exists() and program.stat().st_mtime < time.time() - _WRITING:
            program.unlink(missing_ok=True)


def _drop_unused(folders: Path) -> None:
    for folder in folders.iterdir():
        if folder.lstat().st_mtime < time.time() - _UNUSED:
            shutil.rmtree(folder, ignore_errors=True)
