"""The DuckDB database that a cohort is built in, with the tables and variables of its SQL."""

from __future__ import annotations

import math
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
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.errors import InputError


class Workspace:
    """A connection with the item tables and variables that the SQL files use."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, options: CohortOptions) -> None:
        self.connection = connection
        self.options = options
        # Times with a zone become UTC, wherever the program runs.
        self.execute("SET TimeZone = 'UTC'")
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
            "extended_antibiotic_pattern": "|".join(items.EXTENDED_ANTIBIOTICS),
            "extended_antibiotics": self.options.extended_antibiotics,
            "extended_vasopressors": self.options.extended_vasopressors,
            "lowest_weight": items.PLAUSIBLE_WEIGHT[0],
            "highest_weight": items.PLAUSIBLE_WEIGHT[1],
            "topical_routes": list(items.TOPICAL_ROUTES),
            "topical_route_pattern": "|".join(items.TOPICAL_ROUTE_PARTS),
            "topical_drug_pattern": "|".join(items.TOPICAL_DRUG_PARTS),
            "heart_rate": items.HEART_RATE,
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
            "irrigant_in": items.IRRIGANT_IN,
            "invasive_statuses": statuses,
            "cap_vasopressors": self.options.cap_vasopressors,
        }
        for name, value in variables.items():
            self.connection.execute(f"SET VARIABLE {name} = ?", [value])

    def _make_tables(self) -> None:
        self.create(
            "feature_chart",
            ("itemid", "feature", "is_fio2"),
            (
                (item, name, name == "fio2")
                for name, numbers in items.FEATURE_CHART.items()
                for item in numbers
            ),
        )
        arterial = items.ARTERIAL_FEATURES if self.options.blood_gas == "arterial" else ()
        self.create(
            "feature_labs",
            ("itemid", "feature", "arterial_only"),
            (
                (item, name, name in arterial)
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
            "sofa_limits",
            ("itemid", "name", "low", "high", "limits_too"),
            _sofa_limits(like_features=self.options.sofa_values == "features"),
        )
        self.create(
            "ventilation_statuses",
            ("rank", "status"),
            enumerate(items.VENTILATION_STATUSES),
        )
        self.create(
            "ventilation_terms",
            ("itemid", "term", "rank"),
            [
                (item, term, items.VENTILATION_STATUSES.index(status))
                for item, statuses in items.VENTILATION_TERMS.items()
                for status, terms in statuses.items()
                for term in terms
            ]
            + [
                (items.VENTILATOR_MODE, items.STATUS_TEXT.format(status), rank)
                for rank, status in enumerate(items.VENTILATION_STATUSES)
            ],
        )
        self.create(
            "ne_factors",
            ("drug", "factor"),
            items.NE_FACTORS[self.options.vasopressor_factors].items(),
        )


_SOFA_LABS = ("creatinine", "bilirubin_total", "platelet", "pao2")


def _sofa_limits(*, like_features: bool) -> Iterator[tuple[int, str, float, float, bool]]:
    """What the hourly SOFA scores: (item, name, lowest, highest, results at a limit too)."""
    gcs = {
        "gcs_eye": items.GCS_EYES, "gcs_verbal": items.GCS_VERBAL, "gcs_motor": items.GCS_MOTOR,
    }  # fmt: skip
    numbers = {name: items.FEATURE_LABS[name] for name in _SOFA_LABS}
    numbers |= {"meanbp": items.FEATURE_CHART["meanbp"]} | {n: (item,) for n, item in gcs.items()}
    for name, every in numbers.items():
        feature = schema.FEATURES[schema.INDEX[name]]
        low, high = float(feature.low), float(feature.high)
        if not like_features:
            low, high = items.MIMIC_CODE_LIMITS.get(name, (-math.inf, math.inf))
        for item in every if like_features or name == "meanbp" else every[:1]:
            yield item, name, low, high, like_features


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
