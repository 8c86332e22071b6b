"""Recording of a patient: measurement noise, gaps, rounding, and filling of the gaps.

Filling is the rule of `worldmodel.imputation.impute`, one row at a time, so that a policy in
the loop sees the very row that the episodes hold.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import schema, struct
from worldmodel.imputation import hold_steps
from worldmodel.synthetic.latent import Latent, PhysiologyParams, slow_values
from worldmodel.synthetic.patients import Noise, Traits
from worldmodel.synthetic.physiology import Support, blood_ph, pf_ratio

# Features recorded together: chance per step when well, gain at full acuity, gain on a ventilator.
_PANELS: dict[str, tuple[float, float, float]] = {
    "monitor": (0.99, 0.01, 0.0),
    "temperature": (0.90, 0.05, 0.0),
    "oxygen": (0.20, 0.30, 0.75),
    "neurology": (0.78, 0.05, 0.03),
    "chemistry": (0.34, 0.30, 0.0),
    "count": (0.30, 0.25, 0.0),
    "coagulation": (0.16, 0.25, 0.0),
    "liver": (0.08, 0.22, 0.0),
    "gas": (0.04, 0.22, 0.38),
    "lactate": (0.08, 0.42, 0.05),
}
_PANEL_NAMES = tuple(_PANELS)
# feature: (panel, chance of being kept within the panel, additive error, relative error, share of
# the error's variance that lasts for the stay, share of the rest's deviation kept per step)
_RECORDS: dict[str, tuple[str, float, float, float, float, float]] = {
    "heart_rate": ("monitor", 1.0, 7.0, 0.0, 0.2, 0.4),
    "sysbp": ("monitor", 0.99, 4.0, 0.0, 0.0, 0.0),
    "diabp": ("monitor", 0.99, 3.0, 0.0, 0.0, 0.0),
    "meanbp": ("monitor", 0.99, 2.5, 0.0, 0.0, 0.0),
    "resp_rate": ("monitor", 0.99, 3.9, 0.0, 0.45, 0.55),
    "spo2": ("monitor", 0.99, 2.1, 0.0, 0.5, 0.6),
    "temp_c": ("temperature", 1.0, 0.15, 0.0, 0.0, 0.0),
    "fio2": ("oxygen", 1.0, 0.0, 0.0, 0.0, 0.0),
    "gcs_eye": ("neurology", 1.0, 0.8, 0.0, 0.45, 0.9),
    "gcs_verbal": ("neurology", 1.0, 0.6, 0.0, 0.45, 0.9),
    "gcs_motor": ("neurology", 1.0, 1.2, 0.0, 0.45, 0.9),
    "albumin": ("liver", 0.7, 0.10, 0.0, 0.0, 0.0),
    "alt": ("liver", 1.0, 0.0, 0.06, 0.0, 0.0),
    "ast": ("liver", 1.0, 0.0, 0.06, 0.0, 0.0),
    "base_excess": ("gas", 1.0, 0.0, 0.0, 0.0, 0.0),
    "bicarbonate": ("chemistry", 1.0, 0.8, 0.0, 0.0, 0.0),
    "bilirubin_total": ("liver", 1.0, 0.0, 0.05, 0.0, 0.0),
    "bun": ("chemistry", 1.0, 0.0, 0.04, 0.0, 0.0),
    "calcium_free": ("gas", 0.7, 0.02, 0.0, 0.0, 0.0),
    "calcium_total": ("chemistry", 0.85, 0.15, 0.0, 0.0, 0.0),
    "chloride": ("chemistry", 1.0, 1.2, 0.0, 0.0, 0.0),
    "creatinine": ("chemistry", 1.0, 0.0, 0.04, 0.0, 0.0),
    "glucose": ("chemistry", 1.0, 0.0, 0.06, 0.0, 0.0),
    "hemoglobin": ("count", 1.0, 0.2, 0.0, 0.0, 0.0),
    "hematocrit": ("count", 1.0, 0.8, 0.0, 0.0, 0.0),
    "inr": ("coagulation", 1.0, 0.0, 0.03, 0.0, 0.0),
    "lactate": ("lactate", 1.0, 0.0, 0.05, 0.0, 0.0),
    "magnesium": ("chemistry", 0.85, 0.08, 0.0, 0.0, 0.0),
    "paco2": ("gas", 1.0, 2.0, 0.0, 0.0, 0.6),
    "pao2": ("gas", 1.0, 0.0, 0.52, 0.3, 0.7),
    "ph": ("gas", 1.0, 0.008, 0.0, 0.0, 0.0),
    "platelet": ("count", 1.0, 0.0, 0.05, 0.0, 0.0),
    "potassium": ("chemistry", 1.0, 0.12, 0.0, 0.0, 0.0),
    "pt": ("coagulation", 1.0, 0.0, 0.02, 0.0, 0.0),
    "ptt": ("coagulation", 1.0, 0.0, 0.05, 0.0, 0.0),
    "sodium": ("chemistry", 1.0, 1.0, 0.0, 0.0, 0.0),
    "total_co2": ("gas", 1.0, 0.0, 0.0, 0.0, 0.0),
    "wbc": ("count", 1.0, 0.0, 0.06, 0.0, 0.0),
    "output_4hourly": ("monitor", 1.0, 0.0, 0.0, 0.4, 0.75),
}
_PANEL = np.array([_PANEL_NAMES.index(_RECORDS[name][0]) for name in schema.FEATURE_NAMES])
_HOLD_STEPS = hold_steps(schema.STEP_HOURS).astype(np.float32)
_ROUND = np.array(
    [5.0 if f.name in ("fio2", "output_4hourly") else 10.0**-f.decimals for f in schema.FEATURES],
    np.float32,
)


def _record(index: int) -> np.ndarray:
    return np.array([_RECORDS[name][index] for name in schema.FEATURE_NAMES], np.float32)


def _panel(index: int) -> np.ndarray:
    return np.array([row[index] for row in _PANELS.values()], np.float32)


# Medians of recorded values in a pilot run of this world; they fill what was never recorded.
_FILL: dict[str, float] = {
    "heart_rate": 86, "sysbp": 113, "diabp": 60, "meanbp": 75, "resp_rate": 20, "spo2": 97,
    "temp_c": 37.1, "fio2": 45, "gcs_eye": 3, "gcs_verbal": 3, "gcs_motor": 5, "albumin": 2.8,
    "alt": 30, "ast": 47, "base_excess": -1, "bicarbonate": 23, "bilirubin_total": 0.8,
    "bun": 25, "calcium_free": 1.11, "calcium_total": 8.3, "chloride": 103, "creatinine": 1.2,
    "glucose": 136, "hemoglobin": 10.0, "hematocrit": 29.8, "inr": 1.4, "lactate": 1.9,
    "magnesium": 2.1, "paco2": 39, "pao2": 84, "ph": 7.38, "platelet": 156, "potassium": 4.2,
    "pt": 15.8, "ptt": 37.7, "sodium": 139, "total_co2": 24, "wbc": 9.4, "output_4hourly": 180,
}  # fmt: skip


@struct.dataclass
class ObservationParams:
    """Measurement, charting and filling."""

    panel_well: jax.Array = struct.field(default_factory=lambda: _panel(0))  # [10] chance
    panel_acuity: jax.Array = struct.field(default_factory=lambda: _panel(1))  # [10] gain
    panel_ventilated: jax.Array = struct.field(default_factory=lambda: _panel(2))  # [10] gain
    keep: jax.Array = struct.field(default_factory=lambda: _record(1))  # [39] chance
    additive: jax.Array = struct.field(default_factory=lambda: _record(2))  # [39] schema units
    relative: jax.Array = struct.field(default_factory=lambda: _record(3))  # [39] share
    # [39] weights of the lasting and the passing part of an error; their squares sum to 1.
    lasting: jax.Array = struct.field(default_factory=lambda: np.sqrt(_record(4)))
    passing: jax.Array = struct.field(default_factory=lambda: np.sqrt(1.0 - _record(4)))
    # [39] weights of the passing part before and of fresh noise; their squares sum to 1.
    memory: jax.Array = struct.field(default_factory=lambda: _record(5))
    fresh: jax.Array = struct.field(default_factory=lambda: np.sqrt(1.0 - _record(5) ** 2))
    fill: jax.Array = struct.field(
        default_factory=lambda: np.array([_FILL[n] for n in schema.FEATURE_NAMES], np.float32)
    )  # [39] schema units
    # SD of its error below which urine is not charted, but with the next: 11% of steps, in spells.
    urine_uncharted: float = -1.2
    pulse_base: float = 54.5  # mmHg, pulse pressure at normal output
    pulse_age: float = 0.22  # mmHg per year above 64: stiff arteries
    pulse_output: float = 22.0  # mmHg per unit of relative output
    pulse_map: float = 0.30  # mmHg per mmHg of MAP above 78
    mean_share: float = 0.29  # (MAP - DBP) / pulse pressure; from the published means
    sedation: float = 0.40  # consciousness lost on a ventilator


@struct.dataclass
class Record:
    """The recorded values of one patient, and what the next row is computed from."""

    value: jax.Array  # [39] last recorded value
    age: jax.Array  # [39] steps since it was recorded, infinite before the first
    measured: jax.Array  # [39] bool, recorded in this row
    filled: jax.Array  # [39] the row that policies and models are given
    error: jax.Array  # [39] passing part of the errors, standard normals with a memory
    urine: jax.Array  # [6] mL, output of the last rows, newest last
    uncharted: jax.Array  # [] mL produced but not charted yet


def signals(
    latent: Latent,
    support: Support,
    traits: Traits,
    deviation: jax.Array,
    params: ObservationParams,
    physiology: PhysiologyParams,
) -> jax.Array:
    """[39] values in schema units; `deviation` [39] of the errors in SD, zeros for the truth."""
    error = params.additive * deviation
    at = schema.INDEX
    pulse = (
        params.pulse_base
        + params.pulse_age * (traits.static[0] - 64.0)
        + params.pulse_output * (latent.output - 1.0)
        + params.pulse_map * (latent.map - 78.0)
        + error[at["sysbp"]]
        + error[at["diabp"]]
    )
    pulse = jnp.clip(pulse, 15.0, 130.0)
    mean = latent.map + error[at["meanbp"]]
    pf = pf_ratio(latent.lung, traits, physiology)
    pao2 = jnp.clip(pf * support.fio2 / 100.0, 30.0, 500.0)
    paco2 = jnp.clip(latent.paco2 + error[at["paco2"]], 12.0, 140.0)
    ph = blood_ph(latent.bicarbonate, paco2) + error[at["ph"]]
    gas_bicarbonate = 0.0307 * paco2 * jnp.exp(_LN10 * (ph - 6.1))
    lost = latent.brain + params.sedation * support.ventilated
    slow = slow_values(latent.slow)
    values = {
        **slow,
        "heart_rate": latent.heart_rate,
        "meanbp": mean,
        "diabp": mean - params.mean_share * pulse,
        "sysbp": mean + (1.0 - params.mean_share) * pulse,
        "resp_rate": 16.0 + 8.0 * latent.lung + 0.35 * (25.0 - latent.bicarbonate),
        "spo2": 100.0 * _saturation(pao2),
        "fio2": support.fio2,
        "gcs_eye": 4.65 - 3.4 * lost,
        "gcs_verbal": jnp.where(support.ventilated, 0.0, 5.5 - 4.6 * lost),
        "gcs_motor": 7.2 - 4.8 * lost,
        "base_excess": 0.93 * (gas_bicarbonate - 24.4 + 14.8 * (ph - 7.4)),
        "bicarbonate": latent.bicarbonate,
        "hematocrit": 2.862 * slow["hemoglobin"] + 1.216,
        "lactate": latent.lactate,
        "paco2": paco2,
        "pao2": pao2,
        "ph": ph,
        "pt": 11.0 * slow["inr"],
        "total_co2": gas_bicarbonate + 0.0307 * paco2,
        "output_4hourly": latent.urine,
    }
    stacked = jnp.stack([values[name] for name in schema.FEATURE_NAMES])
    # A fourth power is positive and skewed, much as a lognormal, and cheaper; its mean is 1.
    quarter = 0.25 * params.relative
    square = (1.0 + quarter * deviation) ** 2
    factor = square * square / (1.0 + 6.0 * quarter**2 + 3.0 * quarter**4)
    return stacked * factor + jnp.where(_DERIVED, 0.0, error)


_LN10 = float(np.log(10.0))
_DERIVED = np.isin(
    schema.FEATURE_NAMES, ("sysbp", "diabp", "meanbp", "paco2", "ph", "output_4hourly")
)


def _saturation(pao2: jax.Array) -> jax.Array:
    """Severinghaus' oxygen dissociation curve, mmHg to a share."""
    return 1.0 / (1.0 + 23400.0 / (pao2 * (pao2 * pao2 + 150.0)))


