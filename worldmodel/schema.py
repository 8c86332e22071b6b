"""Features, units, ranges and actions: the single owner of every order.

Feature names and their order, window lengths and action levels follow SepsisAgent
(arXiv 2605.14723), so that its published scaler and checkpoints can be read. Physiologic
ranges bound what a living patient can show; display precision follows bedside convention.
Hold times (how long a measurement may stand in for a missing one) follow the AI Clinician's
sample-and-hold table (Komorowski et al., Nature Medicine 2018), with potassium at 14 h like
the other electrolytes (144 h in two public ports looks like a misprint).

Contract of time, kept by records, synthetic world, simulator and environments: row t is what is
known at the moment t x 4 h, before treatment t is chosen. Values were recorded since row t - 1
or are held from earlier; urine is that of the step that ended; SOFA scores the row's own values,
the urine of the last 24 h and the vasopressor of the step before. Treatment t is given from
moment t to t + 1, and its effect is in row t + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jaxtyping import Int, Num

if TYPE_CHECKING:
    import jax

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Feature:
    """One dynamic feature of a patient.

    Attributes:
      name: column name.
      unit: physical unit.
      low, high: physiologic range; simulated values are projected into it, recorded values
        outside it are treated as errors of charting.
      decimals: digits shown to people.
      hold_hours: how long a recorded value is carried forward.
      group: "vital", "lab" or "output".
      integer: whether the bedside scale has whole steps only.
    """

    name: str
    unit: str
    low: float
    high: float
    decimals: int
    hold_hours: float
    group: str
    integer: bool = False


FEATURES: tuple[Feature, ...] = (
    Feature("heart_rate", "/min", 20, 250, 0, 2, "vital"),
    Feature("sysbp", "mmHg", 30, 300, 0, 2, "vital"),
    Feature("diabp", "mmHg", 10, 200, 0, 2, "vital"),
    Feature("meanbp", "mmHg", 20, 200, 0, 2, "vital"),
    Feature("resp_rate", "/min", 2, 70, 0, 2, "vital"),
    Feature("spo2", "%", 50, 100, 0, 2, "vital"),
    Feature("temp_c", "degC", 25, 43, 1, 6, "vital"),
    Feature("fio2", "%", 21, 100, 0, 12, "vital"),
    Feature("gcs_eye", "points", 1, 4, 0, 6, "vital", integer=True),
    Feature("gcs_verbal", "points", 1, 5, 0, 6, "vital", integer=True),
    Feature("gcs_motor", "points", 1, 6, 0, 6, "vital", integer=True),
    Feature("albumin", "g/dL", 0.5, 7, 1, 28, "lab"),
    Feature("alt", "U/L", 1, 10000, 0, 28, "lab"),
    Feature("ast", "U/L", 1, 20000, 0, 28, "lab"),
    Feature("base_excess", "mmol/L", -40, 40, 0, 8, "lab"),
    Feature("bicarbonate", "mmol/L", 2, 60, 0, 8, "lab"),
    Feature("bilirubin_total", "mg/dL", 0.1, 80, 1, 28, "lab"),
    Feature("bun", "mg/dL", 1, 250, 0, 28, "lab"),
    Feature("calcium_free", "mmol/L", 0.3, 3, 2, 28, "lab"),
    Feature("calcium_total", "mg/dL", 3, 20, 1, 28, "lab"),
    Feature("chloride", "mmol/L", 60, 160, 0, 14, "lab"),
    Feature("creatinine", "mg/dL", 0.1, 30, 1, 28, "lab"),
    Feature("glucose", "mg/dL", 10, 1500, 0, 14, "lab"),
    Feature("hemoglobin", "g/dL", 2, 25, 1, 14, "lab"),
    Feature("hematocrit", "%", 6, 75, 1, 28, "lab"),
    Feature("inr", "ratio", 0.5, 20, 1, 28, "lab"),
    Feature("lactate", "mmol/L", 0.2, 30, 1, 8, "lab"),
    Feature("magnesium", "mg/dL", 0.3, 10, 1, 28, "lab"),
    Feature("paco2", "mmHg", 8, 200, 0, 8, "lab"),
    Feature("pao2", "mmHg", 15, 700, 0, 8, "lab"),
    Feature("ph", "pH", 6.6, 8.0, 2, 8, "lab"),
    Feature("platelet", "K/uL", 1, 2000, 0, 28, "lab"),
    Feature("potassium", "mmol/L", 1, 12, 1, 14, "lab"),
    Feature("pt", "s", 5, 150, 1, 28, "lab"),
    Feature("ptt", "s", 10, 200, 1, 28, "lab"),
    Feature("sodium", "mmol/L", 95, 190, 0, 14, "lab"),
    Feature("total_co2", "mmol/L", 2, 70, 0, 8, "lab"),
    Feature("wbc", "K/uL", 0.1, 500, 1, 28, "lab"),
    Feature("output_4hourly", "mL", 0, 4000, 0, 4, "output"),
)

FEATURE_NAMES: tuple[str, ...] = tuple(feature.name for feature in FEATURES)
INDEX: dict[str, int] = {name: i for i, name in enumerate(FEATURE_NAMES)}
NUM_FEATURES = len(FEATURES)  # 39
URINE = INDEX["output_4hourly"]
MASKED_NAMES: tuple[str, ...] = FEATURE_NAMES[:URINE]
NUM_MASKED = len(MASKED_NAMES)  # 38: urine output has no mask

STATIC_NAMES: tuple[str, ...] = ("age", "male", "charlson")
NUM_STATIC = len(STATIC_NAMES)

LOW = np.array([feature.low for feature in FEATURES], np.float32)
HIGH = np.array([feature.high for feature in FEATURES], np.float32)
HOLD_HOURS = np.array([feature.hold_hours for feature in FEATURES], np.float32)

STATE_WINDOW = 6  # rows seen by the State Model
OUTCOME_WINDOW = 12  # rows seen by the Outcome Model
STEP_HOURS = 4.0

NUM_LEVELS = 5  # per drug
NUM_ACTIONS = NUM_LEVELS**2
ACTION_WIDTH = 2 * NUM_LEVELS  # one-hot vasopressor, one-hot fluid
LEVEL_NAMES: tuple[str, ...] = ("None", "Low", "Medium", "High", "Very High")

SPLITS: tuple[str, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class DoseEdges:
    """Upper edges of dose levels 1 to 3; level 0 is no dose, level 4 is above the last edge.

    Attributes:
      vasopressor: [3] norepinephrine equivalents, mcg/kg/min.
      fluid: [3] tonicity-corrected volume, mL per step.
    """

    vasopressor: tuple[float, float, float]
    fluid: tuple[float, float, float]


# Quartile edges of the non-zero doses as the AI Clinician publishes them (Komorowski et al.
# 2018): the default where no cohort has been seen, as in the synthetic world.
DEFAULT_DOSE_EDGES = DoseEdges(vasopressor=(0.08, 0.22, 0.45), fluid=(50.0, 180.0, 530.0))


LevelT = TypeVar("LevelT", int, np.ndarray, "jax.Array")


def action_index(vasopressor: LevelT, fluid: LevelT) -> LevelT:
    """Joint action 0-24 of two levels 0-4, `5 * vasopressor + fluid`; numbers or arrays."""
    action: LevelT = NUM_LEVELS * vasopressor + fluid
    return action


def action_levels(action: LevelT) -> tuple[LevelT, LevelT]:
    """Inverse of `action_index`: `(vasopressor, fluid)`, levels 0-4."""
    return action // NUM_LEVELS, action % NUM_LEVELS


def action_name(action: int) -> str:
    """Readable name of a joint action, such as `vasopressor Low, fluid None`."""
    vasopressor, fluid = action_levels(action)
    return f"vasopressor {LEVEL_NAMES[vasopressor]}, fluid {LEVEL_NAMES[fluid]}"


def dose_level(dose: Num[np.ndarray, "*b"], edges: tuple[float, ...]) -> Int[np.ndarray, "*b"]:
    """Levels 0 to 4 of doses (any shape, same unit as `edges`): 0 iff the dose is zero."""
    dose = np.asarray(dose)
    return np.where(dose > 0, 1 + np.searchsorted(np.asarray(edges), dose, side="left"), 0)


def level_doses(edges: tuple[float, float, float]) -> tuple[float, ...]:
    """A representative dose for each of the five levels: mid-points, and 1.5 x the last edge."""
    first, second, third = edges
    return (0.0, first / 2, (first + second) / 2, (second + third) / 2, 1.5 * third)
