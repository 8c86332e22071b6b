"""Cores and memory of this process, against files as the system writes them."""

import os

import pytest

from worldmodel import resources
from worldmodel.errors import InputError


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system whose files a test writes: cgroups of version 2, 8 cores, 10 kB free."""
    monkeypatch.setattr(resources, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(resources, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(resources, "_free_of_limit", lambda: iter(()))
    (tmp_path / "meminfo").write_text("MemTotal: 20 kB\nMemAvailable: 10 kB\n")
    (tmp_path / "own").write_text("0::/job/part\n")
    (tmp_path / "cgroup" / "job" / "part").mkdir(parents=True)

    def write(name, text):
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    write.own = tmp_path / "own"
    return write


def test_without_cgroups_the_machine_counts(system):
    assert resources.usable_cores() == 8
    assert resources.free_memory() == 10 * 1024


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1)],
)
def test_the_quota_of_a_group_bounds_the_cores(system, quota, cores):
    system("job/part/cpu.max", quota)
    assert resources.usable_cores() == cores


def test_a_group_above_counts_too(system):
    system("job/part/cpu.max", "400000 100000")
    system("job/cpu.max", "300000 100000")
    assert resources.usable_cores() == 3


def test_what_is_cached_is_free(system):
    system("job/part/memory.max", "9000")
    system("job/part/memory.current", "8000")
    system("job/part/memory.stat", "anon 1000\ninactive_file 3000\n")
    assert resources.free_memory() == 4000


def test_groups_of_version_1(system):
    system.own.write_text("4:memory:/job\n3:cpu,cpuacct:/job\n")
    system("memory/job/memory.limit_in_bytes", "5000")
    system("memory/job/memory.usage_in_bytes", "3000")
    system("cpu/job/cpu.cfs_quota_us", "-1")
    system("cpu/job/cpu.cfs_period_us", "100000")
    assert resources.free_memory() == 2000 and resources.usable_cores() == 8
    system("cpu/job/cpu.cfs_quota_us", "500000")
    assert resources.usable_cores() == 5


def test_what_does_not_fit_is_refused_with_what_fits():
    resources.require_memory("samples", 100, 10.0, free=1000)
    with pytest.raises(InputError, match=r"samples: got 101, .* at most 100 fit"):
        resources.require_memory("samples", 101, 10.0, free=1000)


def test_this_machine_answers():
    assert 1 <= resources.usable_cores() <= (os.cpu_count() or 1)
    free = resources.free_memory()
    assert free is None or free > 0
