"""Recorded or simulated ICU stays as one PyTree of arrays, and as a table with one row per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pandas as pd

from worldmodel import schema, struct
from worldmodel.errors import InputError

MASK_SUFFIX = "_measured"
MASK_NAMES: tuple[str, ...] = tuple(name + MASK_SUFFIX for name in schema.MASKED_NAMES)
STEP_COLUMNS: dict[str, str] = {
    "vasopressor": "vasopressor_level",
    "fluid": "fluid_level",
    "vasopressor_dose": "vasopressor_dose",
    "fluid_dose": "fluid_ml",
    "ventilated": "ventilated",
    "sofa": "sofa",
    "urine_24h": "urine_24h",
    "behavior_prob": "behavior_prob",
}
COLUMNS: tuple[str, ...] = (
    "stay_id", "subject_id", "split", "step",
    *schema.FEATURE_NAMES, *MASK_NAMES, *schema.STATIC_NAMES,
    *STEP_COLUMNS.values(), "died_90d", "died_in_hospital",
)  # fmt: skip
# column -> lowest and highest value; those of features are the schema's.
RANGES: dict[str, tuple[float, float]] = {
    **{feature.name: (feature.low, feature.high) for feature in schema.FEATURES},
    "age": (0, 130),
    "charlson": (0, 60),
    "vasopressor_dose": (0, np.inf),
    "fluid_ml": (0, np.inf),
    "sofa": (0, 24),
    "urine_24h": (0, np.inf),
}
_UNITS = {feature.name: f" {feature.unit}" for feature in schema.FEATURES} | {"age": " years"}
_FLAGS = ("male", "ventilated", "died_90d", "died_in_hospital")
_WHOLE = ("stay_id", "subject_id", "step")
_OF_STAYS = (*schema.STATIC_NAMES, "split", "subject_id", "died_90d", "died_in_hospital")


def identities(numbers: npt.ArrayLike) -> jax.Array | np.ndarray:
    """Numbers of stays or patients [N], every digit kept.

    JAX has no integers of 64 bits by default: numbers that fit are int32, others stay NumPy's
    int64 for all of the array. Random streams take the lower 32 bits.
    """
    found = np.asarray(numbers, np.int64)
    narrow = found.astype(np.int32)
    return jnp.asarray(narrow) if np.array_equal(narrow, found) else found


@struct.dataclass
class Episodes:
    """N stays padded to T steps; rows at or after `length` are zero.

    Row t holds what is known when step t begins, before its treatment is chosen, and the
    treatment given during step t; the transition (row t, treatment t) -> row t + 1 is what the
    State Model learns. No event after that moment changes the row (`schema`, contract of time).
    """

    dynamic: jax.Array  # [N, T, 39] float32, physical units, missing values imputed
    measured: jax.Array  # [N, T, 38] bool, recorded since the row before
    static: jax.Array  # [N, 3] float32: age in years, 1 = male, Charlson index
    vasopressor: jax.Array  # [N, T] int32 level 0-4
    fluid: jax.Array  # [N, T] int32 level 0-4
    vasopressor_dose: jax.Array  # [N, T] float32, norepinephrine equivalents, mcg/kg/min
    fluid_dose: jax.Array  # [N, T] float32, mL per step, tonicity-corrected
    ventilated: jax.Array  # [N, T] bool, invasive ventilation
    sofa: jax.Array  # [N, T] float32, SOFA with the vasopressor of the step before
    urine_24h: jax.Array  # [N, T] float32, mL in the 24 h before
    behavior_prob: jax.Array  # [N, T] float32, clinician's probability of the action; NaN unknown
    length: jax.Array  # [N] int32 number of steps
    died_90d: jax.Array  # [N] bool, death within 90 days
    died_in_hospital: jax.Array  # [N] bool
    stay_id: jax.Array | np.ndarray  # [N] int32, or NumPy int64 (`identities`)
    subject_id: jax.Array | np.ndarray  # [N] int32, or NumPy int64 (`identities`)
    split: jax.Array  # [N] int32, index into schema.SPLITS

    @property
    def num_stays(self) -> int:
        """Number of stays N."""
        return self.length.shape[0]

    @property
    def num_steps(self) -> int:
        """Padded number of steps T."""
        return self.vasopressor.shape[1]

    @property
    def valid(self) -> jax.Array:
        """[N, T] bool: True on recorded steps."""
        result: jax.Array = _valid(self.length, self.num_steps)
        return result

    @property
    def action(self) -> jax.Array:
        """[N, T] int32 joint action 0-24."""
        result: jax.Array = schema.action_index(self.vasopressor, self.fluid)
        return result

    def select(self, index: np.ndarray | jax.Array | slice) -> Episodes:
        """The stays picked by an index array or boolean mask [N].

        Rows are picked by NumPy: a program for every number of stays would take longer to
        compile than to copy them.
        """
        rows = index if isinstance(index, slice) else np.asarray(index)

        def pick(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
            picked = np.asarray(leaf)[rows]
            return picked if isinstance(leaf, np.ndarray) else jax.device_put(picked)

        result: Episodes = jax.tree.map(pick, self)
        return result

    def of_split(self, name: str) -> Episodes:
        """The stays of one split: "train", "validation" or "test"."""
        return self.select(np.asarray(self.split) == schema.SPLITS.index(name))


@partial(jax.jit, static_argnums=1)
def _valid(length: jax.Array, num_steps: int) -> jax.Array:
    return jnp.arange(num_steps) < length[:, None]


def to_table(episodes: Episodes) -> pd.DataFrame:
    """One row per stay and step, with the columns of `COLUMNS`, in physical units."""
    host = jax.tree.map(np.asarray, episodes)
    stay, step = np.nonzero(np.asarray(episodes.valid))
    columns: dict[str, object] = {
        "stay_id": host.stay_id[stay].astype(np.int64),
        "subject_id": host.subject_id[stay].astype(np.int64),
        "split": pd.Categorical.from_codes(host.split[stay], list(schema.SPLITS)),
        "step": step.astype(np.int32),
    }
    dynamic, measured = host.dynamic[stay, step], host.measured[stay, step]
    columns |= {name: dynamic[:, i] for i, name in enumerate(schema.FEATURE_NAMES)}
    columns |= {name: measured[:, i] for i, name in enumerate(MASK_NAMES)}
    columns |= {name: host.static[stay, i] for i, name in enumerate(schema.STATIC_NAMES)}
    columns |= {column: getattr(host, name)[stay, step] for name, column in STEP_COLUMNS.items()}
    columns |= {name: getattr(host, name)[stay] for name in ("died_90d", "died_in_hospital")}
    return pd.DataFrame(columns, columns=list(COLUMNS))


def from_table(
    table: pd.DataFrame, *, source: str = "table", shared_patients: bool = False
) -> Episodes:
    """Episodes from a table as `to_table` writes it.

    Args:
      table: rows in any order; the steps of a stay must be 0, 1, 2, ...
      source: named in errors.
      shared_patients: allow stays of one patient in several splits.

    Raises:
      InputError: a column is missing, a value is NaN, infinite, outside its range (`RANGES`) or
        no whole number where one is needed, a dose does not fit its level, a split is unknown, a
        stay's steps have gaps, what belongs to a stay changes within it, or a patient is in two
        splits.
    """
    _check_table(table, source, shared_patients=shared_patients)
    table = table.sort_values(["stay_id", "step"], kind="stable").reset_index(drop=True)
    stays, first, lengths = np.unique(
        table["stay_id"].to_numpy(np.int64), return_index=True, return_counts=True
    )
    steps = table["step"].to_numpy(np.int64)
    rows = np.repeat(np.arange(len(stays)), lengths)
    patients = table["subject_id"].to_numpy(np.int64)[first]

    def padded(values: np.ndarray) -> np.ndarray:
        out = np.zeros((len(stays), int(lengths.max()), *values.shape[1:]), values.dtype)
        out[rows, steps] = values
        return out

    def block(names: tuple[str, ...], dtype: type) -> np.ndarray:
        result: np.ndarray = table[list(names)].to_numpy(dtype)
        return result

    dtypes = {"vasopressor": np.int32, "fluid": np.int32, "ventilated": np.bool_}
    per_step = {
        name: padded(table[column].to_numpy(dtypes.get(name, np.float32)))
        for name, column in STEP_COLUMNS.items()
    }
    per_stay = {
        name: table[name].to_numpy(np.bool_)[first] for name in ("died_90d", "died_in_hospital")
    }
    split = pd.Categorical(table["split"].to_numpy()[first], categories=list(schema.SPLITS))
    arrays = {
        "dynamic": padded(block(schema.FEATURE_NAMES, np.float32)),
        "measured": padded(block(MASK_NAMES, np.bool_)),
        "static": block(schema.STATIC_NAMES, np.float32)[first],
        "length": lengths.astype(np.int32),
        "split": split.codes.astype(np.int32),
        **per_step,
        **per_stay,
    }
    return Episodes(
        stay_id=identities(stays),
        subject_id=identities(patients),
        **{name: jnp.asarray(array) for name, array in arrays.items()},
    )


def table_problems(table: pd.DataFrame, *, source: str = "table") -> list[str]:
    """All that `from_table` would refuse in a table, one sentence per column."""
    missing = [column for column in COLUMNS if column not in table.columns]
    found = [f"{source}: columns missing: {', '.join(missing)}"] if missing else []
    if table.empty:
        return [*found, f"{source}: no rows"]
    bad = set(missing)
    for columns, check in _checks(table, source):
        if bad.isdisjoint(columns):
            try:
                check()
            except InputError as error:
                found.append(str(error))
                bad.add(columns[0])
    return found


def _check_table(table: pd.DataFrame, source: str, *, shared_patients: bool) -> None:
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise InputError(
            f"{source}: columns missing: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; write episodes with save_episodes"
        )
    if table.empty:
        raise InputError(f"{source}: no rows; the cohort is empty")
    for _, check in _checks(table, source, shared_patients=shared_patients):
        check()


def _checks(
    table: pd.DataFrame, source: str, *, shared_patients: bool = False
) -> Iterator[tuple[tuple[str, ...], Callable[[], None]]]:
    """The columns that each check needs, the one at fault first, and the check, which raises."""
    for column in COLUMNS:
        if column != "split":
            yield (column,), partial(_check_numbers, table, column, source)
    levels = dict.fromkeys(("vasopressor_level", "fluid_level"), range(schema.NUM_LEVELS))
    flags = dict.fromkeys((*MASK_NAMES, *_FLAGS), (0, 1))
    for column, allowed in {**levels, **flags, "split": schema.SPLITS}.items():
        yield (column,), partial(_check_choice, table, column, allowed, source)
    for column in RANGES:
        yield (column,), partial(_check_range, table, column, source)
    for column, dose in (("vasopressor_level", "vasopressor_dose"), ("fluid_level", "fluid_ml")):
        yield (column, dose), partial(_check_doses, table, column, dose, source)
    yield ("behavior_prob",), partial(_check_probabilities, table, source)
    yield ("step", "stay_id"), partial(_check_steps, table, source)

    @cache
    def of_stays() -> np.ndarray:
        """[rows] the first row of each row's stay."""
        stays = table["stay_id"].to_numpy(np.int64)
        _, first, stay = np.unique(stays, return_index=True, return_inverse=True)
        found: np.ndarray = first[stay]
        return found

    for column in _OF_STAYS:
        yield (column, "stay_id"), partial(_check_constant, table, column, source, of_stays)
    if not shared_patients:
        yield ("subject_id", "split", "stay_id"), partial(_check_patients, table, source)


