"""Raw tables read into the workspace: needed rows only, each once, in known units."""

from __future__ import annotations

from collections.abc import Iterable

from sepsis_jax.cohort import items
from sepsis_jax.cohort.source import RawTable, reading
from sepsis_jax.cohort.units import AS_IS, conversion, rate_conversion, volume_conversion
from sepsis_jax.cohort.workspace import Workspace
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.errors import InputError

# A result without a number that tells a limit, such as "<0.2", "GREATER THAN 500." or "<3*."
_LIMIT = r"^\s*(?:<|>|≤|≥|less than|greater than|below|above)\s*=?\s*([0-9][0-9,]*(?:\.[0-9]+)?)"


def read_stays(work: Workspace, tables: dict[str, RawTable]) -> JsonDict:
    """Tables `stays` and `people`: every ICU stay with its times, and its patient.

    Returns:
      Counts of repeated rows, and of deaths that the records contradict or do not date.

    Raises:
      InputError: a patient, hospital stay or ICU stay has rows that differ, or none match.
    """
    repeated = {}
    keys = {"icustays": "stay_id", "admissions": "hadm_id", "patients": "subject_id"}
    for name, key in keys.items():
        with reading(tables[name]):
            work.execute(f"CREATE TABLE {name} AS FROM raw_{name}")
        repeated[f"repeated rows of {name}"] = _drop_repeats(work, name)
        _check_key(work, tables[name], key)
    work.execute("CREATE TABLE stays AS FROM icustays WHERE outtime > intime")
    work.run("people")
    if not work.scalar("SELECT count(*) FROM people"):
        raise InputError(
            f"{tables['icustays'].place}: no stay matches patients and admissions by "
            "subject_id and hadm_id; give files of one release"
        )
    return _present(repeated | dict(work.rows("SELECT name, rows FROM people_counts")))


def read_infections(work: Workspace, tables: dict[str, RawTable]) -> JsonDict:
    """Table `suspicion`: antibiotic orders of ICU patients with their cultures.

    Returns:
      Counts of orders that were set aside.
    """
    with reading(tables["prescriptions"]), work.joined_as_written():
        work.run("orders")
    with reading(tables["microbiologyevents"]), work.joined_as_written():
        work.run("cultures")
    work.run("infection")
    return dict(work.rows("SELECT name, rows FROM order_counts WHERE rows > 0 ORDER BY name"))


def read_diagnoses(work: Workspace, tables: dict[str, RawTable]) -> None:
    """Table `charlson`: comorbidities and index per hospital stay."""
    with reading(tables["diagnoses_icd"]), work.joined_as_written():
        work.execute(
            "CREATE TABLE diagnoses AS SELECT * FROM raw_diagnoses_icd "
            "WHERE hadm_id IN (SELECT hadm_id FROM stays)"
        )
    work.create(
        "charlson_codes",
        ("condition", "icd_version", "characters", "first_code", "last_code"),
        items.charlson_code_ranges(),
    )
    work.run("charlson")
    flags = ", ".join(
        f"CAST(coalesce(bool_or(c.condition = '{name}'), false) AS INTEGER) AS {name}"
        for name in items.CHARLSON_WEIGHTS
    )
    ages = ">=" if work.options.charlson_age_bands == "2026-07" else ">"
    points = " + ".join(f"CAST(p.age {ages} {limit} AS INTEGER)" for limit in (50, 60, 70, 80))
    index = items.charlson_index_sql()
    work.execute(
        f"CREATE TABLE charlson AS SELECT *, age_score + {index} AS charlson FROM ("
        f"SELECT p.hadm_id, any_value({points}) AS age_score, {flags} "
        "FROM people AS p LEFT JOIN comorbidities AS c USING (hadm_id) GROUP BY p.hadm_id)"
    )


