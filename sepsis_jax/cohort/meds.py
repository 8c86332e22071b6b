"""MEDS data sets as a source of cohorts.

The events that a concept map names are read once and become the tables that cohorts of MIMIC-IV are
made of, so that everything after them is the same code. MEDS is described by the Medical Event
Data Standard, https://medical-event-data-standard.github.io.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pandas as pd

from sepsis_jax.cohort import items
from sepsis_jax.cohort.concepts import CONCEPTS, NEEDED, Code, CodeFinder, ConceptMap
from sepsis_jax.cohort.source import TABLES, RawTable, quoted, reading
from sepsis_jax.cohort.units import normalized, volume_conversion
from sepsis_jax.cohort.workspace import Workspace
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.files import read_json

_EVENTS = "meds_events"  # view of the data, and its name in errors
_NUMBERED = ("stay", "hospital_stay", "order", "specimen")
_FIXED = {"subject_id": "BIGINT", "time": "TIMESTAMP", "code": "VARCHAR"}
# What the columns of the tables are called in the data.
_ALIASES = {"valueuom": "unit", "rateuom": "unit", "amountuom": "unit", "value": "numeric_value"}
_CODING_DAYS = 30
# Sections whose events count only within a stay.
_PLACED = {
    "stay": ("chart", "output", "vasoactives", "fluids"), "hospital_stay": ("diagnoses",),
}  # fmt: skip
_SECONDS = {"min": 60, "hour": 3600, "day": 86400}
_CODE_COLUMNS = {
    "code": "VARCHAR", "section": "VARCHAR", "concept": "VARCHAR", "entry": "INTEGER",
    "part": "VARCHAR", "item": "INTEGER", "told_unit": "VARCHAR", "other_unit": "VARCHAR",
    "drug": "VARCHAR", "other_route": "VARCHAR", "icd": "VARCHAR", "version": "INTEGER",
    "arterial": "BOOLEAN", "with_text": "BOOLEAN", "statuses": "BOOLEAN",
}  # fmt: skip


@dataclass(frozen=True)
class MedsSource:
    """What is known of a MEDS data set once its tables are there.

    Attributes:
      tables: the tables of a cohort by name, of which views `raw_<name>` have been made.
      release: name and version of the data set, folder and map.
      counts: events that lie in no stay, where the data have no numbers of stays.
      notes: concepts without any event, and columns that the data lack, in sentences.
    """

    tables: dict[str, RawTable]
    release: JsonDict
    counts: JsonDict
    notes: list[str]


def attach_meds(work: Workspace, data: Path, concepts: ConceptMap) -> MedsSource:
    """Reads the events of ICU patients that a map names; makes views `raw_<table>` of them.

    Args:
      work: where the views are made.
      data: folder with `data/` and, where there is one, `metadata/`.
      concepts: what the codes mean.

    Raises:
      InputError: the folder is no MEDS data set, a column is missing, or a needed concept has no
        event.
    """
    events = _find_events(work, data)
    columns, absent = _match_columns(events, concepts)
    _view(work, events, columns)
    with reading(events):
        notes = _match_codes(work, data, events, concepts) + absent
    moves = "SELECT * FROM meds_selected WHERE section IN ('stays', 'patients')"
    with reading(events), work.joined_as_written():
        work.execute(f"CREATE TABLE meds_moves AS {moves} AND concept <> 'weight_at_infusion'")
    for role in ("stay", "hospital_stay"):
        work.execute(f"SET VARIABLE told_{role} = {role in columns}")
    work.run("meds_stays")
    with reading(events), work.joined_as_written():
        work.execute(
            "CREATE TABLE meds_rows AS SELECT * FROM meds_selected WHERE section <> 'stays' "
            "AND (section <> 'patients' OR concept = 'weight_at_infusion') "
            "AND subject_id IN (SELECT subject_id FROM meds_icu)"
        )
    counts: JsonDict = {}
    if "stay" not in columns:
        counts |= _place_in_stays(work, "stay", "meds_icu", ("stay_id", "intime", "outtime"))
    if "hospital_stay" not in columns:
        names = ("hadm_id", "admittime", "dischtime")
        counts |= _place_in_stays(work, "hospital_stay", "meds_hospital", names)
    _name_statuses(work, concepts)
    _time_rates(work)
    work.run("meds_events")
    if concepts.splits:
        _read_splits(work, data, concepts)
    tables = {
        name: RawTable(name, events.place, f"raw_{name}", {}, events.files, _ALIASES)
        for module in TABLES.values()
        for name in module
    }
    return MedsSource(tables, _describe(data, concepts), counts, notes)


def _find_events(work: Workspace, data: Path) -> RawTable:
    if not data.is_dir():
        raise InputError(f"{data}: no such folder; give a MEDS data set, which holds data/")
    folder = data / "data"
    files = tuple(sorted(folder.rglob("*.parquet")))
    if not files:
        raise InputError(f"{folder}: no .parquet file; a MEDS data set has its events there")
    reader = f"read_parquet([{', '.join(quoted(str(file)) for file in files)}], union_by_name=true)"
    try:
        found = work.rows(f"DESCRIBE SELECT * FROM {reader}")
    except duckdb.Error as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: unreadable ({reason}); write it again") from None
    columns = {row[0]: str(row[1]) for row in found}
    remedy = "mend the data, or leave the column out of the map: numbers of stays are whole numbers"
    return RawTable(_EVENTS, str(folder), reader, columns, files, remedy=remedy)


def _match_columns(events: RawTable, concepts: ConceptMap) -> tuple[dict[str, str], list[str]]:
    """The data's own columns by what they hold, and notes of those that are not there."""
    missing = [name for name in (*_FIXED, "numeric_value") if name not in events.columns]
    if missing:
        raise InputError(
            f"{events.place}: column {missing[0]} missing (it has {', '.join(events.columns)}); "
            "give data with the columns of the current standard"
        )
    columns, notes = {}, []
    for role, (name, may_lack) in concepts.columns.items():
        if name in events.columns:
            columns[role] = name
        elif may_lack:
            notes.append(f"The data have no column {name} ({role}).")
        else:
            raise InputError(
                f"{events.place}: column {name} missing, which {concepts.path} names for {role} "
                f"(it has {', '.join(events.columns)}); mend the map, or write {name}? for a "
                "column that may be missing"
            )
    return columns, notes


