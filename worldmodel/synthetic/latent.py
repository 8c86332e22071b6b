"""The latent state of a synthetic patient, and the coefficients that move it.

Coefficients are chosen for plausible directions, sizes and time courses, and calibrated together
so that the recorded values resemble published marginals; none is fitted to patients.

Slow variables (temperature and laboratory values) approach a driven level:

    x' = x + rate * (set-point + W d - x) + noise,   d = (inflammation, liver, kidney, dilution)

Skewed slow variables are on the log scale (`patients.LOG_SLOW`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import struct
from worldmodel.synthetic.patients import LOG_SLOW, SLOW_NAMES, Noise, Traits

# name: rate per step, stationary SD of the noise, then the change of the level at full
# inflammation, liver injury and kidney injury and per litre of oedema and excess volume.
_TABLE: dict[str, tuple[float, float, float, float, float, float]] = {
    "temp_c": (0.45, 0.28, 0.75, -0.3, 0.0, 0.0),  # fever; shock cools
    "albumin": (0.06, 0.10, -0.45, -0.3, 0.0, -0.09),  # negative acute phase, dilution
    "alt": (0.12, 0.25, 0.20, 3.6, 0.0, 0.0),  # shock liver
    "ast": (0.16, 0.25, 0.30, 3.8, 0.0, 0.0),
    "bilirubin_total": (0.06, 0.15, 0.35, 2.2, 0.0, 0.0),
    "bun": (0.09, 0.10, 0.25, 0.0, 1.25, 0.0),
    "calcium_free": (0.25, 0.035, -0.06, 0.0, 0.0, -0.006),
    "calcium_total": (0.20, 0.25, -0.35, 0.0, 0.0, -0.10),
    "chloride": (0.20, 1.6, 0.0, 0.0, -1.0, 0.75),  # chloride-rich fluid
    "creatinine": (0.14, 0.08, 0.05, 0.0, 1.75, 0.0),
    "glucose": (0.35, 0.18, 0.22, 0.0, 0.0, 0.0),  # stress hyperglycaemia
    "hemoglobin": (0.15, 0.40, -0.5, 0.0, -0.5, -0.28),  # dilution
    "inr": (0.12, 0.07, 0.15, 1.3, 0.0, 0.02),
    "magnesium": (0.20, 0.14, 0.0, 0.0, 0.25, 0.0),
    "platelet": (0.10, 0.09, -0.45, -0.9, 0.0, -0.03),  # consumption
    "potassium": (0.30, 0.26, 0.05, 0.0, 0.75, 0.0),
    "ptt": (0.18, 0.14, 0.20, 0.9, 0.0, 0.01),
    "sodium": (0.15, 1.2, 0.0, 0.0, 0.0, 0.10),
    "wbc": (0.20, 0.10, 0.55, 0.0, 0.0, 0.0),
}
_IS_LOG = np.array([name in LOG_SLOW for name in SLOW_NAMES])


def _column(index: int) -> np.ndarray:
    return np.array([_TABLE[name][index] for name in SLOW_NAMES], np.float32)


@struct.dataclass
class SlowParams:
    """[19] tables, in units of the variable or its log."""

    rate: jax.Array = struct.field(default_factory=lambda: _column(0))
    spread: jax.Array = struct.field(default_factory=lambda: _column(1))
    inflammation: jax.Array = struct.field(default_factory=lambda: _column(2))
    liver: jax.Array = struct.field(default_factory=lambda: _column(3))
    kidney: jax.Array = struct.field(default_factory=lambda: _column(4))
    dilution: jax.Array = struct.field(default_factory=lambda: _column(5))
    acute_dilution: float = 0.35  # share of the dilution felt within the step, per litre given


def _level(latent: Latent, traits: Traits, params: SlowParams) -> jax.Array:
    diluted = 0.6 * latent.edema + jnp.maximum(latent.volume, -1.0)
    return (
        traits.setpoint
        + params.inflammation * latent.inflammation
        + params.liver * latent.liver
        + params.kidney * latent.kidney
        + params.dilution * diluted
    )


def start_slow(latent: Latent, traits: Traits, noise: Noise, params: SlowParams) -> jax.Array:
    """[19] values at admission."""
    return _level(latent, traits, params) + params.spread * noise.slow


def advance_slow(
    latent: Latent, litres: jax.Array, traits: Traits, noise: Noise, params: SlowParams
) -> jax.Array:
    """[19] values 4 hours later, after `litres` of fluid."""
    level = _level(latent, traits, params)
    innovation = params.spread * jnp.sqrt(params.rate * (2.0 - params.rate)) * noise.slow
    fresh = params.dilution * params.acute_dilution * litres
    return latent.slow + params.rate * (level - latent.slow) + fresh + innovation


def slow_values(slow: jax.Array) -> dict[str, jax.Array]:
    """Values in schema units by name."""
    values = jnp.where(_IS_LOG, jnp.exp(jnp.where(_IS_LOG, slow, 0.0)), slow)
    return {name: values[i] for i, name in enumerate(SLOW_NAMES)}


@struct.dataclass
class PhysiologyParams:
    """Coefficients of the physiology, per 4-hour step unless another unit is given."""

    # Infection and inflammation (dimensionless, 0 to about 1.2).
    growth: float = 0.14  # pathogen growth rate before antibiotics
    host_kill: float = 0.10  # rate at full host response
    antibiotic_kill: float = 0.205  # rate once antibiotics act
    pathogen_noise: float = 0.10  # log
    inflammation_rate: float = 0.22  # approach to the level the pathogen drives
    inflammation_half: float = 0.70  # pathogen at half of the full inflammation
    inflammation_max: float = 1.25
    translocation: float = 0.35  # inflammation per unit of gut ischaemia or hypoperfusion
    inflammation_noise: float = 0.035
    # Vascular tone: 1 is healthy.
    vasoplegia: float = 0.53  # tone lost at full inflammation
    vasoplegia_rate: float = 0.45
    tone_noise: float = 0.06  # stationary SD of a slow fluctuation of tone
    tone_memory: float = 0.70
    vasopressor_max: float = 0.60  # tone gained at infinite dose, Emax model
    vasopressor_half: float = 0.20  # mcg/kg/min, dose of half the gain
    acidosis_ph: float = 7.30  # below, vessels respond less
    acidosis_loss: float = 1.8  # share of the response lost per pH unit
    # Volume (litres relative to normal) and oedema (litres of excess).
    leak_base: float = 0.22  # share of infused fluid leaving the vessels within the step
    leak_inflammation: float = 0.50
    leak_loss: float = 0.05  # litres lost to the tissue at full inflammation without infusion
    volume_return: float = 0.18  # share of a deficit or excess made up (maintenance, diuresis)
    volume_noise: float = 0.08  # litres
    edema_clear: float = 0.05
    edema_inflow: float = 0.10  # litres entering the tissue per litre of excess volume
    # Heart: output relative to normal, Frank-Starling with saturation.
    preload_slope: float = 0.48  # relative preload per litre
    preload_half: float = 0.55
    heart_depression: float = 0.30  # output lost at full inflammation and hypoperfusion
    heart_rate_step: float = 0.25  # approach of depression to its target
    heart_noise: float = 0.025
    afterload: float = 0.55  # output lost per unit of tone above 1
    pressure_gain: float = 0.80  # exponent of output x tone in MAP: baroreflex
    rate_base: float = 72.0  # heart rate, /min
    rate_inflammation: float = 24.0  # /min at full inflammation
    rate_deficit: float = 32.0  # /min per unit of lacking preload
    rate_vasopressor: float = 14.0  # /min at the highest doses (beta effect)
    rate_hypotension: float = 12.0  # /min at MAP far below 65
    # Perfusion.
    critical_map: float = 58.0  # mmHg at half of the flow
    critical_shift: float = 0.20  # mmHg per mmHg of habitual pressure above 85
    critical_slope: float = 4.5  # mmHg
    flow_half: float = 0.35  # relative output at which delivery saturates
    ischaemia_memory: float = 0.62
    ischaemia_dose: float = 0.60  # mcg/kg/min at half of the ischaemia
    ischaemia_pressure: float = 0.030  # per mmHg above 82 under a vasopressor
    # Lactate, mmol/L.
    lactate_rate: float = 0.50
    lactate_base: float = 0.3
    lactate_hypoperfusion: float = 6.0
    lactate_inflammation: float = 0.45
    lactate_ischaemia: float = 2.0
    lactate_liver: float = 1.2
    lactate_noise: float = 0.07  # log
    # Organ injury, 0 to 1.
    lung_rate: float = 0.14
    lung_base: float = 0.22
    lung_inflammation: float = 0.42
    lung_edema: float = 1.15  # at very large oedema
    lung_edema_half: float = 3.5  # litres
    lung_volume: float = 0.20  # per litre of excess volume
    lung_noise: float = 0.035
    kidney_hit: float = 0.22  # per unit of hypoperfusion
    kidney_ischaemia: float = 0.13
    kidney_inflammation: float = 0.015
    kidney_congestion: float = 0.08  # per litre of excess volume above 0.8
    kidney_recovery: float = 0.065
    liver_hit: float = 0.16
    liver_ischaemia: float = 0.10
    liver_recovery: float = 0.06
    brain_rate: float = 0.25
    brain_inflammation: float = 0.34
    brain_hypoperfusion: float = 0.85
    brain_noise: float = 0.03
    # Acid-base and gas exchange.
    bicarbonate_base: float = 25.6  # mmol/L
    bicarbonate_chronic: float = 0.38  # mmol/L per mmHg of chronic hypercapnia
    bicarbonate_rate: float = 0.35
    bicarbonate_lactate: float = 0.85  # mmol/L lost per mmol/L of lactate above 1.5
    bicarbonate_kidney: float = 4.5  # mmol/L lost at full kidney injury
    bicarbonate_saline: float = 0.45  # mmol/L lost per litre of excess chloride-rich fluid
    bicarbonate_noise: float = 1.3
    co2_compensation: float = 0.75  # mmHg per mmol/L of metabolic acidosis (1.2 if awake)
    co2_lung: float = 9.0  # mmHg at full lung injury
    co2_memory: float = 0.75
    co2_noise: float = 5.0  # mmHg
    pf_healthy: float = 500.0  # mmHg
    pf_loss: float = 1.75  # log of P/F lost at full lung injury
    # Urine, mL.
    urine_base: float = 325.0
    urine_pressure: float = 62.0  # mmHg at half of the flow
    urine_slope: float = 6.0  # mmHg
    urine_kidney: float = 0.88  # share lost at full kidney injury
    urine_volume: float = 0.30  # relative per litre
    urine_noise: float = 0.50  # stationary SD of a slow fluctuation, log
    urine_memory: float = 0.85
    slow: SlowParams = struct.field(default_factory=SlowParams)


@struct.dataclass
class Latent:
    """True state of one patient at the start of a step; every leaf but `slow` is a scalar."""

    pathogen: jax.Array
    inflammation: jax.Array
    vasoplegia: jax.Array
    tone_drift: jax.Array
    volume: jax.Array  # L
    edema: jax.Array  # L
    depression: jax.Array
    ischaemia: jax.Array
    lung: jax.Array
    kidney: jax.Array
    liver: jax.Array
    brain: jax.Array
    lactate: jax.Array  # mmol/L
    bicarbonate: jax.Array  # mmol/L
    co2_drift: jax.Array  # mmHg
    paco2: jax.Array  # mmHg
    urine_drift: jax.Array  # log
    slow: jax.Array  # [19] laboratory values and temperature, logs where skewed
    map: jax.Array  # mmHg
    output: jax.Array  # relative cardiac output
    heart_rate: jax.Array  # /min
    hypoperfusion: jax.Array  # 0 to 1
    urine: jax.Array  # mL of the last 4 h
