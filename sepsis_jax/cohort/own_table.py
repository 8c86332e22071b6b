"""From a table of one's own records to a folder of episodes.

A table has one row per stay and step. What it lacks is derived as cohorts of MIMIC-IV derive it;
what it holds is used as it is, and refused where it cannot be right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from sepsis_jax.cohort import binning
from sepsis_jax.cohort.build import empty_training, padded_episodes, split_of, stays_by_split
from sepsis_jax.cohort.options import CHOICES, EDGES, RISING, SHARES, are_edges, are_shares
from sepsis_jax.cohort.units import Conversion, read_unit
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.episodes import COLUMNS, MASK_NAMES, RANGES, Episodes, from_table, table_problems
from worldmodel.errors import TableError

_URINE = schema.FEATURE_NAMES[schema.URINE]
_AS_IS = ("stay_id", "subject_id", "split", "step")  # every digit is kept
_DRUGS = {"vasopressor": "vasopressor_dose", "fluid": "fluid_ml"}
_LEVEL = "from the dose, by quartiles of training"
# What is done where a column is absent; all other columns are needed.
OTHERWISE: dict[str, str] = {
    "subject_id": "the stay_id",
    "split": "by a hash of patient and seed",
    **dict.fromkeys(schema.MASKED_NAMES, "typical value; gaps: held, then median"),
    _URINE: "typical value; gaps: 0 mL (missing_urine)",
    **dict.fromkeys(MASK_NAMES, "1 where a value is given"),
    "vasopressor_level": _LEVEL,
    "fluid_level": _LEVEL,
    "sofa": "from the row and the dose of the step before",
    "urine_24h": "sum of 24 h of rows, scaled up on day 1",
    "behavior_prob": "unknown",
}
_UNITS = {feature.name: feature.unit for feature in schema.FEATURES} | {
    _URINE: "mL per step", "age": "years", "charlson": "points", "sofa": "points",
    "vasopressor_dose": "mcg/kg/min", "fluid_ml": "mL per step", "urine_24h": "mL in 24 h",
}  # fmt: skip
_RANGES = {
    "stay_id": "whole number", "subject_id": "whole number", "step": "0, 1, 2, ...",
    "split": ", ".join(schema.SPLITS), "behavior_prob": "above 0, at most 1",
    "vasopressor_level": "0 to 4", "fluid_level": "0 to 4",
} | {
    name: f"{low:g} or more" if np.isinf(high) else f"{low:g} to {high:g}"
    for name, (low, high) in RANGES.items()
}  # fmt: skip


@dataclass(frozen=True)
class OwnTableOptions:
    """Settings of a cohort from one's own table.

    Attributes:
      step_hours: length of a step in hours.
      units: of columns that are not in the schema's unit, as FEATURE=UNIT: `creatinine=umol/L`.
      missing_urine: gaps of urine are "zero" mL, but for the first row, or left to "impute".
      carry_forever: hold a measurement without time limit.
      vasopressor_edges, fluid_edges: upper edges of dose levels 1 to 3 (mcg/kg/min, mL per step);
        None takes the quartiles of the training stays' doses.
      split: shares of patients for training, validation and test, where the table has no split.
      seed: of the split.
    """

    step_hours: float = schema.STEP_HOURS
    units: tuple[str, ...] = ()
    missing_urine: str = "zero"
    carry_forever: bool = False
    vasopressor_edges: tuple[float, ...] | None = None
    fluid_edges: tuple[float, ...] | None = None
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "above 0, at most 24 hours", lambda h: 0 < h <= 24, "step_hours")
        known = CHOICES["missing_urine"]
        require(self, "zero or impute", known.__contains__, "missing_urine")
        require(self, RISING, are_edges, *EDGES)
        require(self, SHARES, are_shares, "split")
        _ = self.conversions

    @property
    def conversions(self) -> dict[str, Conversion]:
        """What turns a column's values into the schema's unit, by feature.

        Raises:
          InputError: a feature or unit is unknown.
        """
        return dict(map(read_unit, self.units))


@dataclass(frozen=True)
class OwnCohort:
    """Episodes of a table, and how they came about.

    Attributes:
      episodes: checked and complete.
      edges: of the dose levels.
      derived: what was done for each column that the table lacks.
      counts: entries measured, held, filled and converted; stays by split.
      notes: what the reader of results must know of the records, in sentences.
    """

    episodes: Episodes
    edges: schema.DoseEdges
    derived: dict[str, str]
    counts: JsonDict
    notes: list[str]


def describe_columns() -> list[JsonDict]:
    """Every column of a table: {column, unit, range, optional, otherwise}."""
    return [
        {
            "column": name,
            "unit": _UNITS.get(name, ""),
            "range": _RANGES.get(name, "0 or 1"),
            "optional": name in OTHERWISE,
            "otherwise": OTHERWISE.get(name, ""),
        }
        for name in COLUMNS
    ]


def own_cohort(
    table: pd.DataFrame, options: OwnTableOptions | None = None, *, source: str = "table"
) -> OwnCohort:
    """Checks a table and derives what it lacks.

    Args:
      table: rows in any order, columns as `describe_columns` tells; NaN in a feature's column
        where nothing was measured.
      options: settings.
      source: named in errors.

    Raises:
      TableError: with every problem of the table.
    """
    options = options or OwnTableOptions()
    table, converted = _in_units(table.reset_index(drop=True), options)
    complete = _with_stand_ins(table)
    problems = table_problems(complete, source=source) + _empty_masks(table, source)
    for name in sorted(set(options.conversions).difference(table)):
        problems.append(f"{source}: column {name} is missing, of which a unit is given")
    if table.columns.intersection(schema.FEATURE_NAMES).empty:
        problems.append(f"{source}: no column of a feature; docs/cohort.md has their names")
    if problems:
        raise TableError(problems)
    return _derived(table, from_table(complete, source=source), converted, options, source)


def _in_units(table: pd.DataFrame, options: OwnTableOptions) -> tuple[pd.DataFrame, dict[str, int]]:
    """The table with NaN for every kind of gap and values in the schema's units, and counts."""
    columns, converted = dict(table.items()), {}
    for name in COLUMNS:
        column = columns.get(name)
        if column is None or name in _AS_IS or not _is_number(column):
            continue
        values = column.to_numpy(np.float64, na_value=np.nan)
        if name in options.conversions:
            scale, shift, _ = options.conversions[name]
            values = values * scale + shift
            converted[name] = int(np.isfinite(values).sum())
        columns[name] = pd.Series(values)
    return pd.DataFrame(columns), converted