def _view(work: Workspace, events: RawTable, columns: dict[str, str]) -> None:
    """Makes `meds_selected`: the events whose codes are in `meds_codes`, with what these tell."""

    def column(role: str) -> str:
        name = columns.get(role)
        value = "NULL" if name is None else f'e."{name.replace(chr(34), chr(34) * 2)}"'
        return f"CAST({value} AS {'BIGINT' if role in _NUMBERED else 'VARCHAR'})"

    # The standard's numbers have 32 bits: the shortest decimal is what was recorded.
    short = events.columns["numeric_value"] == "FLOAT"
    number = "CAST(e.numeric_value AS VARCHAR)" if short else "e.numeric_value"
    is_number = "coalesce(isfinite(CAST(e.numeric_value AS DOUBLE)), false)"
    text = "e.text_value" if "text_value" in events.columns else "NULL"
    fixed = ", ".join(f"CAST(e.{name} AS {kind}) AS {name}" for name, kind in _FIXED.items())
    work.execute(
        "CREATE TABLE meds_codes "
        f"({', '.join(f'{name} {kind}' for name, kind in _CODE_COLUMNS.items())})"
    )
    work.execute(
        f"CREATE TEMP VIEW meds_selected AS SELECT {fixed}, c.section, c.concept, c.entry, c.part, "
        f"c.item, CASE WHEN {is_number} THEN CAST({number} AS DOUBLE) END AS value, "
        f"CASE WHEN c.with_text OR NOT {is_number} "
        f"THEN CAST({text} AS VARCHAR) END AS text, "
        f"coalesce(c.told_unit, nullif({column('unit')}, 'UNK'), c.other_unit) AS unit, "
        f"{column('stay')} AS stay, {column('hospital_stay')} AS hospital_stay, "
        f"{column('order')} AS order_id, {column('status')} AS status, "
        f"coalesce({column('route')}, c.other_route) AS route, {column('specimen')} AS specimen, "
        f"{column('comments')} AS comments, c.drug, c.icd, c.version, c.arterial, c.statuses "
        f"FROM {events.reader} AS e INNER JOIN meds_codes AS c ON e.code = c.code"
    )