def _check_choice(table: pd.DataFrame, column: str, allowed: Sequence[object], source: str) -> None:
    _refuse(table, column, ~table[column].isin([*allowed]), f"expected one of {[*allowed]}", source)


def _check_range(table: pd.DataFrame, column: str, source: str) -> None:
    low, high = RANGES[column]
    values = table[column].to_numpy(np.float32)
    outside = pd.Series((values < np.float32(low)) | (values > np.float32(high)))
    limits = f"{low:g} or more" if np.isinf(high) else f"{low:g} to {high:g}"
    _refuse(table, column, outside, f"expected {limits}{_UNITS.get(column, '')}", source)


def _check_probabilities(table: pd.DataFrame, source: str) -> None:
    probability = table["behavior_prob"]
    outside = (probability <= 0) | (probability > 1)
    _refuse(table, "behavior_prob", outside, "expected above 0, at most 1, or NaN", source)


def _check_numbers(table: pd.DataFrame, column: str, source: str) -> None:
    if pd.api.types.infer_dtype(table[column]) in ("string", "mixed", "bytes", "datetime64"):
        raise InputError(f"{source}: column {column} is not numeric")
    try:
        values = table[column].to_numpy(np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{source}: column {column} is not numeric") from None
    if column != "behavior_prob" and not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise InputError(
            f"{source}: column {column} is NaN or infinite in row {row}; impute it first"
        )
    if column in _WHOLE:
        broken = pd.Series((values != np.rint(values)) | (np.abs(values) >= 2.0**63))
        _refuse(table, column, broken, "expected a whole number", source)


def _check_doses(table: pd.DataFrame, column: str, dose: str, source: str) -> None:
    """Level 0 is no dose, and a higher level is never a smaller dose."""
    levels, doses = table[column].to_numpy(np.int32), table[dose].to_numpy(np.float64)
    largest = 0.0
    for level in range(schema.NUM_LEVELS):
        here = levels == level
        wrong = here & ((doses > 0) != (level > 0))
        wrong |= here & (level > 0) & (doses < largest)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"{source}: column {column} holds {level} in row {row}, where {dose} is "
                f"{doses[row]:g}; level 0 is no dose, and higher levels are larger doses"
            )
        largest = max(largest, float(doses[here].max(initial=0.0)))


