"""Units of records: what turns a number of a known unit into the unit that the software uses.

One rule for charts, laboratory results, infusions and outputs: a known unit is converted, a
missing one is taken as the expected one, and any other is unknown (`CohortOptions.unknown_units`).
Spelling does not matter: `mm Hg`, `mmHg` and `MMHG` are one unit, and so are `µmol/L` and `umol/l`.
"""

from __future__ import annotations

from typing import NamedTuple

from worldmodel import schema
from worldmodel.errors import InputError


class Conversion(NamedTuple):
    """`value * scale + shift`, then times the patient's weight (kg) to `weight_power`."""

    scale: float
    shift: float = 0.0
    weight_power: int = 0


AS_IS = Conversion(1.0)
# Spellings of the parts of a unit between its slashes.
_ALIASES = {
    "mcg": "ug", "microgram": "ug", "micrograms": "ug", "gram": "g", "grams": "g", "gm": "g",
    "hr": "hour", "hrs": "hour", "h": "hour", "hours": "hour", "minute": "min", "minutes": "min",
    "m": "min", "u": "units", "unit": "units", "iu": "units", "munit": "munits", "mu": "munits",
    "liter": "l", "litre": "l", "cc": "ml", "second": "s", "seconds": "s", "sec": "s", "secs": "s",
    "°c": "c", "?c": "c", "?f": "f", "degc": "c", "celsius": "c", "°f": "f", "degf": "f",
    "fahrenheit": "f", "kelvin": "k",
    "torr": "mmhg", "percent": "%", "lb": "lbs", "pound": "lbs", "pounds": "lbs",
    "ounce": "oz", "ounces": "oz", "kgs": "kg", "mm3": "ul", "cumm": "ul", "thou": "k",
    "10*3": "k", "10^3": "k", "x10^3": "k", "x10*3": "k", "x10e3": "k", "10e3": "k", "bpm": "/min",
    "10*9": "giga", "10^9": "giga", "x10^9": "giga", "x10*9": "giga", "x10e9": "giga",
    "10e9": "giga", "cells": "", "#": "",
}  # fmt: skip


def normalized(unit: str) -> str:
    """One spelling of a unit, such as `ug/kg/min` for `mcg/kg/min`."""
    text = "".join(unit.casefold().replace("â°", "°").split()).translate({0xB5: "u", 0x3BC: "u"})
    return "/".join(_ALIASES.get(part, part) for part in text.split("/"))


def _scales(*same: str, **others: float) -> dict[str, Conversion]:
    return dict.fromkeys(same, AS_IS) | {unit: Conversion(scale) for unit, scale in others.items()}


_KPA = 7.50062  # mmHg
_PRESSURE = {"mmhg": AS_IS, "kpa": Conversion(_KPA), "cmh2o": Conversion(0.73556)}
_PERCENT = {"%": AS_IS, "fraction": Conversion(100.0)}
_MILLIMOLAR = {"mmol/l": AS_IS, "meq/l": AS_IS}  # of ions with one charge
_ENZYME = {"units/l": AS_IS, "ukat/l": Conversion(60.0), "nkat/l": Conversion(0.06)}
_CELLS = {"k/ul": AS_IS, "giga/l": AS_IS, "/ul": Conversion(0.001)}
_SECONDS = {"s": AS_IS}
_RATE = {"/min": AS_IS, "1/min": AS_IS}
_CELSIUS = {
    "c": AS_IS,
    "f": Conversion(1 / 1.8, -32 / 1.8),
    "k": Conversion(1.0, -273.15),
}


def _per_volume(molar: float, *, charge: int = 0) -> dict[str, Conversion]:
    """Units of a mass concentration in mg/dL, of a substance of `molar` g/mol."""
    found = {
        "mg/dl": AS_IS,
        "mg/l": Conversion(0.1),
        "g/l": Conversion(100.0),
        "mmol/l": Conversion(molar / 10),
        "umol/l": Conversion(molar / 10_000),
    }
    return found | ({"meq/l": Conversion(molar / 10 / charge)} if charge else {})