def _match_codes(work: Workspace, data: Path, events: RawTable, concepts: ConceptMap) -> list[str]:
    """Fills `meds_codes` with the data's codes that the map names; notes of what none has."""
    parents = _parent_codes(work, data)
    finder = CodeFinder(concepts.codes)
    rows: dict[tuple[str, int, str], dict[str, object]] = {}
    for (code,) in work.rows(
        f"SELECT DISTINCT CAST(code AS VARCHAR) FROM {events.reader} WHERE code IS NOT NULL"
    ):
        for name in (code, *parents.get(code, ())):
            for entry, told in finder.find(name):
                rows.setdefault((code, entry.entry, entry.part), _code_row(code, entry, told))
    found = {(str(row["section"]), str(row["concept"])) for row in rows.values()}
    _require_concepts(found, events, concepts)
    if rows:
        frame = pd.DataFrame(list(rows.values()), columns=list(_CODE_COLUMNS), dtype=object)
        typed = ", ".join(f"CAST({name} AS {kind})" for name, kind in _CODE_COLUMNS.items())
        work.connection.register("incoming", frame)
        work.execute(f"INSERT INTO meds_codes SELECT {typed} FROM incoming")
        work.connection.unregister("incoming")
    named = dict.fromkeys((code.section, code.concept) for code in concepts.codes)
    empty = [
        f"{section}.{concept}" for section, concept in named if (section, concept) not in found
    ]
    unnamed = [name for name in schema.FEATURE_NAMES if not _is_named(name, named)]
    notes = []
    if empty:
        notes.append(f"No event has a code of {', '.join(empty)}.")
    if unnamed:
        notes.append(f"The map has no code of {', '.join(unnamed)}.")
    return notes


def _is_named(feature: str, named: dict[tuple[str, str], None]) -> bool:
    if feature == schema.FEATURE_NAMES[schema.URINE]:
        return ("output", "urine") in named
    return any((section, feature) in named for section in ("chart", "laboratory"))


def _code_row(code: str, entry: Code, told: dict[str, str]) -> dict[str, object]:
    version = told.get("version", "")
    return {
        "code": code,
        "section": entry.section,
        "concept": entry.concept,
        "entry": entry.entry,
        "part": entry.part,
        "item": entry.item,
        "told_unit": told.get("unit"),
        "other_unit": entry.unit,
        "drug": entry.drug or told.get("drug"),
        "other_route": entry.route,
        "icd": told.get("icd"),
        "version": int(version) if version.isdecimal() else entry.version,
        "arterial": entry.arterial,
        "with_text": entry.with_text,
        "statuses": bool(entry.texts),
    }


def _require_concepts(found: set[tuple[str, str]], events: RawTable, concepts: ConceptMap) -> None:
    """Refuses data in which nothing has a code of a needed concept."""
    for section, names in NEEDED:
        if found.isdisjoint((section, name) for name in names):
            patterns = [
                code.pattern
                for code in concepts.codes
                if code.section == section and code.concept in names
            ]
            told = f"the map has {', '.join(patterns[:3])}" if patterns else "the map has none"
            raise InputError(
                f"{concepts.path}: {section}.{' or '.join(names)}: no event in {events.place} has "
                f"such a code ({told}); mend the map after the codes of the data"
            )


def _parent_codes(work: Workspace, data: Path) -> dict[str, list[str]]:
    """Codes of standard vocabularies by the data's code, from `metadata/codes.parquet`."""
    file = data / "metadata" / "codes.parquet"
    if not file.is_file():
        return {}
    reader = f"read_parquet({quoted(str(file))})"
    try:
        names = {row[0] for row in work.rows(f"DESCRIBE SELECT * FROM {reader}")}
        if not {"code", "parent_codes"} <= names:
            return {}
        return dict(
            work.rows(f"SELECT code, parent_codes FROM {reader} WHERE len(parent_codes) > 0")
        )
    except duckdb.Error as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{file}: unreadable ({reason}); write it again") from None


def _place_in_stays(
    work: Workspace, column: str, stays: str, names: tuple[str, str, str]
) -> JsonDict:
    """Gives each event the number of the stay that its time lies in; counts of those in none."""
    number, begin, end = names
    # Diagnoses may be coded some time after the stay.
    last = f"s.{end} + to_days(CASE WHEN r.concept = 'icd' THEN {_CODING_DAYS} ELSE 0 END)"
    work.execute(
        f"CREATE OR REPLACE TABLE meds_rows AS SELECT r.* REPLACE ("
        f"CASE WHEN r.time <= {last} THEN s.{number} END AS {column}) FROM meds_rows AS r "
        f"ASOF LEFT JOIN (FROM {stays} WHERE {end} > {begin}) AS s "
        f"ON r.subject_id = s.subject_id AND r.time >= s.{begin}"
    )
    sections = ", ".join(f"'{section}'" for section in _PLACED[column])
    return {
        f"events of {section} in no {column.replace('_', ' ')}": int(rows)
        for section, rows in work.rows(
            f"SELECT section, count(*) FROM meds_rows WHERE {column} IS NULL "
            f"AND section IN ({sections}) GROUP BY section ORDER BY section"
        )
    }


