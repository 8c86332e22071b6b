"""All randomness of a patient: traits that stay fixed during a stay, and the noise of every step.

The noise of a step depends on the patient's key and the step alone: never on the action, on
the position in a batch or on the batch size. Two runs that differ in their treatment
therefore meet the same random numbers (common random numbers).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from worldmodel import keys, schema, struct

PROCESS_NAMES: tuple[str, ...] = (
    "pathogen", "inflammation", "tone", "volume", "heart", "lung", "brain", "carbon_dioxide",
    "bicarbonate", "lactate", "urine", "oxygen",
)  # fmt: skip
SLOW_NAMES: tuple[str, ...] = (
    "temp_c", "albumin", "alt", "ast", "bilirubin_total", "bun", "calcium_free", "calcium_total",
    "chloride", "creatinine", "glucose", "hemoglobin", "inr", "magnesium", "platelet",
    "potassium", "ptt", "sodium", "wbc",
)  # fmt: skip
NUM_SLOW = len(SLOW_NAMES)
_EVENT_NAMES: tuple[str, ...] = (
    "action", "vasopressor_dose", "fluid_dose", "ventilation", "death", "discharge", "outcome",
    "hospital",
)  # fmt: skip
_NUM_NORMAL = len(PROCESS_NAMES) + NUM_SLOW + schema.NUM_FEATURES
NUM_PANELS = 10
_NUM_BYTES = schema.NUM_FEATURES + NUM_PANELS
_NUM_BYTE_WORDS = -(-_NUM_BYTES // 4)
_NUM_WORDS = _NUM_NORMAL + len(_EVENT_NAMES) + _NUM_BYTE_WORDS


@struct.dataclass
class Noise:
    """Exogenous noise of one step of one patient."""

    process: dict[str, jax.Array]  # standard normals, one per name in PROCESS_NAMES
    slow: jax.Array  # [19] standard normals
    observation: jax.Array  # [39] standard normals
    missing: jax.Array  # [39] uniform in (0, 1), 256 levels
    panel: jax.Array  # [10] uniform in (0, 1), 256 levels
    event: dict[str, jax.Array]  # uniform in (0, 1), one per decision by chance


def patient_key(key: jax.Array, patient: jax.Array) -> jax.Array:
    """The key of one patient: all random numbers of the patient come from it."""
    return jax.random.fold_in(key, patient)


def patient_keys(key: jax.Array, patients: ArrayLike) -> jax.Array:
    """[N] keys of patients [N] int32."""
    return jax.vmap(patient_key, (None, 0))(key, jnp.asarray(patients))


def draw(key: jax.Array, step: jax.Array) -> Noise:
    """Noise of one step.

    Args:
      key: the patient's key.
      step: [] int32; 0 is admission, t + 1 the step that follows row t.
    """
    words = jax.random.bits(jax.random.fold_in(key, step), (_NUM_WORDS,))
    normal = _normal(words[:_NUM_NORMAL])
    first, second = len(PROCESS_NAMES), len(PROCESS_NAMES) + NUM_SLOW
    events = _uniform(words[_NUM_NORMAL : _NUM_NORMAL + len(_EVENT_NAMES)])
    parts = jnp.concatenate(_bytes(words[_NUM_NORMAL + len(_EVENT_NAMES) :]))
    chances = (parts.astype(jnp.float32) + 0.5) / 256
    return Noise(
        process={name: normal[i] for i, name in enumerate(PROCESS_NAMES)},
        slow=normal[first:second],
        observation=normal[second:],
        missing=chances[: schema.NUM_FEATURES],
        panel=chances[schema.NUM_FEATURES : _NUM_BYTES],
        event={name: events[i] for i, name in enumerate(_EVENT_NAMES)},
    )


def middle_noise() -> Noise:
    """Noise without randomness: normals are 0, uniforms one half."""
    half = jnp.full((), 0.5)
    return Noise(
        process={name: jnp.zeros(()) for name in PROCESS_NAMES},
        slow=jnp.zeros(NUM_SLOW),
        observation=jnp.zeros(schema.NUM_FEATURES),
        missing=jnp.full(schema.NUM_FEATURES, 0.5),
        panel=jnp.full(NUM_PANELS, 0.5),
        event={name: half for name in _EVENT_NAMES},
    )


def draw_normals(key: jax.Array, tag: int | np.uint32, count: int) -> jax.Array:
    """[count] standard normals of a patient; `tag` is one of `worldmodel.keys`."""
    return _normal(jax.random.bits(jax.random.fold_in(key, tag), (count,)))


def _uniform(words: jax.Array) -> jax.Array:
    """Strictly between 0 and 1."""
    result: jax.Array = ((words >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2**-23)
    return result


def _bytes(words: jax.Array) -> list[jax.Array]:
    """The four bytes of each word, each of the words' shape."""
    return [(words >> shift) & 255 for shift in (0, 8, 16, 24)]