def read_chart(work: Workspace, tables: dict[str, RawTable]) -> JsonDict:
    """Table `chart`: the needed items of the patients in `stays`, in the schema's units.

    Returns:
      Counts of repeated rows, rows without a time, and unknown units.

    Raises:
      InputError: a unit is unknown and the options ask to stop at one.
    """
    texts = _listed(items.TEXT_ITEMS)
    with reading(tables["chartevents"]), work.joined_as_written():
        work.execute(
            "CREATE TABLE chart AS SELECT subject_id, stay_id, charttime, itemid, "
            f"CASE WHEN itemid IN ({texts}) OR valuenum IS NULL THEN value END AS value, "
            "value IS NOT NULL AS has_value, valuenum, valueuom, "
            f"CASE WHEN itemid = {items.OXYGEN_DEVICE} THEN storetime END AS storetime, code, "
            "CAST(NULL AS VARCHAR) AS problem, false AS censored FROM raw_chartevents "
            f"WHERE itemid IN ({_listed(items.CHART_ITEMS)}) "
            "AND subject_id IN (SELECT subject_id FROM stays)"
        )
    quantities = {item: name for name, numbers in items.FEATURE_CHART.items() for item in numbers}
    quantities |= dict.fromkeys((items.WEIGHT_ADMIT, items.WEIGHT_DAILY), "weight")
    return _measured(work, "chart", tables["chartevents"], quantities, ("value",))


def read_labs(work: Workspace, tables: dict[str, RawTable]) -> JsonDict:
    """Table `lab`: the needed results of the patients in `stays`, in the schema's units.

    Returns:
      Counts of repeated rows, rows without a time, and unknown units.

    Raises:
      InputError: a unit is unknown and the options ask to stop at one.
    """
    with reading(tables["labevents"]), work.joined_as_written():
        work.execute(
            "CREATE TABLE lab AS SELECT subject_id, hadm_id, specimen_id, itemid, charttime, "
            "CASE WHEN itemid = getvariable('specimen_type') OR valuenum IS NULL THEN value END "
            "AS value, valuenum, valueuom, CASE WHEN valuenum IS NULL THEN comments END "
            "AS comments, code, CAST(NULL AS VARCHAR) AS problem, false AS censored "
            "FROM raw_labevents "
            f"WHERE itemid IN ({_listed(items.LAB_ITEMS)}) "
            "AND subject_id IN (SELECT subject_id FROM stays)"
        )
    quantities = {item: name for name, numbers in items.FEATURE_LABS.items() for item in numbers}
    quantities[items.LAB_FIO2] = "fio2"
    return _measured(work, "lab", tables["labevents"], quantities, ("value", "comments"))


def read_outputs(work: Workspace, tables: dict[str, RawTable]) -> JsonDict:
    """Table `urine_rows`: urine and irrigant of the stays in `stays`, in mL.

    Returns:
      Counts of repeated rows, rows without a time or volume, and unknown units.

    Raises:
      InputError: a unit is unknown and the options ask to stop at one.
    """
    with reading(tables["outputevents"]), work.joined_as_written():
        work.execute(
            "CREATE TABLE urine_rows AS SELECT stay_id, charttime, itemid, value, valueuom, code, "
            "CAST(NULL AS VARCHAR) AS problem FROM raw_outputevents "
            f"WHERE itemid IN ({_listed(items.URINE_ITEMS)}) "
            "AND stay_id IN (SELECT stay_id FROM stays)"
        )
    counts = _each_once(work, "urine_rows")
    urine = schema.FEATURE_NAMES[schema.URINE]
    quantities = dict.fromkeys(items.URINE_ITEMS, urine)
    unknown = _convert(work, "urine_rows", tables["outputevents"], quantities, column="value")
    empty = work.scalar("SELECT count(*) FROM urine_rows WHERE value IS NULL AND problem IS NULL")
    work.execute("DELETE FROM urine_rows WHERE value IS NULL")
    return counts | _present({"rows without a volume": empty}) | {"unknown_units": unknown}