_GRAMS = {"g/dl": AS_IS, "g/l": Conversion(0.1), "mg/dl": Conversion(0.001)}
# What is measured -> unit as `normalized` -> conversion into the unit of `worldmodel.schema`.
UNITS: dict[str, dict[str, Conversion]] = {
    "heart_rate": _RATE | {"beats/min": AS_IS},
    **dict.fromkeys(("sysbp", "diabp", "meanbp", "paco2", "pao2"), _PRESSURE),
    "resp_rate": _RATE | {"insp/min": AS_IS, "breaths/min": AS_IS},
    **dict.fromkeys(("spo2", "fio2"), _PERCENT),
    "temp_c": _CELSIUS,
    "albumin": _GRAMS,
    **dict.fromkeys(("alt", "ast"), _ENZYME),
    **dict.fromkeys(
        ("base_excess", "bicarbonate", "chloride", "potassium", "sodium", "total_co2"), _MILLIMOLAR
    ),
    "bilirubin_total": _per_volume(584.66),
    "bun": _per_volume(28.014),  # of the nitrogen, two atoms per molecule of urea
    "calcium_total": _per_volume(40.078, charge=2),
    "calcium_free": _scales("mmol/l", **{"mg/dl": 10 / 40.078, "meq/l": 0.5}),
    "creatinine": _per_volume(113.12),
    "glucose": _per_volume(180.156),
    "hemoglobin": _GRAMS | {"mmol/l": Conversion(1.6114)},  # per haem
    "hematocrit": _PERCENT | {"l/l": Conversion(100.0), "ratio": Conversion(100.0)},
    "inr": _scales("ratio", "inr"),
    "lactate": _MILLIMOLAR | {"mg/dl": Conversion(10 / 90.08)},
    "magnesium": _per_volume(24.305, charge=2),
    "ph": _scales("units", "ph", "phunits"),
    **dict.fromkeys(("platelet", "wbc"), _CELLS),
    **dict.fromkeys(("pt", "ptt"), _SECONDS),
    schema.FEATURE_NAMES[schema.URINE]: {
        "ml": AS_IS, "l": Conversion(1000.0), "dl": Conversion(100.0),
    },
    "weight": _scales("kg", lbs=0.45359237, g=0.001, oz=0.028349523),
}  # fmt: skip

# Fluids: volumes for every item, and for single items by their strength: bicarbonate 8.4% holds
# 1 mEq per mL, NaCl 23.4% 4 mEq, mannitol (taken as 20%) 0.2 g.
_VOLUMES = UNITS[schema.FEATURE_NAMES[schema.URINE]]
_STRENGTHS: dict[tuple[int, str], float] = {
    (220995, "meq"): 1.0,
    (227533, "meq"): 1.0,
    (228341, "meq"): 0.25,
    (227531, "g"): 5.0,
}
_MICROGRAMS = {"ng": 0.001, "ug": 1.0, "mg": 1e3, "g": 1e6}
_DRUG_UNITS = {"units": 1.0, "munits": 0.001}
_MINUTES = {"min": 1.0, "hour": 60.0, "day": 1440.0}


def conversion(quantity: str, unit: str | None, expected: str | None = None) -> Conversion | None:
    """What turns a value of `unit` into the schema's unit of a quantity; None if it is unknown.

    Args:
      quantity: a feature of the schema, or "weight" (kg).
      unit: as recorded; None or blank for the expected one.
      expected: unit of an item that is not recorded in the schema's, such as "F".
    """
    known = UNITS[quantity]
    found = normalized(unit or "")
    return known.get(found or normalized(expected or "")) or (AS_IS if not found else None)


def read_unit(text: str) -> tuple[str, Conversion]:
    """A feature and what turns its values into the schema's unit, from FEATURE=UNIT.

    Raises:
      InputError: the feature or the unit is unknown.
    """
    name, _, unit = text.partition("=")
    known = [feature for feature in schema.FEATURE_NAMES if feature in UNITS]
    if not unit.strip():
        raise InputError(f"units: {text!r} is not FEATURE=UNIT, such as creatinine=umol/L")
    if name not in known:
        raise InputError(f"units: {name!r} has no unit to give; expected one of {', '.join(known)}")
    found = conversion(name, unit)
    if found is None:
        units = ", ".join(UNITS[name])
        raise InputError(f"units: {unit!r} is unknown for {name}; expected one of {units}")
    return name, found


def rate_conversion(expected: str, unit: str | None) -> Conversion | None:
    """What turns a drug's rate into `expected`: "mcg/kg/min", or "units/hour".

    Args:
      expected: the unit of the drug.
      unit: as recorded: amount, kg or not, and time; None or blank is unknown, since the units
        of rates differ by factors that no range would show.
    """
    amounts = _DRUG_UNITS if expected == "units/hour" else _MICROGRAMS
    parts = normalized(unit or "").split("/")
    per_kg = parts[1:2] == ["kg"]
    amount, time = parts[0], parts[-1]
    if len(parts) != 2 + per_kg or amount not in amounts or time not in _MINUTES:
        return None
    per_minute = amounts[amount] / _MINUTES[time]
    if expected == "units/hour":
        return Conversion(60 * per_minute, weight_power=1 if per_kg else 0)
    return Conversion(per_minute, weight_power=0 if per_kg else -1)


def volume_conversion(item: int, unit: str | None) -> Conversion | None:
    """What turns the amount of a fluid into mL; None if the unit is unknown or missing."""
    found = normalized(unit or "")
    strength = _STRENGTHS.get((item, found))
    return _VOLUMES.get(found) or (Conversion(strength) if strength is not None else None)
