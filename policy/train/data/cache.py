"""Cache of tokenised dialogues on disk, memory-mapped when read.

The name of a file is a digest of all that its contents depend on: the tokenizer, the source, the
settings and the code. If one of them changes, a new file is made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

import policy
import worldmodel
from policy.train.data.packing import Dialogue
from worldmodel.errors import InputError
from worldmodel.files import atomic_file, digest_file

BATCH = 1024
"""Dialogues per record batch, and so in memory while a file is written."""

_SCHEMA = pa.schema([("ids", pa.large_list(pa.int32())), ("own", pa.large_list(pa.uint8()))])
_KEY = b"sepsis-jax dialogues"
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.jinja", "special_tokens*", "added_tokens*")


def cached(
    folder: str | Path,
    make: Callable[[], Iterable[Dialogue]],
    *,
    tokenizer: str | Path,
    source: str,
    settings: object,
) -> CachedDialogues:
    """Dialogues from their file, which is made first where there is none.

    Args:
      folder: of such files; those that are no longer of use may be deleted at any time.
      make: the dialogues, in an order that is the same every time.
      tokenizer: folder of the tokenizer that `make` uses.
      source: says what the dialogues are made from, such as a digest of episodes.
      settings: all else that matters to `make`: a dataclass, or what JSON can hold.

    Raises:
      InputError: the tokenizer's folder holds none, there is no dialogue, the settings are not
        JSON, or the file is damaged.
    """
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = dataclasses.asdict(settings)
    depends = {
        "tokenizer": tokenizer_digest(tokenizer),
        "source": source,
        "settings": settings,
        "code": _code(),
    }
    try:
        key = json.dumps(depends, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"settings: cannot be written as JSON ({error})") from None
    path = Path(folder) / f"dialogues-{hashlib.sha256(key.encode()).hexdigest()[:20]}.arrow"
    if not path.exists():
        _write(path, make(), key)
    return CachedDialogues(path, key)


def tokenizer_digest(folder: str | Path) -> str:
    """SHA-256 of the files that a tokenizer and its chat template are made of.

    Raises:
      InputError: there is none.
    """
    found = {file for pattern in _TOKENIZER for file in Path(folder).glob(pattern)}
    if not found:
        raise InputError(f"{folder}: holds no tokenizer; give the folder of a model")
    return _digest(Path(folder), found)


class CachedDialogues(Sequence[Dialogue]):
    """Dialogues of a file, mapped into memory; arrays are views that cannot be written to.

    Args:
      path: the file.
      key: what its contents must depend on; not looked at if not given.

    Raises:
      InputError: the file is damaged, or depends on something else.
    """

    def __init__(self, path: str | Path, key: str | None = None):
        self.path = Path(path)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            found = (reader.schema.metadata or {}).get(_KEY)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: not readable ({error}); delete it") from None
        if found is None or (key is not None and found.decode() != key):
            raise InputError(f"{path}: made from something else than its name says; delete it")
        self._ids, self._own = ([batch.column(c) for batch in batches] for c in (0, 1))
        ends = [column.offsets.to_numpy() for column in self._ids]
        self.lengths: np.ndarray = np.concatenate([np.diff(one) for one in ends])  # [N] tokens

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Dialogue: ...
    @overload
    def __getitem__(self, index: slice) -> list[Dialogue]: ...
    def __getitem__(self, index: int | slice) -> Dialogue | list[Dialogue]:
        """A dialogue, or a list of some."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(index)
        batch, row = divmod(place, BATCH)
        ids, own = (
            column[batch].slice(row, 1).flatten().to_numpy() for column in (self._ids, self._own)
        )
        return Dialogue(ids, own.view(bool))


def _write(path: Path, dialogues: Iterable[Dialogue], key: str) -> None:
    waiting = iter(dialogues)
    schema = _SCHEMA.with_metadata({_KEY: key.encode()})
    written = 0
    with atomic_file(path) as temporary, pa.ipc.new_file(temporary, schema) as writer:
        while part := list(islice(waiting, BATCH)):
            ends = np.cumsum([0, *map(len, part)], dtype=np.int64)
            leaves = (
                np.concatenate([one.ids for one in part]).astype(np.int32),
                np.concatenate([one.own for one in part]).astype(np.uint8),
            )
            columns = [pa.LargeListArray.from_arrays(ends, leaf) for leaf in leaves]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            written += len(part)
        if not written:
            raise InputError(f"{path}: there is no dialogue to write")


def _code() -> str:
    """Digest of all our code and templates below training; too much rather than too little."""
    folders = [Path(str(package.__file__)).parent for package in (policy, worldmodel)]
    return "".join(
        _digest(folder, {*folder.rglob("*.py"), *folder.rglob("*.j2")}) for folder in folders
    )


def _digest(folder: Path, files: Iterable[Path]) -> str:
    names: Mapping[str, str] = {
        file.relative_to(folder).as_posix(): digest_file(file) for file in files
    }
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()
