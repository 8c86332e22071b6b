"""Files appear whole or not at all."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from worldmodel.errors import InputError
from worldmodel.files import (
    atomic_file,
    atomic_folder,
    digest,
    digest_file,
    read_json,
    read_table,
    remove_unfinished,
    require_folder,
    write_json,
)


class StoppedError(Exception):
    pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_when_the_block_ends(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out", marker="a.txt") as folder:
        (folder / "a.txt").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a.txt").read_text() == "new"
    assert names(tmp_path / "deep") == ["out"]


def test_folder_of_the_same_kind_is_replaced_whole(tmp_path):
    for content, extra in (("old", "b.txt"), ("new", "c.txt")):
        with atomic_folder(tmp_path / "out", marker="a.txt") as folder:
            (folder / "a.txt").write_text(content)
            (folder / extra).touch()
    assert names(tmp_path / "out") == ["a.txt", "c.txt"]
    assert (tmp_path / "out" / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_failure_leaves_the_old_folder(tmp_path):
    with atomic_folder(tmp_path / "out", marker="a.txt") as folder:
        (folder / "a.txt").write_text("old")
    with pytest.raises(StoppedError), atomic_folder(tmp_path / "out", marker="a.txt") as folder:
        (folder / "a.txt").write_text("half")
        raise StoppedError
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_failure_of_the_first_write_leaves_nothing(tmp_path):
    with pytest.raises(StoppedError), atomic_folder(tmp_path / "out", marker="a.txt"):
        raise StoppedError
    assert names(tmp_path) == []


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out", marker="a.txt") as folder:
        (folder / "a.txt").touch()
    assert names(tmp_path / "out") == ["a.txt"]


def test_a_strangers_folder_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(InputError, match=r"home: exists .*another name"),
        atomic_folder(tmp_path / "home", marker="a.txt"),
    ):
        pytest.fail("the block must not begin")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(InputError, match="out: exists and is a file"),
        atomic_folder(tmp_path / "out", marker="a.txt"),
    ):
        pytest.fail("the block must not begin")
    (tmp_path / "out").unlink()


def test_file_failure_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(StoppedError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise StoppedError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_round_trips_and_refuses_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": [1, 0.5, None]})
    assert read_json(path) == {"x": [1, 0.5, None]}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == {"x": [1, 0.5, None]}
    assert names(tmp_path) == ["a.json"]


def test_unreadable_json_is_named(tmp_path):
    with pytest.raises(InputError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")
    for junk in (b"{", b"\xff\xfe\x00"):
        (tmp_path / "a.json").write_bytes(junk)
        with pytest.raises(InputError, match=r"a\.json: not readable JSON"):
            read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="not readable JSON"):
        read_json(tmp_path)


def test_digests_are_sha256_of_the_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    letters = np.frombuffer(b"abcdef", np.uint8)
    assert digest([letters[:2], letters[2:]]) == hashlib.sha256(b"abcdef").hexdigest()
    # Contents count, not the layout in memory.
    grid = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert digest([grid.T]) == digest([np.ascontiguousarray(grid.T)]) != digest([grid])


def test_a_column_that_comes_twice_is_named(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("\ufeffa,b\n1,2\n")
    assert read_table(file)[["a", "b"]].to_numpy().tolist() == [[1, 2]]
    file.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(InputError, match=r"^\S+table\.csv: column 'a' comes twice$"):
        read_table(file)


@pytest.mark.parametrize(
    ("name", "words"),
    [("none.csv", "no such file"), ("binary.csv", "unreadable"), ("a.txt", "neither .parquet nor")],
)
def test_what_is_no_table_is_refused(name, words, tmp_path):
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match=words):
        read_table(tmp_path / name)


def test_a_file_where_a_folder_is_wanted(tmp_path):
    file = tmp_path / "inner" / "file"
    file.parent.mkdir()
    file.touch()
    require_folder(file.parent, "make one")
    with pytest.raises(InputError, match=r"file: is a file; give its folder, \S+inner$"):
        require_folder(file, "make one")
    with pytest.raises(InputError, match="none: no such folder; make one"):
        require_folder(tmp_path / "none", "make one")


def test_what_a_killed_writer_left_is_removed(tmp_path):
    """A process that ends within the blocks, as by SIGKILL."""
    code = (
        "import os, pathlib, sys\n"
        "from worldmodel.files import atomic_file, atomic_folder\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "with atomic_folder(out / 'deep' / 'it') as folder, atomic_file(out / 'a.csv') as file:\n"
        "    (folder / 'weights').touch(), file.touch(), os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    kept = [tmp_path / ".notes.markdown", tmp_path / "deep" / ".hidden"]
    for path in kept:
        path.touch()
    assert len(list(tmp_path.rglob("*"))) == 6
    remove_unfinished(tmp_path)
    assert sorted(tmp_path.rglob("*")) == sorted([*kept, tmp_path / "deep"])