def _normal(words: jax.Array) -> jax.Array:
    """Sum of four uniform bytes, scaled: standard normal but for its end at 3.5 SD.

    Ten times cheaper to compute and to compile than the inverse error function.
    """
    total = sum(_bytes(words), start=jnp.zeros((), words.dtype)).astype(jnp.float32)
    result: jax.Array = (total - 510.0) * jnp.float32((4 * (256**2 - 1) / 12) ** -0.5)
    return result


# name: (set-point, spread between patients, extra per SD beyond the first: a tail of chronic or
# acute disease such as hepatitis or anticoagulation); exp() of LOG_SLOW is in schema units.
_SETPOINTS: dict[str, tuple[float, float, float]] = {
    "temp_c": (36.75, 0.30, 0.0),
    "albumin": (3.15, 0.45, 0.0),
    "alt": (2.80, 0.70, 2.05),
    "ast": (3.15, 0.65, 1.70),
    "bilirubin_total": (-0.65, 0.75, 1.0),
    "bun": (2.82, 0.60, 0.2),
    "calcium_free": (1.15, 0.06, 0.0),
    "calcium_total": (8.62, 0.60, 0.0),
    "chloride": (103.0, 5.8, 0.0),
    "creatinine": (-0.24, 0.55, 0.4),
    "glucose": (4.80, 0.28, 0.0),
    "hemoglobin": (10.7, 1.7, 0.0),
    "inr": (0.10, 0.20, 0.55),
    "magnesium": (2.05, 0.30, 0.0),
    "platelet": (5.42, 0.50, 0.0),
    "potassium": (3.96, 0.47, 0.0),
    "ptt": (3.38, 0.26, 0.45),
    "sodium": (138.7, 4.7, 0.0),
    "wbc": (1.96, 0.31, 0.50),
}
LOG_SLOW: tuple[str, ...] = (
    "alt", "ast", "bilirubin_total", "bun", "creatinine", "glucose", "inr", "platelet", "ptt",
    "wbc",
)  # fmt: skip


def _column(index: int) -> np.ndarray:
    return np.array([_SETPOINTS[name][index] for name in SLOW_NAMES], np.float32)


@struct.dataclass
class PatientParams:
    """Distribution of traits; log spreads are of lognormals with median 1."""

    age_mean: float = 64.2  # years; published cohort 63.8 (SD 16.1), truncated at 18-95
    age_std: float = 16.3  # years
    male_below: float = 0.176  # SD; men are below it: 57%, usual in ICU sepsis
    charlson_mean: float = 5.2  # points, published 5.3 (SD 3.0)
    charlson_std: float = 3.1  # points
    charlson_age_share: float = 0.55  # correlation with age, whose points it contains
    baseline_map_mean: float = 90.5  # mmHg at normal tone, output and no drug
    baseline_map_std: float = 5.0  # mmHg
    baseline_map_age: float = 1.5  # mmHg per SD of age: hypertension
    sensitivity_spread: float = 0.30  # log, vasopressor response
    contractility_spread: float = 0.07  # log, cardiac reserve
    contractility_charlson: float = -0.05  # log per SD of Charlson: heart disease
    leak_spread: float = 0.35  # log, capillary leak
    virulence_spread: float = 0.35  # log, pathogen growth
    delay_mean: float = 0.6  # steps until antibiotics act
    delay_std: float = 1.2  # steps
    chronic_co2_std: float = 7.5  # mmHg, chronic lung disease
    lung_reserve_spread: float = 0.18  # log of the healthy P/F
    setpoint: jax.Array = struct.field(default_factory=lambda: _column(0))  # [19]
    setpoint_spread: jax.Array = struct.field(default_factory=lambda: _column(1))  # [19]
    setpoint_tail: jax.Array = struct.field(default_factory=lambda: _column(2))  # [19]
    liver_correlation: float = 0.85  # of the set-points of AST and ALT
    heart_rate_spread: float = 10.0  # /min, drugs, fitness, rhythm
    lactate_spread: float = 0.30  # log, production and clearance
    lactate_tail: float = 0.35  # log per SD beyond the first: poor clearance
    urine_spread: float = 0.45  # log, habitual diuresis
    bicarbonate_spread: float = 2.6  # mmol/L, diuretics, chronic acidosis
    creatinine_charlson: float = 0.15  # log per SD of Charlson: chronic kidney disease