def _check_steps(table: pd.DataFrame, source: str) -> None:
    stays, steps = (table[name].to_numpy(np.int64) for name in ("stay_id", "step"))
    order = np.lexsort((steps, stays))
    stays, steps = stays[order], steps[order]
    _, first, lengths = np.unique(stays, return_index=True, return_counts=True)
    wrong = steps != np.arange(len(steps)) - np.repeat(first, lengths)
    if wrong.any():
        raise InputError(
            f"{source}: steps of stay {stays[np.argmax(wrong)]} are not 0, 1, 2, ...; "
            "rebuild the cohort"
        )


def _check_constant(
    table: pd.DataFrame, column: str, source: str, of_stays: Callable[[], np.ndarray]
) -> None:
    values = table[column].to_numpy()
    changed = values != values[of_stays()]
    if changed.any():
        bad = int(table["stay_id"].iloc[np.argmax(changed)])
        raise InputError(f"{source}: column {column} changes within stay {bad}")


def _check_patients(table: pd.DataFrame, source: str) -> None:
    pairs = table[["subject_id", "split"]].drop_duplicates()
    twice = pairs[pairs["subject_id"].duplicated()]
    if len(twice):
        raise InputError(
            f"{source}: patient {int(twice['subject_id'].iloc[0])} has stays in more than one "
            f"split ({len(twice)} such); split by patient"
        )


def _refuse(table: pd.DataFrame, column: str, bad: pd.Series, expected: str, source: str) -> None:
    if bad.any():
        row = int(np.argmax(bad.to_numpy()))
        value = table[column].iloc[row]
        raise InputError(f"{source}: column {column} holds {value} in row {row}; {expected}")