def _is_number(column: pd.Series) -> bool:
    number = pd.api.types.is_numeric_dtype(column)
    return number or pd.api.types.infer_dtype(column) in ("decimal", "boolean", "empty")


def _with_stand_ins(table: pd.DataFrame) -> pd.DataFrame:
    """The table with values in every gap that may be there, none of which is refused itself."""
    columns: dict[str, object] = {name: table[name] for name in COLUMNS if name in table}
    for name, typical in zip(schema.FEATURE_NAMES, binning.TYPICAL, strict=True):
        columns[name] = table[name].fillna(typical) if name in table else typical
    stand_ins: dict[str, object] = dict.fromkeys(MASK_NAMES, 1)
    stand_ins |= {"split": "train", "sofa": 0.0, "urine_24h": 0.0, "behavior_prob": np.nan}
    if "stay_id" in table:
        stand_ins["subject_id"] = pd.factorize(table["stay_id"])[0]
    for drug, dose in _DRUGS.items():
        doses = pd.to_numeric(table[dose], errors="coerce") if dose in table else 0.0
        stand_ins[f"{drug}_level"] = np.where(np.asarray(doses) > 0, 1, 0)
    return pd.DataFrame({**stand_ins, **columns}, index=table.index)


def _empty_masks(table: pd.DataFrame, source: str) -> list[str]:
    """Masks that say that a value was measured, where there is none."""
    found = []
    for name, mask in zip(schema.MASKED_NAMES, MASK_NAMES, strict=True):
        if mask in table:
            wrong = table[mask].isin([1]) & (table[name].isna() if name in table else True)
            if wrong.any():
                row = int(np.argmax(wrong))
                found.append(f"{source}: column {mask} holds 1 in row {row}, where {name} is empty")
    return found


