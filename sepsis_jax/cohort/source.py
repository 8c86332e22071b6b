"""Sources of MIMIC-IV: files in the official layout, or a DuckDB file.

Every needed table and column is found before any large file is read, and every column has an
explicit type, so that nothing depends on what a reader guesses from the first rows.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from sepsis_jax.runs import JsonDict
from worldmodel.errors import InputError

_ID, _TIME, _TEXT, _NUMBER = "BIGINT", "TIMESTAMP", "VARCHAR", "DOUBLE"

# module -> table -> column -> type. Dates are read as timestamps: some releases write a time.
TABLES: dict[str, dict[str, dict[str, str]]] = {
    "hosp": {
        "patients": {
            "subject_id": _ID, "gender": _TEXT, "anchor_age": "INTEGER",
            "anchor_year": "INTEGER", "dod": _TIME,
        },
        "admissions": {
            "subject_id": _ID, "hadm_id": _ID, "admittime": _TIME, "dischtime": _TIME,
            "deathtime": _TIME, "hospital_expire_flag": "INTEGER",
        },
        "diagnoses_icd": {"hadm_id": _ID, "icd_code": _TEXT, "icd_version": "INTEGER"},
        "prescriptions": {
            "subject_id": _ID, "hadm_id": _ID, "starttime": _TIME, "stoptime": _TIME,
            "drug_type": _TEXT, "drug": _TEXT, "route": _TEXT,
        },
        "microbiologyevents": {
            "subject_id": _ID, "hadm_id": _ID, "micro_specimen_id": _ID, "chartdate": _TIME,
            "charttime": _TIME, "spec_type_desc": _TEXT, "org_itemid": _ID, "org_name": _TEXT,
        },
        "labevents": {
            "subject_id": _ID, "hadm_id": _ID, "specimen_id": _ID, "itemid": "INTEGER",
            "charttime": _TIME, "value": _TEXT, "valuenum": _NUMBER, "valueuom": _TEXT,
            "comments": _TEXT, "code": _TEXT,
        },
    },
    "icu": {
        "icustays": {
            "subject_id": _ID, "hadm_id": _ID, "stay_id": _ID, "intime": _TIME, "outtime": _TIME,
        },
        "chartevents": {
            "subject_id": _ID, "stay_id": _ID, "charttime": _TIME, "storetime": _TIME,
            "itemid": "INTEGER", "value": _TEXT, "valuenum": _NUMBER, "valueuom": _TEXT,
            "code": _TEXT,
        },
        "inputevents": {
            "stay_id": _ID, "starttime": _TIME, "endtime": _TIME, "itemid": "INTEGER",
            "amount": _NUMBER, "amountuom": _TEXT, "rate": _NUMBER, "rateuom": _TEXT,
            "patientweight": _NUMBER, "statusdescription": _TEXT, "orderid": _ID,
        },
        "outputevents": {
            "stay_id": _ID, "charttime": _TIME, "itemid": "INTEGER", "value": _NUMBER,
            "valueuom": _TEXT, "code": _TEXT,
        },
    },
}  # fmt: skip
# Columns that an extract may lack; they count as empty then. MIMIC-IV has no `code`: other sources
# have several codes of what is one item here.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "labevents": ("comments", "code"),
    "chartevents": ("storetime", "valueuom", "code"),
    "inputevents": ("orderid",),
    "outputevents": ("valueuom", "code"),
}

_HINT = "get MIMIC-IV 2.2 to 3.1 from PhysioNet and give the folder that holds hosp/ and icu/"
_HASHED_BYTES = 1 << 20
# Rows of patients, admissions and icustays of the releases, as PhysioNet describes them.
_RELEASES: dict[tuple[int, int, int], str] = {
    (100, 275, 140): "MIMIC-IV demo 2.2",
    (299_712, 431_231, 73_181): "MIMIC-IV 2.2",
    (364_627, 546_028, 94_458): "MIMIC-IV 3.0 or 3.1",
}
# Files that PhysioNet puts beside the tables.
_LEAFLETS = ("CHANGELOG.txt", "README.md", "README.txt", "LICENSE.txt", "index.html")
_VERSION = re.compile(r"(?:mimic[- ]?iv\D{0,60}?v?|^v?)(\d\.\d(?:\.\d)?)\b", re.IGNORECASE)


@dataclass(frozen=True)
class RawTable:
    """One table of the source.

    Attributes:
      name: table name, also of the DuckDB view `raw_<name>`.
      place: file, folder of Parquet parts, or schema-qualified table; named in errors.
      reader: SQL expression to select from.
      columns: names of the columns found there, with DuckDB's types.
      files: files behind it.
      aliases: what errors call a column, where that is not its name.
      remedy: what to do where a value does not fit its column.
    """

    name: str
    place: str
    reader: str
    columns: dict[str, str]
    files: tuple[Path, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    remedy: str = "the file is damaged or altered, download it again"


def attach_source(connection: duckdb.DuckDBPyConnection, data: Path) -> dict[str, RawTable]:
    """Makes a typed view `raw_<table>` for every needed table.

    Args:
      connection: where the views are made.
      data: folder with `hosp/` and `icu/` (`.csv.gz`, `.csv`, `.parquet`, or folders of
        Parquet parts), or a DuckDB file.

    Returns:
      Tables by name.

    Raises:
      InputError: a table or a column is missing, or a file cannot be read.
    """
    if not data.exists():
        raise InputError(f"{data}: no such file or folder; {_HINT}")
    find = _duckdb_finder(connection, data) if data.is_file() else _file_finder(connection, data)
    tables: dict[str, RawTable] = {}
    for module, names in TABLES.items():
        for name, columns in names.items():
            table = find(module, name)
            _check_columns(table, columns)
            tables[name] = table
    for table in tables.values():
        types = next(names[table.name] for names in TABLES.values() if table.name in names)
        chosen = ", ".join(
            f"{_typed(column, table.columns.get(column), kind)} AS {column}"
            for column, kind in types.items()
        )
        connection.execute(
            f"CREATE TEMP VIEW raw_{table.name} AS SELECT {chosen} FROM {table.reader}"
        )
    return tables


def _typed(column: str, found: str | None, kind: str) -> str:
    """SQL for a column in its type; times with a zone become those of the session, UTC."""
    if found is None:
        return f"CAST(NULL AS {kind})"
    if kind == _TIME and found == _TEXT:
        # Text as a time would lose its offset from UTC; reading all of it as a time with a zone
        # takes five times as long.
        return (
            f'CASE WHEN length("{column}") <= 19 AND NOT contains("{column}", \'+\') '
            f'THEN CAST("{column}" AS TIMESTAMP) '
            f'ELSE CAST(CAST("{column}" AS TIMESTAMPTZ) AS TIMESTAMP) END'
        )
    return f'CAST("{column}" AS {kind})'


@contextmanager
def reading(table: RawTable) -> Iterator[None]:
    """Turns what goes wrong while a table is read into one clear `InputError`."""
    try:
        yield
    except (duckdb.ConversionException, duckdb.InvalidInputException) as error:
        raise InputError(
            f"{table.place}: a value does not fit its column ({_explain(error)}); {table.remedy}"
        ) from None
    except duckdb.IOException as error:
        # Trouble with the working folder is not the table's fault.
        if not any(str(file) in str(error) for file in table.files):
            raise
        raise InputError(
            f"{table.place}: unreadable or truncated ({_explain(error)}); download it again"
        ) from None


def describe_files(tables: dict[str, RawTable]) -> list[JsonDict]:
    """Name, size and a cheap hash (first and last MiB) of every input file."""
    seen: dict[Path, JsonDict] = {}
    for table in tables.values():
        for file in table.files:
            if file not in seen:
                size = file.stat().st_size
                digest = hashlib.sha256(str(size).encode())
                with file.open("rb") as stream:
                    digest.update(stream.read(_HASHED_BYTES))
                    stream.seek(max(size - _HASHED_BYTES, 0))
                    digest.update(stream.read(_HASHED_BYTES))
                name = f"{file.parent.name}/{file.name}"
                seen[file] = {"file": name, "bytes": size, "sha256_ends": digest.hexdigest()}
    return list(seen.values())


def describe_release(connection: duckdb.DuckDBPyConnection, data: Path) -> JsonDict:
    """Which release of MIMIC-IV the files are of, by rows, folder and leaflets beside the tables.

    Args:
      connection: with the tables `patients`, `admissions` and `icustays`, each row once.
      data: where the source lies.

    Returns:
      `name` by the number of rows (None if no known release has them), `rows` of the three
      tables, `folder` and the version in it or in a leaflet (`version`, None if none is found).
    """
    tables = ("patients", "admissions", "icustays")
    rows = {name: connection.table(name).shape[0] for name in tables}
    folder = data.resolve()
    texts = [f"mimic-iv {folder.name}", folder.parent.name]
    for leaflet in _LEAFLETS:
        file = folder / leaflet
        if file.is_file():
            texts.append(file.read_text(encoding="utf-8", errors="replace")[:20_000])
    found = (match for text in texts if (match := _VERSION.search(text)))
    return {
        "name": _RELEASES.get((rows["patients"], rows["admissions"], rows["icustays"])),
        "version": next((match[1] for match in found), None),
        "folder": folder.name,
        "rows": rows,
    }


def _file_finder(
    connection: duckdb.DuckDBPyConnection, data: Path
) -> Callable[[str, str], RawTable]:
    for module in TABLES:
        if not (data / module).is_dir():
            raise InputError(f"{data}: has no folder {module}/; {_HINT}")

    def find(module: str, name: str) -> RawTable:
        base = data / module / name
        for suffix in (".csv.gz", ".csv"):
            file = base.with_name(name + suffix)
            if file.is_file():
                return _csv_table(name, file, TABLES[module][name])
        for place in (base.with_name(name + ".parquet"), base):
            parts = (place,) if place.is_file() else tuple(sorted(place.glob("*.parquet")))
            if parts:
                return _parquet_table(connection, name, place, parts)
        raise InputError(
            f"{base}: no {name}.csv.gz, .csv or .parquet; table {module}.{name} is needed, {_HINT}"
        )

    return find


def _csv_table(name: str, file: Path, types: dict[str, str]) -> RawTable:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="") as stream:
            header = tuple(next(csv.reader(stream), ()))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{file}: unreadable ({error}); download it again") from None
    if not header:
        raise InputError(f"{file}: empty; download it again")
    # Times are read as text, so that an offset from UTC is seen (`_typed`).
    kinds = {column: types.get(column, _TEXT).replace(_TIME, _TEXT) for column in header}
    columns = ", ".join(f"{quoted(column)}: '{kind}'" for column, kind in kinds.items())
    reader = (
        f"read_csv({quoted(str(file))}, auto_detect=false, header=true, delim=',', quote='\"', "
        f"escape='\"', columns={{{columns}}})"
    )
    return RawTable(name, str(file), reader, kinds, (file,))


def _parquet_table(
    connection: duckdb.DuckDBPyConnection, name: str, place: Path, parts: tuple[Path, ...]
) -> RawTable:
    reader = f"read_parquet([{', '.join(quoted(str(part)) for part in parts)}])"
    return RawTable(name, str(place), reader, _columns(connection, reader, str(place)), parts)


def _duckdb_finder(
    connection: duckdb.DuckDBPyConnection, data: Path
) -> Callable[[str, str], RawTable]:
    try:
        connection.execute(f"ATTACH {quoted(str(data))} AS source (READ_ONLY)")
    except duckdb.Error as error:
        raise InputError(
            f"{data}: not a readable DuckDB file ({_explain(error)}); {_HINT}"
        ) from None
    present = set(
        connection.execute(
            "SELECT table_schema, table_name FROM information_schema.tables "
            "WHERE table_catalog = 'source'"
        ).fetchall()
    )

    def find(module: str, name: str) -> RawTable:
        for schema in (f"mimiciv_{module}", module, "main"):
            if (schema, name) in present:
                reader = f'source."{schema}"."{name}"'
                place = f"{data} table {schema}.{name}"
                return RawTable(name, place, reader, _columns(connection, reader, place), (data,))
        raise InputError(
            f"{data}: has no table {name} in schema mimiciv_{module}, {module} or main; "
            "load it into the DuckDB file"
        )

    return find


def _columns(connection: duckdb.DuckDBPyConnection, reader: str, place: str) -> dict[str, str]:
    try:
        rows = connection.execute(f"DESCRIBE SELECT * FROM {reader}").fetchall()
    except duckdb.Error as error:
        raise InputError(f"{place}: unreadable ({_explain(error)}); replace it") from None
    return {row[0]: str(row[1]) for row in rows}


def _check_columns(table: RawTable, needed: dict[str, str]) -> None:
    missing = [
        column
        for column in needed
        if column not in table.columns and column not in OPTIONAL.get(table.name, ())
    ]
    if missing:
        raise InputError(
            f"{table.place}: column {', '.join(missing)} missing (it has "
            f"{', '.join([*table.columns][:8])}{' ...' if len(table.columns) > 8 else ''}); "
            "use the column names of MIMIC-IV 2.2 to 3.1"
        )


def quoted(text: str) -> str:
    """A text of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _explain(error: Exception) -> str:
    """What DuckDB says, in one line and without the line of patient data that it quotes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Original Line")]
    return " ".join(lines[:2])[:300]
