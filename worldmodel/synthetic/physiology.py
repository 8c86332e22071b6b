"""How a septic patient changes in 4 hours under a treatment.

A lumped mechanistic model: infection -> inflammation -> vasoplegia, capillary leak and cardiac
depression; arterial pressure from output and tone; organ injury from hypoperfusion,
vasopressor ischaemia, congestion and inflammation. Coefficients are chosen for plausible
directions, sizes and time courses; none is fitted to patients.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct

from worldmodel.synthetic.noise import SLOW_NAMES, Noise
from worldmodel.synthetic.patients import Traits
from worldmodel.synthetic.slow import SlowParams, advance_slow, start_slow

_HEMOGLOBIN = SLOW_NAMES.index("hemoglobin")


@struct.dataclass
class PhysiologyParams:
    """Coefficients per 4-hour step unless the unit says otherwise."""

    # Infection and inflammation (dimensionless, 0 to about 1.2).
    growth: float = 0.14  # pathogen growth rate before antibiotics
    host_kill: float = 0.10  # rate at full host response
    antibiotic_kill: float = 0.24  # rate once antibiotics act
    pathogen_noise: float = 0.10  # log
    inflammation_rate: float = 0.22  # approach to the level the pathogen drives
    inflammation_half: float = 0.70  # pathogen at half of the full inflammation
    inflammation_max: float = 1.25
    translocation: float = 0.35  # inflammation per unit of gut ischaemia or hypoperfusion
    inflammation_noise: float = 0.035
    # Vascular tone: 1 is healthy.
    vasoplegia: float = 0.53  # tone lost at full inflammation
    vasoplegia_rate: float = 0.45
    tone_noise: float = 0.07  # stationary SD of a slow fluctuation of tone
    tone_memory: float = 0.70
    vasopressor_max: float = 0.60  # tone gained at infinite dose, Emax model
    vasopressor_half: float = 0.20  # mcg/kg/min, dose of half the gain
    acidosis_ph: float = 7.30  # below, vessels respond less
    acidosis_loss: float = 1.8  # share of the response lost per pH unit
    # Volume (litres relative to normal) and oedema (litres of excess).
    leak_base: float = 0.22  # share of infused fluid leaving the vessels within the step
    leak_inflammation: float = 0.50
    leak_loss: float = 0.05  # litres lost to the tissue at full inflammation without infusion
    volume_return: float = 0.12  # share of a deficit or excess made up (maintenance, diuresis)
    volume_noise: float = 0.08  # litres
    edema_clear: float = 0.05
    edema_inflow: float = 0.10  # litres entering the tissue per litre of excess volume
    # Heart: output relative to normal, Frank-Starling with saturation.
    preload_slope: float = 0.55  # relative preload per litre
    preload_half: float = 0.55
    heart_depression: float = 0.30  # output lost at full inflammation and hypoperfusion
    heart_rate_step: float = 0.25  # approach of depression to its target
    heart_noise: float = 0.025
    afterload: float = 0.55  # output lost per unit of tone above 1
    pressure_gain: float = 0.85  # exponent of output x tone in MAP: baroreflex
    rate_base: float = 72.0  # heart rate, /min
    rate_inflammation: float = 24.0  # /min at full inflammation
    rate_deficit: float = 32.0  # /min per unit of lacking preload
    rate_vasopressor: float = 14.0  # /min at the highest doses (beta effect)
    rate_hypotension: float = 12.0  # /min at MAP far below 65
    # Perfusion.
    critical_map: float = 56.0  # mmHg at half of the flow
    critical_shift: float = 0.20  # mmHg per mmHg of habitual pressure above 85
    critical_slope: float = 4.5  # mmHg
    flow_half: float = 0.35  # relative output at which delivery saturates
    ischaemia_memory: float = 0.62
    ischaemia_dose: float = 0.60  # mcg/kg/min at half of the ischaemia
    ischaemia_pressure: float = 0.030  # per mmHg above 82 under a vasopressor
    # Lactate, mmol/L.
    lactate_rate: float = 0.50
    lactate_base: float = 0.68
    lactate_hypoperfusion: float = 7.0
    lactate_inflammation: float = 0.8
    lactate_ischaemia: float = 2.4
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
    brain_noise: float = 0.05
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
    co2_memory: float = 0.6
    co2_noise: float = 5.0  # mmHg
    pf_healthy: float = 500.0  # mmHg
    pf_loss: float = 1.75  # log of P/F lost at full lung injury
    # Urine, mL.
    urine_base: float = 360.0
    urine_pressure: float = 62.0  # mmHg at half of the flow
    urine_slope: float = 6.0  # mmHg
    urine_kidney: float = 0.88  # share lost at full kidney injury
    urine_volume: float = 0.30  # relative per litre
    urine_noise: float = 0.45  # log
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
    slow: jax.Array  # [19] laboratory values and temperature, logs where skewed
    map: jax.Array  # mmHg
    output: jax.Array  # relative cardiac output
    heart_rate: jax.Array  # /min
    hypoperfusion: jax.Array  # 0 to 1
    urine: jax.Array  # mL of the last 4 h


def blood_ph(bicarbonate: jax.Array, paco2: jax.Array) -> jax.Array:
    """Henderson-Hasselbalch, mmol/L and mmHg."""
    return 6.1 + jnp.log10(bicarbonate / (0.0307 * paco2))


def pf_ratio(lung: jax.Array, traits: Traits, params: PhysiologyParams) -> jax.Array:
    """PaO2 / FiO2 in mmHg."""
    return params.pf_healthy * traits.lung_reserve * jnp.exp(-params.pf_loss * lung)


def start(traits: Traits, noise: Noise, params: PhysiologyParams) -> Latent:
    """State at ICU admission, after care in the emergency room."""
    z = traits.start
    pathogen = 0.55 * jnp.exp(0.55 * z[0]) * traits.virulence
    inflammation = jnp.clip(0.46 + 0.22 * z[1] + 0.12 * z[0], 0.05, 1.2)
    edema = jnp.clip(0.5 + 0.5 * z[2], 0.0, 4.0)
    latent = Latent(
        pathogen=pathogen,
        inflammation=inflammation,
        vasoplegia=jnp.clip(inflammation + 0.10 * z[3], 0.0, 1.2),
        tone_drift=params.tone_noise * z[4],
        volume=-0.55 + 0.45 * z[5],
        edema=edema,
        depression=jnp.clip(0.25 + 0.25 * z[6], 0.0, 1.0),
        ischaemia=jnp.zeros(()),
        lung=jnp.clip(0.40 + 0.20 * z[7], 0.0, 1.0),
        kidney=jnp.clip(0.10 + 0.20 * z[8], 0.0, 1.0),
        liver=jnp.clip(0.02 + 0.12 * z[9], 0.0, 1.0),
        brain=jnp.clip(0.16 + 0.18 * z[10], 0.0, 1.0),
        lactate=1.9 * jnp.exp(0.40 * z[11] + 0.25 * z[1]),
        bicarbonate=params.bicarbonate_base + params.bicarbonate_chronic * traits.chronic_co2,
        co2_drift=params.co2_noise * noise.process["carbon_dioxide"],
        paco2=40.0 + traits.chronic_co2,
        slow=traits.setpoint,
        map=traits.baseline_map,
        output=jnp.ones(()),
        heart_rate=jnp.full((), params.rate_base),
        hypoperfusion=jnp.full((), 0.2),
        urine=jnp.full((), 150.0),
    )
    latent = replace(
        latent,
        bicarbonate=_bicarbonate_target(latent, traits, params)
        + 2.5 * noise.process["bicarbonate"],
        slow=start_slow(latent, traits, noise, params.slow),
    )
    return _settle(latent, jnp.zeros(()), traits, noise, params)


def advance(
    latent: Latent,
    vasopressor: jax.Array,
    fluid: jax.Array,
    step: jax.Array,
    traits: Traits,
    noise: Noise,
    params: PhysiologyParams,
) -> Latent:
    """State 4 hours later.

    Args:
      latent: state at the start of the step.
      vasopressor: [] mcg/kg/min norepinephrine equivalents during the step.
      fluid: [] mL during the step.
      step: [] int32 steps since admission.
      traits, noise, params: the patient, the luck of the step, the coefficients.
    """
    p, eps = params, noise.process
    litres = fluid / 1000.0
    acting = jax.nn.sigmoid(3.0 * (step - traits.antibiotic_delay))
    inflammation = latent.inflammation
    rate = (
        p.growth * traits.virulence
        - p.host_kill * jnp.minimum(inflammation, 1.0)
        - p.antibiotic_kill * acting
        + p.pathogen_noise * eps["pathogen"]
    )
    pathogen = jnp.clip(latent.pathogen * jnp.exp(rate), 0.01, 4.0)
    drive = p.inflammation_max * pathogen / (pathogen + p.inflammation_half)
    drive += p.translocation * (latent.ischaemia + latent.hypoperfusion)
    inflammation += p.inflammation_rate * (drive - inflammation)
    inflammation = jnp.clip(inflammation + p.inflammation_noise * eps["inflammation"], 0.0, 1.4)

    leak = jnp.clip((p.leak_base + p.leak_inflammation * inflammation) * traits.leak, 0.0, 0.9)
    excess = jnp.maximum(latent.volume, 0.0)
    volume = (
        latent.volume
        + litres * (1.0 - leak)
        - p.leak_loss * inflammation * traits.leak
        - p.volume_return * latent.volume
        + p.volume_noise * eps["volume"]
    )
    clearance = p.edema_clear * (1.0 - 0.7 * latent.kidney)
    edema = latent.edema * (1.0 - clearance) + litres * leak + p.edema_inflow * excess
    edema += 0.5 * p.leak_loss * inflammation * traits.leak

    ischaemia_drive = vasopressor**2 / (vasopressor**2 + p.ischaemia_dose**2)
    pressed = vasopressor / (vasopressor + 0.05)
    ischaemia_drive += p.ischaemia_pressure * pressed * jnp.maximum(latent.map - 82.0, 0.0)
    ischaemia = p.ischaemia_memory * latent.ischaemia
    ischaemia = jnp.clip(ischaemia + (1.0 - p.ischaemia_memory) * ischaemia_drive, 0.0, 1.3)

    depression = latent.depression + p.heart_rate_step * (
        0.6 * inflammation + 0.5 * latent.hypoperfusion + 0.3 * ischaemia - latent.depression
    )
    latent = replace(
        latent,
        pathogen=pathogen,
        inflammation=inflammation,
        vasoplegia=latent.vasoplegia + p.vasoplegia_rate * (inflammation - latent.vasoplegia),
        tone_drift=p.tone_memory * latent.tone_drift
        + jnp.sqrt(1.0 - p.tone_memory**2) * p.tone_noise * eps["tone"],
        volume=jnp.clip(volume, -2.0, 4.0),
        edema=jnp.clip(edema, 0.0, 15.0),
        depression=jnp.clip(depression + p.heart_noise * eps["heart"], 0.0, 1.0),
        ischaemia=ischaemia,
        co2_drift=p.co2_memory * latent.co2_drift
        + jnp.sqrt(1.0 - p.co2_memory**2) * p.co2_noise * eps["carbon_dioxide"],
    )
    before = latent.hypoperfusion
    latent = _settle(latent, vasopressor, traits, noise, p)
    # Organs and lactate feel the mean of the old and the new perfusion of the step.
    latent = _injure(latent, 0.35 * before + 0.65 * latent.hypoperfusion, noise, p)
    target = _bicarbonate_target(latent, traits, p)
    bicarbonate = latent.bicarbonate + p.bicarbonate_rate * (target - latent.bicarbonate)
    return replace(
        latent,
        bicarbonate=jnp.clip(bicarbonate + p.bicarbonate_noise * eps["bicarbonate"], 4.0, 50.0),
        slow=advance_slow(latent, litres, traits, noise, p.slow),
    )


def _settle(
    latent: Latent, vasopressor: jax.Array, traits: Traits, noise: Noise, p: PhysiologyParams
) -> Latent:
    """Pressure, output, perfusion, gas exchange and urine under a dose: fast variables."""
    ph = blood_ph(latent.bicarbonate, latent.paco2)
    response = traits.sensitivity * (1.0 - p.acidosis_loss * jnp.clip(p.acidosis_ph - ph, 0.0, 0.4))
    drug = vasopressor / (vasopressor + p.vasopressor_half)
    tone = 1.0 - p.vasoplegia * latent.vasoplegia + latent.tone_drift
    tone = jnp.maximum(tone + p.vasopressor_max * response * drug, 0.25)

    preload = jnp.maximum(1.0 + p.preload_slope * latent.volume, 0.15)
    starling = (1.0 + p.preload_half) * preload / (preload + p.preload_half)
    squeeze = traits.contractility * (1.0 - p.heart_depression * latent.depression)
    output = squeeze * starling / (1.0 + p.afterload * jnp.maximum(tone - 1.0, 0.0))
    # Vasodilated vessels are easier to pump into: septic output is high at low tone.
    output *= 1.0 + 0.35 * jnp.maximum(1.0 - tone, 0.0)
    pressure = traits.baseline_map * jnp.exp(p.pressure_gain * jnp.log(output * tone))
    pressure = jnp.clip(pressure, 25.0, 150.0)

    rate = (
        p.rate_base
        + traits.heart_rate
        + p.rate_inflammation * latent.inflammation
        + p.rate_deficit * jnp.maximum(1.0 - starling, -0.3)
        + p.rate_vasopressor * drug
        + p.rate_hypotension * jax.nn.sigmoid((62.0 - pressure) / 5.0)
    )
    critical = p.critical_map + p.critical_shift * (traits.baseline_map - 85.0)
    flow = jax.nn.sigmoid((pressure - critical) / p.critical_slope)
    delivery = output * (0.5 + 0.05 * latent.slow[_HEMOGLOBIN])
    flow *= (1.0 + p.flow_half) * delivery / (delivery + p.flow_half)

    filtered = jax.nn.sigmoid((pressure - p.urine_pressure) / p.urine_slope)
    urine = p.urine_base * filtered * (1.0 - p.urine_kidney * latent.kidney)
    urine *= jnp.clip(1.0 + p.urine_volume * latent.volume, 0.4, 2.0)
    metabolic = latent.bicarbonate - p.bicarbonate_base
    paco2 = (
        40.0
        + traits.chronic_co2
        + p.co2_compensation
        * jnp.clip(metabolic - p.bicarbonate_chronic * traits.chronic_co2, -14.0, 6.0)
        + p.co2_lung * (latent.lung - 0.4)
        + latent.co2_drift
    )
    return replace(
        latent,
        map=pressure,
        output=output,
        heart_rate=rate,
        hypoperfusion=jnp.clip(1.0 - flow, 0.0, 1.0),
        urine=urine * jnp.exp(p.urine_noise * noise.process["urine"]),
        paco2=jnp.clip(paco2, 18.0, 110.0),
    )


def _injure(latent: Latent, debt: jax.Array, noise: Noise, p: PhysiologyParams) -> Latent:
    """Lactate and organ injury after a step with a mean hypoperfusion of `debt`."""
    excess = jnp.maximum(latent.volume, 0.0)
    lung_target = (
        p.lung_base
        + p.lung_inflammation * latent.inflammation
        + p.lung_edema * latent.edema / (latent.edema + p.lung_edema_half)
        + p.lung_volume * excess
        - 0.25
    )
    lung = latent.lung + p.lung_rate * (lung_target - latent.lung)
    kidney_hit = (
        p.kidney_hit * debt
        + p.kidney_ischaemia * latent.ischaemia
        + p.kidney_inflammation * latent.inflammation
        + p.kidney_congestion * jnp.maximum(latent.volume - 0.8, 0.0)
    )
    kidney = latent.kidney + kidney_hit * (1.0 - latent.kidney) - p.kidney_recovery * latent.kidney
    liver_hit = p.liver_hit * debt + p.liver_ischaemia * latent.ischaemia
    liver = latent.liver + liver_hit * (1.0 - latent.liver) - p.liver_recovery * latent.liver
    brain_target = p.brain_inflammation * latent.inflammation + p.brain_hypoperfusion * debt
    brain = latent.brain + p.brain_rate * (brain_target - latent.brain)
    level = (
        p.lactate_base
        + p.lactate_hypoperfusion * debt**2
        + p.lactate_inflammation * latent.inflammation
        + p.lactate_ischaemia * latent.ischaemia
        + p.lactate_liver * liver
    )
    lactate = latent.lactate + p.lactate_rate * (level - latent.lactate)
    return replace(
        latent,
        lung=jnp.clip(lung + p.lung_noise * noise.process["lung"], 0.0, 1.2),
        kidney=jnp.clip(kidney, 0.0, 1.0),
        liver=jnp.clip(liver, 0.0, 1.0),
        brain=jnp.clip(brain + p.brain_noise * noise.process["brain"], 0.0, 1.0),
        lactate=jnp.clip(lactate * jnp.exp(p.lactate_noise * noise.process["lactate"]), 0.3, 25.0),
    )


def _bicarbonate_target(latent: Latent, traits: Traits, p: PhysiologyParams) -> jax.Array:
    return (
        p.bicarbonate_base
        + traits.bicarbonate
        + p.bicarbonate_chronic * traits.chronic_co2
        - p.bicarbonate_lactate * (latent.lactate - 1.5)
        - p.bicarbonate_kidney * latent.kidney
        - p.bicarbonate_saline * latent.edema
    )
