"""The folder of a sweep: one file per block, written atomically, and its summary."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sepsis_jax.runs import JsonDict
from worldmodel.errors import InputError
from worldmodel.files import atomic_file, check_replaceable, read_json, write_json
from worldmodel.simulate.sweep import Block, Grid

KIND = "sepsis-jax sweep"
MANIFEST, PARTS = "manifest.json", "parts"
_REVISION = "revision"  # recorded, not compared: it changes with the documentation too


@dataclass(frozen=True)
class Shard:
    """This host's share: the blocks whose number leaves `index` when divided by `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads "i/n".

        Raises:
          InputError: it is not two integers, the first below the second.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        shard = cls(int(found[1]), int(found[2])) if found else cls(1, 1)
        if shard.index >= shard.count:
            raise InputError(f"shard: got {text!r}, expected i/n with i from 0 to n - 1")
        return shard

    def owns(self, block: Block) -> bool:
        """Whether a block is for this host."""
        return block.number % self.count == self.index


class SweepFolder:
    """A sweep's files.

    Args:
      path: the folder.
      grid: whose blocks it holds.
    """

    def __init__(self, path: Path, grid: Grid):
        self.path, self.grid = path, grid

    def part(self, block: Block) -> Path:
        """Where a block is."""
        return self.path / PARTS / f"part-{block.number:05d}.parquet"

    def begin(self, manifest: JsonDict, shard: Shard, *, resume: bool) -> list[Block]:
        """Claims the folder, or finds it begun by the same request.

        Args:
          manifest: of the request.
          shard: this host's share.
          resume: go on with what a run of this share left.

        Returns:
          The share's blocks that are missing, or whose file is damaged.

        Raises:
          InputError: another request or something else is in the way, or, without `resume`,
            blocks of this share.
        """
        file = self.path / MANIFEST
        if not self.path.is_dir() or any(not _hidden(entry) for entry in self.path.iterdir()):
            check_replaceable(self.path, MANIFEST)  # hidden: another host begins at this moment
        own = [block for block in self.grid.blocks if shard.owns(block)]
        if file.exists():
            _compare(read_json(file), manifest, file)
            if not resume and any(self.part(block).exists() for block in own):
                raise InputError(
                    f"{self.path}: holds blocks of this sweep; resume it, or choose another folder"
                )
        else:
            write_json(file, manifest)
        (self.path / PARTS).mkdir(exist_ok=True)
        self._sweep_up(own)
        return [block for block in own if not self.holds(block)]

    def holds(self, block: Block) -> bool:
        """Whether a block is there and readable."""
        path = self.part(block)
        if not path.exists():
            return False
        try:
            rows = pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowInvalid):
            return False
        return bool(rows == block.size * len(self.grid.sections[block.section].plans))

    def missing(self) -> int:
        """Blocks that no host has written yet."""
        return sum(not self.holds(block) for block in self.grid.blocks)

    def write(self, block: Block, table: pa.Table) -> None:
        """Writes a block; the write is atomic."""
        with atomic_file(self.part(block)) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def read(self, columns: list[str]) -> Iterator[tuple[Block, pa.Table]]:
        """Blocks in order, one at a time."""
        for block in self.grid.blocks:
            yield block, pq.read_table(self.part(block), columns=columns)

    def _sweep_up(self, own: list[Block]) -> None:
        """Removes what a run that was killed left half-written."""
        names = {self.part(block).stem for block in own}
        for file in (self.path / PARTS).glob(".part-*"):
            if file.name.split(".")[1] in names:
                file.unlink(missing_ok=True)


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _compare(found: object, wanted: JsonDict, file: Path) -> None:
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise InputError(f"{file}: not of a sweep; choose another folder")
    # Sweeps of versions that had no choice have XLA's kernels.
    request = {"kernel": "xla", **found.get("request", {})}
    difference = _difference(
        {**found, "request": request, _REVISION: None}, {**wanted, _REVISION: None}
    )
    if difference:
        raise InputError(
            f"{file}: begun by another request ({difference}); repeat that one, or choose "
            "another folder"
        )


def _difference(found: object, wanted: object, path: str = "") -> str | None:
    """Where two JSON values differ first, in words; None where they do not."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            inner = f"{path}.{key}" if path else key
            difference = _difference(found.get(key), wanted.get(key), inner)
            if difference:
                return difference
        return None
    return None if found == wanted else f"{path}: {_short(found)} there, {_short(wanted)} here"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
