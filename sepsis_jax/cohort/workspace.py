"""The DuckDB database that a cohort is built in, and the raw tables read into it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd

from sepsis_jax.cohort import items
from sepsis_jax.cohort.options import CohortOptions
from sepsis_jax.cohort.source import RawTable, reading
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.errors import InputError


class Workspace:
    """A connection with the item tables and variables that the SQL files use."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, options: CohortOptions) -> None:
        self.connection = connection
        self.options = options
        self._set_variables()
        self._make_tables()

    def run(self, name: str) -> None:
        """Runs `sql/<name>.sql`."""
        file = resources.files("sepsis_jax.cohort").joinpath("sql", f"{name}.sql")
        self.connection.execute(file.read_text(encoding="utf-8"))

    def execute(self, sql: str) -> duckdb.DuckDBPyConnection:
        """Runs one statement."""
        return self.connection.execute(sql)

    @contextmanager
    def joined_as_written(self) -> Iterator[None]:
        """Joins keep their right side in memory, whatever the optimizer believes.

        The number of rows of a CSV file is not known beforehand, and a wrong guess would hold
        the events instead of the few patients to keep.
        """
        self.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
        try:
            yield
        finally:
            self.execute("RESET disabled_optimizers")

    # rows of DuckDB have the types of their columns
    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        return self.connection.execute(sql).fetchall()

    def scalar(self, sql: str) -> Any:
        """The single value of a query."""
        return self.rows(sql)[0][0]

    def create(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Makes a small table from Python rows."""
        frame = pd.DataFrame([list(row) for row in rows], columns=list(columns))
        self.connection.register("incoming", frame)
        self.connection.execute(f"CREATE TABLE {name} AS SELECT * FROM incoming")
        self.connection.unregister("incoming")

    def _set_variables(self) -> None:
        statuses = ["InvasiveVent"]
        if self.options.ventilation == "invasive-or-tracheostomy":
            statuses.append("Tracheostomy")
        variables: JsonDict = {
            "step_seconds": self.options.step_hours * 3600,
            "lead_steps": self.options.lead_steps,
            "past_steps": self.options.past_steps,
            "mimic_code": self.options.mimic_code,
            "age": self.options.age,
            "death_clock": self.options.death_clock,
            "antibiotic_pattern": "|".join(items.ANTIBIOTICS),
            "topical_routes": list(items.TOPICAL_ROUTES),
            "topical_route_pattern": "|".join(items.TOPICAL_ROUTE_PARTS),
            "topical_drug_pattern": "|".join(items.TOPICAL_DRUG_PARTS),
            "heart_rate": items.HEART_RATE,
            "mean_pressure": list(items.FEATURE_CHART["meanbp"]),
            "gcs_motor": items.GCS_MOTOR,
            "gcs_verbal": items.GCS_VERBAL,
            "gcs_eyes": items.GCS_EYES,
            "fio2_chart": items.FIO2_CHART,
            "weight_admit": items.WEIGHT_ADMIT,
            "weight_daily": items.WEIGHT_DAILY,
            "ventilator_mode": items.VENTILATOR_MODE,
            "hamilton_mode": items.HAMILTON_MODE,
            "oxygen_device": items.OXYGEN_DEVICE,
            "oxygen_flow": list(items.OXYGEN_FLOW),
            "specimen_type": items.SPECIMEN_TYPE,
            "lab_fio2": items.LAB_FIO2,
            "lab_po2": items.LAB_PO2,
            "creatinine": items.FEATURE_LABS["creatinine"][0],
            "bilirubin": items.FEATURE_LABS["bilirubin_total"][0],
            "platelet": items.FEATURE_LABS["platelet"][0],
            "irrigant_in": items.IRRIGANT_IN,
            "invasive_statuses": statuses,
            "cap_vasopressors": self.options.cap_vasopressors,
        }
        for name, value in variables.items():
            self.connection.execute(f"SET VARIABLE {name} = ?", [value])

    def _make_tables(self) -> None:
        self.create(
            "feature_chart",
            ("itemid", "feature", "scale", "shift", "is_fio2"),
            (
                (item, name, scale, shift, name == "fio2")
                for name, per_item in items.FEATURE_CHART.items()
                for item, (scale, shift) in per_item.items()
            ),
        )
        arterial = items.ARTERIAL_FEATURES if self.options.blood_gas == "arterial" else ()
        self.create(
            "feature_labs",
            ("itemid", "feature", "units", "arterial_only"),
            (
                (item, name, list(items.LAB_UNITS[name]), name in arterial)
                for name, per_feature in items.FEATURE_LABS.items()
                for item in per_feature
            ),
        )
        positive = ("base_excess",) if self.options.base_excess == "positive-only" else ()
        self.create(
            "feature_limits",
            ("name", "index", "low", "high", "positive_only"),
            (
                (feature.name, i, float(feature.low), float(feature.high), feature.name in positive)
                for i, feature in enumerate(schema.FEATURES)
            ),
        )
        self.create(
            "ventilation_statuses",
            ("rank", "status"),
            enumerate(items.VENTILATION_STATUSES),
        )
        self.create(
            "ventilation_terms",
            ("itemid", "term", "rank"),
            (
                (item, term, items.VENTILATION_STATUSES.index(status))
                for item, statuses in items.VENTILATION_TERMS.items()
                for status, terms in statuses.items()
                for term in terms
            ),
        )
        self.create(
            "ne_factors",
            ("drug", "factor"),
            items.NE_FACTORS[self.options.vasopressor_factors].items(),
        )


@contextmanager
def open_workspace(beside: Path, options: CohortOptions) -> Iterator[Workspace]:
    """A workspace in a temporary folder beside `beside`, removed at the end.

    Raises:
      InputError: the folder cannot be written, or the memory limit is malformed.
    """
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.work.", dir=beside.parent))
    except OSError as error:
        raise InputError(f"{beside.parent}: cannot be written ({error.strerror})") from None
    try:
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": options.memory_limit,
            "threads": options.worker_threads,
            "temp_directory": str(folder / "spill"),
            "preserve_insertion_order": False,
        }
        try:
            connection = duckdb.connect(str(folder / "work.duckdb"), config=config)
        except duckdb.Error as error:
            raise InputError(
                f"option memory_limit: {options.memory_limit!r} does not fit "
                f"({str(error).splitlines()[0]}); use a size such as 8GB"
            ) from None
        try:
            yield Workspace(connection, options)
        except duckdb.OutOfMemoryException:
            raise InputError(
                f"option memory_limit: {options.memory_limit} and the free disk space beside "
                f"{beside} do not suffice; give more of either, or fewer threads"
            ) from None
        except duckdb.IOException as error:
            raise InputError(
                f"{beside.parent}: the working files cannot be written there "
                f"({str(error).splitlines()[0]}); free disk space or choose another folder"
            ) from None
        finally:
            connection.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def read_inputs(work: Workspace, tables: dict[str, RawTable]) -> JsonDict:
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


def _unknown_units(work: Workspace, table: RawTable) -> list[JsonDict]:
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