@struct.dataclass
class Traits:
    """Fixed characteristics of one patient; frailty is never recorded."""

    static: jax.Array  # [3] age in years, 1 = male, Charlson index
    frailty: jax.Array  # [] standard normal, unrecorded severity
    baseline_map: jax.Array  # [] mmHg
    sensitivity: jax.Array  # [] relative vasopressor response
    contractility: jax.Array  # [] relative
    leak: jax.Array  # [] relative
    virulence: jax.Array  # [] relative
    antibiotic_delay: jax.Array  # [] steps
    chronic_co2: jax.Array  # [] mmHg above 40
    lung_reserve: jax.Array  # [] relative healthy P/F
    heart_rate: jax.Array  # [] /min above usual
    bicarbonate: jax.Array  # [] mmol/L above usual
    setpoint: jax.Array  # [19] of the slow variables
    lactate: jax.Array  # [] relative level
    urine: jax.Array  # [] relative output
    start: jax.Array  # [12] standard normals that place the state at admission
    offset: jax.Array  # [39] standard normals, lasting part of the recorded values' errors


_NUM_TRAITS = 16
_NUM_START = 12
_ALT, _AST = SLOW_NAMES.index("alt"), SLOW_NAMES.index("ast")


def draw_traits(key: jax.Array, params: PatientParams) -> Traits:
    """Traits of one patient from the patient's key."""
    count = _NUM_TRAITS + NUM_SLOW + _NUM_START
    z = draw_normals(key, keys.TRAITS, count + schema.NUM_FEATURES)
    age = jnp.clip(params.age_mean + params.age_std * z[0], 18.0, 95.0)
    share = params.charlson_age_share
    z_charlson = share * z[0] + jnp.sqrt(1.0 - share**2) * z[1]
    charlson = jnp.clip(
        jnp.round(params.charlson_mean + params.charlson_std * z_charlson), 0.0, 20.0
    )
    own = z[_NUM_TRAITS : _NUM_TRAITS + NUM_SLOW]
    shared = params.liver_correlation
    ast = shared * own[_ALT] + jnp.sqrt(1.0 - shared**2) * own[_AST]
    own = own.at[_AST].set(ast)
    setpoint = params.setpoint + params.setpoint_spread * own
    setpoint += params.setpoint_tail * jnp.maximum(own - 1.0, 0.0)
    renal = SLOW_NAMES.index("creatinine"), SLOW_NAMES.index("bun")
    for index in renal:
        setpoint = setpoint.at[index].add(params.creatinine_charlson * z_charlson)
    return Traits(
        static=jnp.stack([age, (z[2] < params.male_below) * 1.0, charlson]),
        frailty=z[3],
        baseline_map=params.baseline_map_mean
        + params.baseline_map_std * z[4]
        + params.baseline_map_age * z[0],
        sensitivity=jnp.exp(params.sensitivity_spread * z[5]),
        contractility=jnp.exp(
            params.contractility_spread * z[6] + params.contractility_charlson * z_charlson
        ),
        leak=jnp.exp(params.leak_spread * z[7]),
        virulence=jnp.exp(params.virulence_spread * z[8]),
        antibiotic_delay=jnp.maximum(params.delay_mean + params.delay_std * z[9], 0.0),
        chronic_co2=params.chronic_co2_std * z[10],
        lung_reserve=jnp.exp(params.lung_reserve_spread * z[11]),
        heart_rate=params.heart_rate_spread * z[12],
        bicarbonate=params.bicarbonate_spread * z[13],
        setpoint=setpoint,
        lactate=jnp.exp(
            params.lactate_spread * z[14] + params.lactate_tail * jnp.maximum(z[14] - 1.0, 0.0)
        ),
        urine=jnp.exp(params.urine_spread * z[15]),
        start=z[_NUM_TRAITS + NUM_SLOW : count],
        offset=z[count:],
    )
