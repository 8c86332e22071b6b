"""A hand-made hospital in the layout of MIMIC-IV, small enough to reckon by hand."""

from __future__ import annotations

import copy
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from sepsis_jax.cohort import items
from sepsis_jax.cohort.source import TABLES

ADMITTED = datetime(2150, 3, 1, 8, 0)
TEXT = {"VARCHAR": "string", "TIMESTAMP": "datetime64[us]", "DOUBLE": "float64"}

NOREPINEPHRINE, EPINEPHRINE, DOPAMINE = 221906, 221289, 221662
PHENYLEPHRINE, VASOPRESSIN = 221749, 222315
SALINE, HALF_SALINE, ALBUMIN_25 = 225158, 225159, 220862
FOLEY = 226559
CREATININE, LACTATE, BASE_EXCESS, PO2 = 50912, 50813, 50802, 50821


class Tiny:
    """Tables as lists of rows; times are given in hours from ICU admission."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {
            name: [] for names in TABLES.values() for name in names
        }
        self._specimen = 0

    def stay(
        self,
        subject: int,
        *,
        age=60,
        gender="M",
        hours=24.0,
        dod=None,
        number=1,
        admitted=ADMITTED,
        died=False,
        death=None,
    ) -> int:
        """Adds a patient (with number 1), a hospital stay and an ICU stay; returns its number."""
        stay = 30_000_000 + 10 * subject + number
        hadm = 20_000_000 + 10 * subject + number
        if number == 1:
            self.tables["patients"].append(
                {
                    "subject_id": subject,
                    "gender": gender,
                    "anchor_age": age,
                    "anchor_year": ADMITTED.year,
                    "dod": dod,
                }
            )
        end = admitted + timedelta(hours=hours)
        self.tables["admissions"].append(
            {
                "subject_id": subject,
                "hadm_id": hadm,
                "admittime": admitted,
                "dischtime": end,
                "deathtime": death or (end if died else None),
                "hospital_expire_flag": int(died or death is not None),
            }
        )
        self.tables["icustays"].append(
            {
                "subject_id": subject,
                "hadm_id": hadm,
                "stay_id": stay,
                "intime": admitted,
                "outtime": end,
            }
        )
        return stay

    def septic_stay(self, subject: int, **about) -> int:
        """A stay with hourly heart rates, low pressure, creatinine 2.5 and a treated infection."""
        stay = self.stay(subject, **about)
        for hour in range(int(about.get("hours", 24))):
            self.chart(stay, hour, items.HEART_RATE, 90)
            self.chart(stay, hour, 220052, 65)
        self.lab(stay, 1, CREATININE, 2.5, unit="mg/dL")
        self.antibiotic(stay, 2)
        self.culture(stay, 1)
        return stay

    def of(self, stay: int) -> dict[str, Any]:
        return next(row for row in self.tables["icustays"] if row["stay_id"] == stay)

    def at(self, stay: int, hour: float) -> datetime:
        return self.of(stay)["intime"] + timedelta(hours=hour)

    def chart(
        self, stay: int, hour: float, item: int, value: float | None, text=None, unit=None
    ) -> None:
        self.tables["chartevents"].append(
            {
                "subject_id": self.of(stay)["subject_id"],
                "stay_id": stay,
                "itemid": item,
                "charttime": self.at(stay, hour),
                "value": text or str(value),
                "valuenum": value,
                "valueuom": unit,
            }
        )

    def lab(
        self,
        stay: int,
        hour: float,
        item: int,
        value: float | None,
        *,
        unit=None,
        arterial=False,
        text=None,
        comments=None,
    ) -> None:
        self._specimen += 1
        base = {key: self.of(stay)[key] for key in ("subject_id", "hadm_id")} | {
            "specimen_id": self._specimen,
            "charttime": self.at(stay, hour),
        }
        told = text if value is None else str(value)
        rows = [
            {
                "itemid": item,
                "value": told,
                "valuenum": value,
                "valueuom": unit,
                "comments": comments,
            }
        ]
        if arterial:
            rows.append({"itemid": 52033, "value": "ART."})
        self.tables["labevents"] += [base | row for row in rows]

    def infuse(
        self,
        stay: int,
        start: float,
        end: float,
        item: int,
        *,
        amount=None,
        unit=None,
        rate=None,
        rate_unit=None,
        weight=80.0,
        status="FinishedRunning",
        order=None,
    ) -> None:
        self.tables["inputevents"].append(
            {
                "stay_id": stay,
                "starttime": self.at(stay, start),
                "endtime": self.at(stay, end),
                "itemid": item,
                "amount": amount,
                "amountuom": unit,
                "rate": rate,
                "rateuom": rate_unit,
                "patientweight": weight,
                "statusdescription": status,
                "orderid": order,
            }
        )

    def pressor(
        self, stay: int, start: float, end: float, item: int, rate: float, unit="mcg/kg/min", **more
    ):
        self.infuse(
            stay, start, end, item, amount=1.0, unit="mg", rate=rate, rate_unit=unit, **more
        )

    def output(self, stay: int, hour: float, value: float, item: int = FOLEY, unit="ml") -> None:
        self.tables["outputevents"].append(
            {
                "stay_id": stay,
                "charttime": self.at(stay, hour),
                "itemid": item,
                "value": value,
                "valueuom": unit,
            }
        )

    def repeat(self, table: str, times: int = 1) -> None:
        """Appends the newest row of a table once more."""
        self.tables[table] += [dict(self.tables[table][-1]) for _ in range(times)]

    def antibiotic(self, stay: int, hour: float, drug="Vancomycin", route="IV") -> None:
        about = self.of(stay)
        self.tables["prescriptions"].append(
            {
                "subject_id": about["subject_id"],
                "hadm_id": about["hadm_id"],
                "drug": drug,
                "starttime": self.at(stay, hour),
                "stoptime": self.at(stay, hour + 24),
                "drug_type": "MAIN",
                "route": route,
            }
        )

    def culture(self, stay: int, hour: float, *, timed=True) -> None:
        about, moment = self.of(stay), self.at(stay, hour)
        self._specimen += 1
        self.tables["microbiologyevents"].append(
            {
                "subject_id": about["subject_id"],
                "hadm_id": about["hadm_id"],
                "micro_specimen_id": self._specimen,
                "spec_type_desc": "BLOOD CULTURE",
                "chartdate": datetime(moment.year, moment.month, moment.day),
                "charttime": moment if timed else None,
            }
        )

    def diagnosis(self, stay: int, code: str, version: int = 10) -> None:
        self.tables["diagnoses_icd"].append(
            {"hadm_id": self.of(stay)["hadm_id"], "icd_code": code, "icd_version": version}
        )

    def shuffled(self, seed: int) -> Tiny:
        """The same hospital with the rows of every table in another order."""
        other = copy.deepcopy(self)
        rng = np.random.default_rng(seed)
        for rows in other.tables.values():
            rng.shuffle(rows)
        return other

    def frames(self) -> dict[tuple[str, str], pd.DataFrame]:
        """Data frames by module and table, every column of MIMIC-IV's type."""
        frames = {}
        for module, names in TABLES.items():
            for name, columns in names.items():
                frame = pd.DataFrame(self.tables[name], columns=list(columns))
                frames[module, name] = frame.astype(
                    {column: TEXT.get(kind, "Int64") for column, kind in columns.items()}
                )
        return frames

    def write(self, path: Path, form: str = "parquet") -> Path:
        """Writes the hospital as csv, csv.gz, parquet, parts (of Parquet) or duckdb."""
        if form == "duckdb":
            with duckdb.connect(str(path)) as connection:
                for (module, name), frame in self.frames().items():
                    connection.register("incoming", frame)
                    connection.execute(f"CREATE SCHEMA IF NOT EXISTS mimiciv_{module}")
                    connection.execute(f"CREATE TABLE mimiciv_{module}.{name} AS FROM incoming")
            return path
        for (module, name), frame in self.frames().items():
            (path / module).mkdir(parents=True, exist_ok=True)
            if form == "parquet":
                frame.to_parquet(path / module / f"{name}.parquet")
            elif form == "parts":
                (path / module / name).mkdir()
                middle = len(frame) // 2
                frame.iloc[:middle].to_parquet(path / module / name / "0.parquet")
                frame.iloc[middle:].to_parquet(path / module / name / "1.parquet")
            else:
                frame.to_csv(path / module / f"{name}.{form}", index=False)
        return path