def _name_statuses(work: Workspace, concepts: ConceptMap) -> None:
    """Texts of ventilation as the statuses that the map gives for them."""
    rows = {
        (code.entry, text, items.STATUS_TEXT.format(status))
        for code in concepts.codes
        for text, status in code.texts.items()
    }
    if rows:
        work.create("meds_statuses", ("entry", "text", "status"), sorted(rows))
        work.execute(
            "UPDATE meds_rows SET text = (SELECT max(s.status) FROM meds_statuses AS s "
            "WHERE s.entry = meds_rows.entry AND s.text IN ('', meds_rows.text)) "
            "WHERE statuses"
        )
        work.execute("DELETE FROM meds_rows WHERE statuses AND text IS NULL")


def _time_rates(work: Workspace) -> None:
    """Table `meds_rate_times`: unit and seconds of the rates of fluids, such as mL per hour."""
    work.execute(
        "CREATE TABLE meds_rate_times (rateuom VARCHAR, amountuom VARCHAR, seconds DOUBLE)"
    )
    item = CONCEPTS["fluids"]["solution"]
    for (unit,) in work.rows(
        "SELECT DISTINCT unit FROM meds_rows WHERE section = 'fluids' "
        "AND part IN ('start', 'rate') AND unit IS NOT NULL"
    ):
        amount, _, time = normalized(unit).rpartition("/")
        if time in _SECONDS and volume_conversion(item, amount) is not None:
            row = (unit, amount, _SECONDS[time])
            work.connection.execute("INSERT INTO meds_rate_times VALUES (?, ?, ?)", row)


def _read_splits(work: Workspace, data: Path, concepts: ConceptMap) -> None:
    """Table `subject_split`: index of the split of each patient."""
    file = data / "metadata" / "subject_splits.parquet"
    if not file.is_file():
        raise InputError(f"{file}: no such file; leave splits out of {concepts.path}")
    table = RawTable("subject_splits", str(file), f"read_parquet({quoted(str(file))})", {}, (file,))
    rows = [(name, schema.SPLITS.index(ours)) for name, ours in concepts.splits.items()]
    work.create("meds_splits", ("name", "split"), rows)
    with reading(table):
        work.execute(
            "CREATE TABLE subject_split AS SELECT CAST(p.subject_id AS BIGINT) AS subject_id, "
            f"CAST(p.split AS VARCHAR) AS name, s.split FROM {table.reader} AS p "
            "LEFT JOIN meds_splits AS s ON CAST(p.split AS VARCHAR) = s.name"
        )
    unknown = work.rows("SELECT name FROM subject_split WHERE split IS NULL ORDER BY name LIMIT 1")
    if unknown:
        raise InputError(
            f"{file}: split {unknown[0][0]!r} is not in splits of {concepts.path}; add it there"
        )
    lost = work.rows(
        "SELECT i.subject_id FROM meds_icu AS i WHERE i.subject_id NOT IN "
        "(SELECT subject_id FROM subject_split) ORDER BY ALL LIMIT 1"
    )
    if lost:
        raise InputError(
            f"{file}: column subject_id lacks patient {lost[0][0]}; add the patient, or leave "
            f"splits out of {concepts.path}"
        )


def _describe(data: Path, concepts: ConceptMap) -> JsonDict:
    """Name and version of the data set and of the map."""
    file = data / "metadata" / "dataset.json"
    told = read_json(file) if file.is_file() else {}
    if not isinstance(told, dict):
        raise InputError(f"{file}: got {type(told).__name__}, expected a JSON object")
    content = concepts.path.read_bytes()
    return {
        "name": told.get("dataset_name"),
        "version": told.get("dataset_version"),
        "meds_version": told.get("meds_version"),
        "folder": data.resolve().name,
        "map": {"file": concepts.path.name, "sha256": hashlib.sha256(content).hexdigest()},
    }