def record_step(
    previous: Record | None,
    latent: Latent,
    support: Support,
    traits: Traits,
    noise: Noise,
    params: ObservationParams,
    physiology: PhysiologyParams,
) -> Record:
    """The next row of the chart; `previous` is None at admission."""
    error = noise.observation
    if previous is not None:
        error = params.memory * previous.error + params.fresh * error
    deviation = params.lasting * traits.offset + params.passing * error
    values = signals(latent, support, traits, deviation, params, physiology)
    made = values[schema.URINE] + (0.0 if previous is None else previous.uncharted)
    charted = deviation[schema.URINE] > params.urine_uncharted
    values = values.at[schema.URINE].set(jnp.where(charted, made, 0.0))
    values = jnp.clip(jnp.round(values / _ROUND) * _ROUND, schema.LOW, schema.HIGH)

    acuity = jnp.clip(0.5 * latent.inflammation + 2.0 * latent.hypoperfusion, 0.0, 1.0)
    chance = (
        params.panel_well
        + params.panel_acuity * acuity
        + params.panel_ventilated * support.ventilated
    )
    taken = noise.panel[: len(_PANELS)] < chance
    # Room air is not charted as an oxygen fraction.
    taken = taken.at[_PANEL_NAMES.index("oxygen")].set(
        taken[_PANEL_NAMES.index("oxygen")] & (support.fio2 > 27.0)
    )
    measured = taken[_PANEL] & (noise.missing < params.keep)
    measured = measured.at[schema.URINE].set(True)
    if previous is None:
        held, age = values, jnp.where(measured, 0.0, jnp.inf)
        urine = jnp.zeros(6).at[-1].set(values[schema.URINE])
    else:
        held = jnp.where(measured, values, previous.value)
        age = jnp.where(measured, 0.0, previous.age + 1.0)
        urine = jnp.concatenate([previous.urine[1:], values[schema.URINE][None]])
    return Record(
        value=held,
        age=age,
        measured=measured,
        filled=jnp.where(age <= _HOLD_STEPS, held, params.fill),
        error=error,
        urine=urine,
        uncharted=jnp.where(charted, 0.0, made),
    )


def urine_24h(urine: jax.Array, step: jax.Array) -> jax.Array:
    """Urine, mL, in 24 h from the last rows [6]; scaled up for shorter histories, as in SOFA."""
    return urine.sum() * (6.0 / jnp.minimum(step + 1, 6))
