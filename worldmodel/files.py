"""Files that appear whole or not at all, checksums, and PyTrees of arrays in Orbax folders.

Nothing is pickled.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from worldmodel.errors import InputError

if TYPE_CHECKING:
    import jax
    import pandas as pd

TreeT = TypeVar("TreeT")

# What ends the names of temporary folders and files, as regular expressions.
TEMPORARY_FOLDER = "[a-z0-9_]{8}"
TEMPORARY_FILE = r"\d+-tmp"


def require_folder(path: Path, remedy: str) -> None:
    """Refuses what is no folder.

    Args:
      path: that should be one.
      remedy: how to get one.

    Raises:
      InputError: it is a file, or not there.
    """
    if path.is_file():
        raise InputError(f"{path}: is a file; give its folder, {path.parent}")
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; {remedy}")


def check_table_name(path: Path) -> None:
    """Refuses a name that is neither of a CSV nor of a Parquet file."""
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"{path}: neither .parquet nor .csv; give a file of either kind")


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a CSV or Parquet file.

    Raises:
      InputError: another kind of file, an unreadable one or none, or a column comes twice, of
        which pandas would rename one.
    """
    import pandas as pd

    check_table_name(path)
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        table = pd.read_csv(path, low_memory=False)
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = Counter(next(csv.reader(file)))
    except FileNotFoundError:
        raise InputError(f"{path}: unreadable (no such file); check its name") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: unreadable ({error}); write it again") from None
    doubled = [name for name, count in header.items() if count > 1]
    if doubled:
        raise InputError(f"{path}: column {doubled[0]!r} comes twice")
    return table


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
    path = Path(os.path.abspath(path))  # "." has no name
    check_replaceable(path, marker)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        with _naming(path):
            yield temporary
            if path.exists():  # renamed first: the process may be killed during deletion
                os.replace(path, old)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


_UNFINISHED_FOLDER = re.compile(rf"\..+\.{TEMPORARY_FOLDER}(\.old)?")
UNFINISHED_FILE = re.compile(rf"\..+\.{TEMPORARY_FILE}(\.\w+)?")
"""Name of what `atomic_file` writes to."""


def remove_unfinished(folder: Path) -> None:
    """Removes what `atomic_folder` and `atomic_file` left in a folder when they were killed.

    Args:
      folder: in which nothing else writes now; folders in it are searched too.
    """
    for path in sorted(folder.rglob(".*")):
        if path.is_dir() and not path.is_symlink():
            if _UNFINISHED_FOLDER.fullmatch(path.name):
                shutil.rmtree(path)
        elif UNFINISHED_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, of the same suffix, renamed when the block ends well."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-tmp{path.suffix}")
    try:
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Gives errors of writing the name of what was to be written.

    A full disk comes without a name, and that of a temporary file tells nobody anything.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        temporary = isinstance(name, str) and (
            f"/.{path.name}." in name or f"/.{path.stem}." in name
        )
        if error.errno is None or not (name is None or temporary):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON; NaN is refused, since it is not JSON."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:  # JSON of any structure; callers check it
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


def digest(arrays: Iterable[npt.ArrayLike]) -> str:
    """SHA-256 of the contents of arrays, in order."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_arrays(folder: Path, tree: object) -> None:
    """Writes the leaves of a PyTree under the names of their paths; the folder must be new."""
    import orbax.checkpoint as ocp  # slow to import; the command line imports this module

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, named_leaves(tree))


def load_arrays(folder: Path, like: TreeT) -> TreeT:
    """The PyTree that `save_arrays` wrote.

    Args:
      folder: to read.
      like: a PyTree of the same structure whose leaves have the shapes and types expected.

    Raises:
      InputError: the folder is missing or damaged, or holds other leaves or shapes.
    """
    import jax

    # Where each process reads what it needs for itself, whoever wrote it and on which devices.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = named_leaves(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    )
    if not folder.is_dir():
        raise InputError(f"{folder}: missing; the checkpoint is incomplete")
    try:
        restored = _restore(folder, abstract)
    except InputError:
        raise
    except Exception as error:  # Orbax and its stores fail in many ways on damaged folders
        raise InputError(f"{folder}: not a readable checkpoint ({error})") from None
    tree: TreeT = jax.tree.unflatten(
        jax.tree.structure(like), [restored[name] for name in abstract]
    )
    return tree


def _restore(folder: Path, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    import jax
    import orbax.checkpoint as ocp

    # Else all processes of a job would wait for each other, though only some may read.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        metadata = checkpointer.metadata(folder)
        found = {name: tuple(leaf.shape) for name, leaf in metadata.item_metadata.tree.items()}
        wanted = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
        if found != wanted:
            name = next(n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n))
            raise InputError(
                f"{folder}: {name} has shape {found.get(name)}, expected {wanted.get(name)}; "
                "the checkpoint belongs to another model configuration"
            )
        result: dict[str, jax.Array] = checkpointer.restore(folder, abstract)
        return result


def named_leaves(tree: object) -> dict[str, Any]:
    """Leaves by their path, such as `0.gru.cells.1.weight_hidden.value`."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
