"""Compiled programs are kept in a folder of the user's own, bounded, and give the same numbers."""

import os
import subprocess
import sys
import time
import warnings

import pytest

from sepsis_jax import compiled_programs
from sepsis_jax.compiled_programs import (
    FOLDER,
    keep_compiled_programs,
    machine,
    unsafe_place,
)

SETTINGS = (
    FOLDER,
    "JAX_COMPILATION_CACHE_MAX_SIZE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder, with nothing said about JAX's; the environment is restored afterwards."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # remembered, so that what is set below is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        yield tmp_path / "cache" / "sepsis-jax"


def kept():
    keep_compiled_programs()
    return os.environ.get(FOLDER)


def test_a_private_folder_of_bounded_size(home):
    folder = home / "compiled" / machine()
    assert kept() == str(folder)
    for place in (home, folder.parent, folder):
        assert place.stat().st_mode & 0o777 == 0o700
    assert int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) == compiled_programs.MOST_BYTES


@pytest.mark.parametrize("named", ["", "/elsewhere"])
def test_what_the_environment_says_is_left_alone(home, monkeypatch, named):
    monkeypatch.setenv(FOLDER, named)
    assert kept() == named
    assert not home.exists()
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ


@pytest.mark.parametrize("place", [".", "compiled", "compiled/own"])
def test_a_folder_that_others_can_write_is_not_used(home, place, monkeypatch):
    monkeypatch.setattr(compiled_programs, "machine", lambda: "own")
    (home / "compiled" / "own").mkdir(parents=True)
    assert unsafe_place() is None
    (home / place).chmod(0o770)
    assert kept() is None
    assert unsafe_place() == home / place


def test_neither_is_a_link_nor_anothers_folder(home, tmp_path, monkeypatch):
    home.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (home / "compiled").symlink_to(tmp_path / "elsewhere")
    assert kept() is None
    (home / "compiled").unlink()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert kept() is None


def test_nothing_is_kept_where_nothing_can_be_written(home, monkeypatch):
    home.parent.write_text("a file is in the way")
    assert kept() is None


def test_what_killed_processes_and_older_versions_left_goes(home):
    folder = home / "compiled" / machine()
    kept()
    old = time.time() - 1e7
    for name, at in (("half-cache", old), ("begun-cache", None), ("whole-cache", old)):
        (folder / name).write_bytes(b"program")
        os.utime(folder / name, None if at is None else (at, at))
    (folder / "whole-atime").write_bytes(b"now")
    before = folder.with_name("of-another-version")
    before.mkdir()
    (before / "x-cache").write_bytes(b"program")
    os.utime(before, (old, old))
    del os.environ[FOLDER]
    kept()
    assert {path.name for path in folder.iterdir()} == {"begun-cache", "whole-cache", "whole-atime"}
    assert not before.exists()


PROGRAM = """
from sepsis_jax.compiled_programs import keep_compiled_programs
keep_compiled_programs()
import jax
import jax.numpy as jnp
x = jax.random.normal(jax.random.key(0), (64, 64))
print(jax.jit(lambda x: jnp.tanh(x @ x).sum(0))(x).tobytes().hex())
"""


def test_a_program_that_was_read_gives_the_same_bits_without_a_word(home, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    runs = [
        subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
        for _ in range(2)
    ]
    assert runs[0].returncode == 0 and runs[0].stdout == runs[1].stdout
    assert runs[0].stderr == runs[1].stderr == ""
    programs = list((home / "compiled" / machine()).glob("jit__lambda-*-cache"))
    assert len(programs) == 1
