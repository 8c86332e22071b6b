"""What this process may use: cores and memory, within its cgroup and its limits."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from worldmodel.errors import InputError

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_MEMORY = Path("/proc/meminfo")
_UNLIMITED = 1 << 60  # bytes; cgroups of version 1 write such a number for no limit


def usable_cores() -> int:
    """Cores that this process may use, at least 1.

    The cores that it is bound to, and no more than the quota of its cgroups (rounded up), which
    containers set; `os.cpu_count` knows neither.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(min([cores, *(math.ceil(quota) for quota in _cpu_quotas())]), 1)


def free_memory() -> int | None:
    """Bytes that this process can still allocate; None where the system does not tell.

    The least of what the machine, its cgroups and its limit on address space leave.
    """
    return min([*_free_of_machine(), *_free_of_cgroups(), *_free_of_limit()], default=None)


def require_memory(setting: str, count: int, bytes_each: float, *, free: int | None = None) -> None:
    """Refuses a number of things that memory does not hold, before any of it is allocated.

    Args:
      setting: that asks for the number, as the message names it.
      count: how many.
      bytes_each: about what one takes.
      free: bytes at hand; None for those of this machine.

    Raises:
      InputError: they do not fit; the message gives the number that does.
    """
    free = free_memory() if free is None else free
    if free is None or count * bytes_each <= free:
        return
    raise InputError(
        f"{setting}: got {count}, which need about {_gigabytes(count * bytes_each)} of memory; "
        f"{_gigabytes(free)} are free, so at most {int(free / bytes_each)} fit"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's cgroups with a controller, and whether they are of version 2."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controller if controllers else _CGROUPS
        folder = root / own.lstrip("/")
        # Within a container the path may be the host's, which is not there: the root is ours.
        for group in (folder, *folder.parents):
            if group.is_relative_to(root) and group.is_dir():
                yield group, not controllers


def _cpu_quotas() -> Iterator[float]:
    """Cores by quota, of each cgroup that sets one."""
    for group, second in _groups("cpu"):
        if second:
            values = _words(group / "cpu.max")
        else:
            values = [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
        if len(values) == 2 and all(value.isdigit() and int(value) > 0 for value in values):
            yield int(values[0]) / int(values[1])


def _free_of_cgroups() -> Iterator[int]:
    for group, second in _groups("memory"):
        names = ("max", "current") if second else ("limit_in_bytes", "usage_in_bytes")
        values = [word for name in names for word in _words(group / f"memory.{name}")]
        if len(values) == 2 and all(map(str.isdigit, values)) and int(values[0]) < _UNLIMITED:
            words = _words(group / "memory.stat")
            counts = dict(zip(words[::2], words[1::2], strict=False))
            cached = counts.get("inactive_file" if second else "total_inactive_file", "0")
            yield max(int(values[0]) - int(values[1]) + int(cached), 0)


def _free_of_machine() -> Iterator[int]:
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return
    yield from (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _free_of_limit() -> Iterator[int]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _words(Path("/proc/self/statm"))
    if soft != resource.RLIM_INFINITY and used:
        yield max(soft - int(used[0]) * resource.getpagesize(), 0)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