def _derived(
    table: pd.DataFrame,
    episodes: Episodes,
    converted: dict[str, int],
    options: OwnTableOptions,
    source: str,
) -> OwnCohort:
    """Episodes, which hold stand-ins, with what is derived in their place."""
    fields = {name: np.array(leaf) for name, leaf in vars(episodes).items()}
    absent = {name for name in OTHERWISE if name not in table}
    derived = {name: how.split(";")[0] for name, how in OTHERWISE.items() if name in absent}
    valid = np.asarray(episodes.valid)
    if "subject_id" in absent:
        fields["subject_id"] = fields["stay_id"]
    if "split" in absent:
        fields["split"] = split_of(fields["subject_id"], options.split, options.seed)
    train = fields["split"] == 0
    problems = [] if train.any() else [f"{source}: {empty_training(len(train))}"]

    values = np.full((*valid.shape, schema.NUM_FEATURES), np.nan, np.float32)
    order = np.lexsort([table[name].to_numpy(np.int64) for name in ("step", "stay_id")])
    values[valid] = table.reindex(columns=list(schema.FEATURE_NAMES)).to_numpy(np.float32)[order]
    given = np.isfinite(values)
    for i, mask in enumerate(MASK_NAMES):
        if mask in absent:
            fields["measured"][..., i] = given[..., i]
    recorded = given.sum((0, 1))
    rules = options if recorded[schema.URINE] else replace(options, missing_urine="impute")
    fields["dynamic"], urine, entries = binning.fill_rows(values, fields["length"], train, rules)
    if "urine_24h" in absent:
        fields["urine_24h"] = urine
    if "sofa" in absent:
        fields["sofa"] = binning.score_rows(
            *(fields[name] for name in ("dynamic", "ventilated", "vasopressor_dose", "urine_24h"))
        )
    doses = fields["vasopressor_dose"], fields["fluid_dose"]
    edges, defaulted = binning.fit_dose_edges(*doses, train, options)
    for (drug, column), dose in zip(_DRUGS.items(), doses, strict=True):
        possible = [getattr(edges, drug)]
        if f"{drug}_level" in absent:
            fields[drug] = schema.dose_level(dose, possible[0]).astype(np.int32)
            derived[f"{drug}_level"] = f"from the dose, with the edges {_listed(possible[0])}"
        elif getattr(options, f"{drug}_edges") is None:
            default = getattr(schema.DEFAULT_DOSE_EDGES, drug)
            possible += [default, binning.edges_between(dose, fields[drug], default)]
        agree = [e for e in possible if (schema.dose_level(dose, e) == fields[drug]).all()]
        if agree:
            edges = replace(edges, **{drug: agree[0]})
        else:
            problems.append(
                f"{source}: column {drug}_level does not follow from {column} with the edges "
                f"{_listed(possible[0])}; give other {drug}_edges, or leave the column out"
            )
    if problems:
        raise TableError(problems)
    measured = np.concatenate([fields["measured"], given[..., schema.URINE :]], -1)
    by_feature = measured.sum((0, 1)).tolist()
    counts = {
        "measured": sum(by_feature),
        "given_but_not_measured": int((given & ~measured).sum()),
        "held": entries["held"],
        "filled": entries["filled"],
        "urine_set_to_zero": entries["measured"] - int(recorded.sum()),
        "converted": converted,
        "measured_by_feature": dict(zip(schema.FEATURE_NAMES, by_feature, strict=True)),
        "split": stays_by_split(fields["split"]),
    }
    notes = _notes(table, given[train].sum((0, 1)), defaulted, counts)
    return OwnCohort(padded_episodes(fields), edges, derived, counts, notes)


def _listed(edges: tuple[float, ...]) -> str:
    return ", ".join(f"{edge:.4g}" for edge in edges)


def _notes(
    table: pd.DataFrame, recorded: np.ndarray, defaulted: list[str], counts: JsonDict
) -> list[str]:
    notes = []
    other = [str(name) for name in table if name not in COLUMNS]
    if other:
        notes.append(f"Columns that are not used: {', '.join(other)}.")
    never = [name for name, found in zip(schema.FEATURE_NAMES, recorded, strict=True) if not found]
    if never:
        notes.append(f"In no training stay, so that gaps take typical values: {', '.join(never)}.")
    if defaulted:
        drugs = " or ".join(defaulted)
        notes.append(f"No training stay received a {drugs}: published edges of its levels.")
    empty = [name for name, stays in counts["split"].items() if not stays]
    if empty:
        notes.append(f"No stay is in the split {' or '.join(empty)}.")
    return notes