def read_inputs(work: Workspace, tables: dict[str, RawTable]) -> JsonDict:
    """Tables `vasoactive_matched` and `fluid_matched`: infusions with what their units mean.

    Returns:
      Counts of repeated rows and unknown units.

    Raises:
      InputError: a unit is unknown and the options ask to stop at one.
    """
    drugs = [(name, *about, False) for name, about in items.VASOACTIVES.items()]
    drugs += [(name, *about, True) for name, about in items.EXTENDED_VASOACTIVES.items()]
    work.create(
        "vasoactive_items",
        ("itemid", "drug", "unit", "cap", "extended"),
        (
            (item, drug, unit, cap, extended)
            for drug, numbers, unit, cap, extended in drugs
            for item in numbers
        ),
    )
    work.create("fluid_items", ("itemid", "isotonic"), items.FLUIDS.items())
    needed = _listed([item for _, numbers, *_ in drugs for item in numbers] + [*items.FLUIDS])
    with reading(tables["inputevents"]), work.joined_as_written():
        work.execute(
            "CREATE TABLE inputs AS SELECT * EXCLUDE (statusdescription) REPLACE ("
            "CASE WHEN isfinite(amount) THEN amount END AS amount, "
            "CASE WHEN isfinite(rate) THEN rate END AS rate), "
            "lower(trim(statusdescription)) = 'rewritten' AS rewritten FROM raw_inputevents "
            f"WHERE itemid IN ({needed}) AND stay_id IN (SELECT stay_id FROM stays)"
        )
    repeated = _drop_repeats(work, "inputs")
    _find_units(work)
    work.run("inputs")
    unknown = [
        {"column": column, "item": item, "unit": unit, "rows": rows}
        for column, item, unit, rows in work.rows(
            "SELECT source_column, item, unit, rows FROM unknown_units ORDER BY ALL"
        )
    ]
    _stop_at_unknown_units(work, tables["inputevents"], unknown)
    return ({"repeated rows": repeated} if repeated else {}) | {"unknown_units": unknown}


def convert_inputs(work: Workspace) -> JsonDict:
    """Tables `vasoactive_rows` and `fluid_rows`; needs the weights of `chart`.

    Returns:
      Counts of the rows that were set aside or changed.
    """
    work.run("doses")
    return dict(work.rows("SELECT name, rows FROM input_counts WHERE rows > 0 ORDER BY name"))


def _stop_at_unknown_units(work: Workspace, table: RawTable, unknown: list[JsonDict]) -> None:
    """Raises an `InputError` for the first unknown unit, unless the options drop such rows."""
    if unknown and work.options.unknown_units == "error":
        first = unknown[0]
        column = table.aliases.get(first["column"], first["column"])
        more = f" (and {len(unknown) - 1} more such units)" if len(unknown) > 1 else ""
        raise InputError(
            f"{table.place}: column {column} has unit {first['unit']!r} for "
            f"{first['item']} in {first['rows']} rows{more}, which is not known; mend the unit, or "
            "use unknown_units='drop' to leave such rows out and count them"
        )


def _listed(numbers: Iterable[int]) -> str:
    """Numbers as a list of SQL."""
    return ", ".join(str(number) for number in numbers)


def _drop_repeats(work: Workspace, name: str) -> int:
    """Leaves one of rows that are the same in every column; returns how many went."""
    columns = ", ".join(row[0] for row in work.rows(f"DESCRIBE {name}"))
    total, different = work.rows(f"SELECT count(*), count(DISTINCT hash({columns})) FROM {name}")[0]
    if total == different:
        return 0
    work.execute(f"CREATE OR REPLACE TABLE {name} AS SELECT DISTINCT * FROM {name}")
    return int(total - work.scalar(f"SELECT count(*) FROM {name}"))


def _measured(
    work: Workspace,
    name: str,
    table: RawTable,
    quantities: dict[int, str],
    texts: tuple[str, ...],
) -> JsonDict:
    """Makes rows of results unique, numeric and of the schema's units; the counts of both."""
    counts = _each_once(work, name)
    _read_numbers(work, name, quantities, texts)
    return counts | {"unknown_units": _convert(work, name, table, quantities)}


def _each_once(work: Workspace, name: str) -> JsonDict:
    counts = {"repeated rows": _drop_repeats(work, name)}
    untimed = work.scalar(f"SELECT count(*) FROM {name} WHERE charttime IS NULL")
    if untimed:
        work.execute(f"DELETE FROM {name} WHERE charttime IS NULL")
    return _present(counts | {"rows without a time": untimed})


def _present(counts: dict[str, int]) -> JsonDict:
    return {name: int(count) for name, count in counts.items() if count}


def _check_key(work: Workspace, table: RawTable, key: str) -> None:
    empty = work.scalar(f"SELECT count(*) FROM {table.name} WHERE {key} IS NULL")
    if empty:
        raise InputError(f"{table.place}: column {key} is empty in {empty} rows; leave them out")
    twice = work.rows(
        f"SELECT {key}, count(*) FROM {table.name} GROUP BY {key} HAVING count(*) > 1 ORDER BY ALL"
    )
    if twice:
        raise InputError(
            f"{table.place}: {key} {twice[0][0]} stands in {twice[0][1]} rows that differ "
            f"({len(twice)} such); keep one row for each {key}"
        )


