"""Makes a large data set in the layout of MIMIC-IV out of a small one, to measure scale.

Every copy shifts patients, hospital stays, ICU stays and specimens to fresh numbers, and all its
times by up to four hours, so that no two copies are alike. Clinical content is repeated: the
result is for timing only.

Example, 3,000 patients from the open demo (100 patients):

    python scripts/replicate_mimic.py --data mimic-iv-demo --out runs/big --copies 30
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import duckdb

from sepsis_jax.cohort.source import TABLES, attach_source
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder

# Each kind of identifier of MIMIC-IV spans less than this; 200 copies still fit 32 bits.
STRIDES = {
    "subject_id": 10_000_000,
    "hadm_id": 10_000_000,
    "stay_id": 10_000_000,
    "specimen_id": 100_000_000,
    "micro_specimen_id": 100_000_000,
}
MAX_COPIES = 200
MAX_JITTER_MINUTES = 240
WRITERS = {
    "parquet": ("parquet", "FORMAT parquet, COMPRESSION zstd"),
    "csv.gz": ("csv.gz", "FORMAT csv, HEADER, COMPRESSION gzip"),
    "csv": ("csv", "FORMAT csv, HEADER"),
}


def replicate(data: Path, out: Path, copies: int, form: str, threads: int | None) -> None:
    """Writes `copies` copies of the tables that a cohort needs, with all their columns."""
    suffix, writer = WRITERS[form]
    connection = duckdb.connect(config={"preserve_insertion_order": False})
    if threads:
        connection.execute(f"SET threads = {threads}")
    tables = attach_source(connection, data)
    with atomic_folder(out) as folder:
        for module, names in TABLES.items():
            (folder / module).mkdir()
            for name in names:
                started = time.monotonic()
                table = tables[name]
                connection.execute(f"CREATE OR REPLACE TEMP TABLE once AS FROM {table.reader}")
                target = folder / module / f"{name}.{suffix}"
                connection.execute(
                    f"COPY ({_copies_sql(tuple(table.columns), copies)}) TO '{target}' ({writer})"
                )
                print(f"{module}/{name}: {time.monotonic() - started:.1f} s", file=sys.stderr)


def _copies_sql(columns: tuple[str, ...], copies: int) -> str:
    # One shift per copy keeps the times of a patient together across tables.
    minutes = f"to_minutes(CAST(hash(k) % {MAX_JITTER_MINUTES} AS BIGINT))"
    chosen = []
    for column in columns:
        if column in STRIDES:
            chosen.append(f"CAST({column} AS BIGINT) + k * {STRIDES[column]} AS {column}")
        elif column.endswith("time"):
            chosen.append(f"CAST({column} AS TIMESTAMP) + {minutes} AS {column}")
        else:
            chosen.append(column)
    return f"SELECT {', '.join(chosen)} FROM range({copies}) AS copies(k), once"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="MIMIC-IV folder or DuckDB file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--copies", type=int, default=10, help="copies of every patient")
    parser.add_argument("--format", choices=sorted(WRITERS), default="parquet")
    parser.add_argument("--threads", type=int, help="threads of DuckDB (default: all cores)")
    arguments = parser.parse_args()
    if not 1 <= arguments.copies <= MAX_COPIES:
        print(f"--copies {arguments.copies}: use 1 to {MAX_COPIES}", file=sys.stderr)
        return 2
    try:
        replicate(
            arguments.data, arguments.out, arguments.copies, arguments.format, arguments.threads
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
