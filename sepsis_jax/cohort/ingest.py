"""Reads each raw table once and keeps the rows and columns that the cohort needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sepsis_jax.cohort import charlson, items
from sepsis_jax.cohort.source import RawTable, reading
from sepsis_jax.cohort.workspace import Workspace
from worldmodel.errors import InputError


def read_stays(work: Workspace, tables: dict[str, RawTable]) -> None:
    """Tables `stays` and `people`: every ICU stay with its times, and its patient."""
    with reading(tables["icustays"]):
        work.execute("CREATE TABLE icustays AS FROM raw_icustays")
    work.execute("CREATE TABLE stays AS FROM icustays WHERE outtime > intime")
    for name in ("admissions", "patients"):
        with reading(tables[name]):
            work.execute(f"CREATE TABLE {name} AS FROM raw_{name}")
    work.run("people")
    if not work.scalar("SELECT count(*) FROM people"):
        raise InputError(
            f"{tables['icustays'].place}: no stay matches patients and admissions by "
            "subject_id and hadm_id; give files of one release"
        )


def read_infections(work: Workspace, tables: dict[str, RawTable]) -> None:
    """Table `suspicion`: antibiotic orders of ICU patients with their cultures."""
    with reading(tables["prescriptions"]), work.joined_as_written():
        work.run("orders")
    with reading(tables["microbiologyevents"]), work.joined_as_written():
        work.run("cultures")
    work.run("infection")


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
        charlson.code_ranges(),
    )
    work.run("charlson")
    flags = ", ".join(
        f"CAST(coalesce(bool_or(c.condition = '{name}'), false) AS INTEGER) AS {name}"
        for name in charlson.WEIGHTS
    )
    ages = ">=" if work.options.charlson_age_bands == "2026-07" else ">"
    points = " + ".join(f"CAST(p.age {ages} {limit} AS INTEGER)" for limit in (50, 60, 70, 80))
    work.execute(
        f"CREATE TABLE charlson AS SELECT *, age_score + {charlson.index_sql()} AS charlson FROM ("
        f"SELECT p.hadm_id, any_value({points}) AS age_score, {flags} "
        "FROM people AS p LEFT JOIN comorbidities AS c USING (hadm_id) GROUP BY p.hadm_id)"
    )


def read_inputs(work: Workspace, tables: dict[str, RawTable]) -> dict[str, Any]:
    """Tables `vasoactive_rows` and `fluid_rows`; returns counts of what was set aside.

    Raises:
      InputError: a unit is unknown and the options ask to stop at one.
    """
    drugs = [(name, *about) for name, about in items.VASOACTIVES.items()]
    if work.options.extended_vasopressors:
        drugs += [(name, *about) for name, about in items.EXTENDED_VASOACTIVES.items()]
    work.create(
        "vasoactive_items",
        ("itemid", "drug", "unit", "cap"),
        ((item, drug, unit, cap) for drug, numbers, unit, cap in drugs for item in numbers),
    )
    work.create(
        "rate_units",
        ("unit", "rateuom", "factor", "divide_by_weight"),
        ((*units, *conversion) for units, conversion in items.RATE_UNITS.items()),
    )
    work.create("fluid_items", ("itemid", "isotonic"), items.FLUIDS.items())
    everywhere = [(item, *unit) for item in items.FLUIDS for unit in items.FLUID_UNITS.items()]
    single = [(*unit, factor) for unit, factor in items.FLUID_UNITS_OF.items()]
    work.create("fluid_units", ("itemid", "amountuom", "factor"), everywhere + single)
    needed = _listed([item for _, numbers, *_ in drugs for item in numbers] + [*items.FLUIDS])
    with reading(tables["inputevents"]), work.joined_as_written():
        work.execute(
            f"CREATE TABLE inputs AS FROM raw_inputevents WHERE itemid IN ({needed}) "
            "AND stay_id IN (SELECT stay_id FROM stays)"
        )
    work.run("inputs")
    unknown = _unknown_units(work, tables["inputevents"])
    counts = work.rows("SELECT name, rows FROM input_counts WHERE rows > 0 ORDER BY name")
    return {"unknown_units": unknown, **dict(counts)}


def read_chart(work: Workspace, tables: dict[str, RawTable]) -> None:
    """Table `chart`: the needed items of the patients in `stays`."""
    needed, texts = _listed(items.CHART_ITEMS), _listed(items.TEXT_ITEMS)
    with reading(tables["chartevents"]), work.joined_as_written():
        work.execute(
            "CREATE TABLE chart AS SELECT subject_id, stay_id, charttime, itemid, "
            f"CASE WHEN itemid IN ({texts}) THEN value END AS value, "
            "value IS NOT NULL AS has_value, valuenum, "
            f"CASE WHEN itemid = {items.OXYGEN_DEVICE} THEN storetime END AS storetime "
            "FROM raw_chartevents "
            f"WHERE itemid IN ({needed}) AND subject_id IN (SELECT subject_id FROM stays)"
        )


def read_labs(work: Workspace, tables: dict[str, RawTable]) -> None:
    """Table `lab`: the needed results of the patients in `stays`."""
    with reading(tables["labevents"]), work.joined_as_written():
        work.execute(
            "CREATE TABLE lab AS SELECT subject_id, hadm_id, specimen_id, itemid, charttime, "
            "CASE WHEN itemid = getvariable('specimen_type') THEN value END AS value, valuenum, "
            f"valueuom FROM raw_labevents WHERE itemid IN ({_listed(items.LAB_ITEMS)}) "
            "AND subject_id IN (SELECT subject_id FROM stays)"
        )


def read_outputs(work: Workspace, tables: dict[str, RawTable]) -> None:
    """Table `urine_rows`: urine and irrigant of the stays in `stays`."""
    with reading(tables["outputevents"]), work.joined_as_written():
        work.execute(
            "CREATE TABLE urine_rows AS FROM raw_outputevents "
            f"WHERE itemid IN ({_listed(items.URINE_ITEMS)}) AND value IS NOT NULL "
            "AND stay_id IN (SELECT stay_id FROM stays)"
        )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def _unknown_units(work: Workspace, table: RawTable) -> list[dict[str, Any]]:
    unknown = [
        {"column": column, "item": item, "unit": unit, "rows": rows}
        for column, item, unit, rows in work.rows(
            "SELECT source_column, item, unit, rows FROM unknown_units ORDER BY ALL"
        )
    ]
    if unknown and work.options.unknown_units == "error":
        first = unknown[0]
        raise InputError(
            f"{table.place}: column {first['column']} has unit {first['unit']!r} for "
            f"{first['item']} in {first['rows']} rows, which is not known; mend the unit, or use "
            "unknown_units='drop' to leave such rows out and count them"
        )
    return unknown