def _read_numbers(
    work: Workspace, name: str, quantities: dict[int, str], texts: tuple[str, ...]
) -> None:
    """Numbers that only the text tells, and limits in place of a number (`censored`)."""
    mine = f"itemid IN ({_listed(quantities)})"
    number = "TRY_CAST(trim(value) AS DOUBLE)"
    parts = ", ".join(f"nullif(regexp_extract({text}, '{_LIMIT}', 1, 'i'), '')" for text in texts)
    limit = f"TRY_CAST(replace(coalesce({parts}), ',', '') AS DOUBLE)"
    for change, condition in (
        ("valuenum = NULL", "NOT isfinite(valuenum)"),
        (f"valuenum = {number}", f"valuenum IS NULL AND isfinite({number})"),
        (f"valuenum = {limit}, censored = true", f"valuenum IS NULL AND {limit} IS NOT NULL"),
        ("problem = 'no number'", "valuenum IS NULL"),
    ):
        work.execute(f"UPDATE {name} SET {change} WHERE {mine} AND {condition}")


def _convert(
    work: Workspace,
    name: str,
    table: RawTable,
    quantities: dict[int, str],
    column: str = "valuenum",
) -> list[JsonDict]:
    """Brings a column into the schema's units; values of unknown units become a problem."""
    changed: list[tuple[object, ...]] = []
    unknown: list[JsonDict] = []
    for item, unit, rows, code in work.rows(
        f"SELECT itemid, valueuom, count(*), min(code) FROM {name} WHERE {column} IS NOT NULL "
        f"AND itemid IN ({_listed(quantities)}) GROUP BY ALL ORDER BY ALL"
    ):
        found = conversion(quantities[item], unit, items.CHART_UNITS.get(item))
        if found is None:
            told = f"item {item}" if code is None else f"code {code}"
            label = f"{quantities[item]} {told}"
            unknown.append({"column": "valueuom", "item": label, "unit": unit, "rows": rows})
            changed.append((item, unit, None, None, "unknown unit"))
        elif found != AS_IS:
            changed.append((item, unit, found.scale, found.shift, None))
    _stop_at_unknown_units(work, table, unknown)
    work.execute(
        "CREATE OR REPLACE TABLE conversions "
        "(item INTEGER, unit VARCHAR, scale DOUBLE, shift DOUBLE, problem VARCHAR)"
    )
    for row in changed:
        work.connection.execute("INSERT INTO conversions VALUES (?, ?, ?, ?, ?)", row)
    if changed:
        work.execute(
            f"UPDATE {name} SET {column} = {column} * u.scale + u.shift, "
            f"problem = coalesce(u.problem, {name}.problem) FROM conversions AS u "
            f"WHERE itemid = u.item AND valueuom IS NOT DISTINCT FROM u.unit "
            f"AND {column} IS NOT NULL"
        )
    return unknown


def _find_units(work: Workspace) -> None:
    """Tables `rate_units` and `fluid_units`: the known ones of the units that occur."""
    work.execute(
        "CREATE TABLE rate_units (unit VARCHAR, rateuom VARCHAR, factor DOUBLE, "
        "weight_power INTEGER)"
    )
    for drug_unit, unit in work.rows(
        "SELECT DISTINCT unit, rateuom FROM inputs INNER JOIN vasoactive_items USING (itemid)"
    ):
        rate = rate_conversion(drug_unit, unit)
        if rate is not None:
            row = (drug_unit, unit, rate.scale, rate.weight_power)
            work.connection.execute("INSERT INTO rate_units VALUES (?, ?, ?, ?)", row)
    work.execute("CREATE TABLE fluid_units (itemid INTEGER, amountuom VARCHAR, factor DOUBLE)")
    for item, unit in work.rows(
        "SELECT DISTINCT itemid, amountuom FROM inputs INNER JOIN fluid_items USING (itemid)"
    ):
        volume = volume_conversion(item, unit)
        if volume is not None:
            work.connection.execute(
                "INSERT INTO fluid_units VALUES (?, ?, ?)", (item, unit, volume.scale)
            )
