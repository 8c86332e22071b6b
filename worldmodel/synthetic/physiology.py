"""Physiology of a septic patient over 4 hours under a treatment, with respiratory support."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from worldmodel import struct
from worldmodel.synthetic.latent import Latent, PhysiologyParams, advance_slow, start_slow
from worldmodel.synthetic.patients import SLOW_NAMES, Noise, Traits

_BICARBONATE = (4.0, 50.0)  # mmol/L, the range of the living
_LACTATE = (0.3, 25.0)  # mmol/L
_HEMOGLOBIN = SLOW_NAMES.index("hemoglobin")


def blood_ph(bicarbonate: jax.Array, paco2: jax.Array) -> jax.Array:
    """Blood pH by Henderson-Hasselbalch, from mmol/L and mmHg."""
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
        volume=-0.25 + 0.40 * z[5],
        edema=edema,
        depression=jnp.clip(0.25 + 0.25 * z[6], 0.0, 1.0),
        ischaemia=jnp.zeros(()),
        lung=jnp.clip(0.40 + 0.20 * z[7], 0.0, 1.0),
        kidney=jnp.clip(0.10 + 0.20 * z[8], 0.0, 1.0),
        liver=jnp.clip(0.02 + 0.12 * z[9], 0.0, 1.0),
        brain=jnp.clip(0.16 + 0.18 * z[10], 0.0, 1.0),
        lactate=jnp.clip(1.7 * traits.lactate * jnp.exp(0.40 * z[11] + 0.25 * z[1]), *_LACTATE),
        bicarbonate=params.bicarbonate_base + params.bicarbonate_chronic * traits.chronic_co2,
        co2_drift=params.co2_noise * noise.process["carbon_dioxide"],
        paco2=40.0 + traits.chronic_co2,
        urine_drift=params.urine_noise * noise.process["urine"],
        slow=traits.setpoint,
        map=traits.baseline_map,
        output=jnp.ones(()),
        heart_rate=jnp.full((), params.rate_base),
        hypoperfusion=jnp.full((), 0.2),
        urine=jnp.full((), 150.0),
    )
    latent = replace(
        latent,
        bicarbonate=jnp.clip(
            _bicarbonate_target(latent, traits, params) + 2.5 * noise.process["bicarbonate"],
            *_BICARBONATE,
        ),
        slow=start_slow(latent, traits, noise, params.slow),
    )
    return _settle(latent, jnp.zeros(()), traits, params)


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
      traits: of the patient.
      noise: random numbers of the step.
      params: coefficients.
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
        urine_drift=p.urine_memory * latent.urine_drift
        + jnp.sqrt(1.0 - p.urine_memory**2) * p.urine_noise * eps["urine"],
    )
    before = latent.hypoperfusion
    latent = _settle(latent, vasopressor, traits, p)
    # Organs and lactate feel the mean of the old and the new perfusion of the step.
    latent = _injure(latent, 0.35 * before + 0.65 * latent.hypoperfusion, traits, noise, p)
    target = _bicarbonate_target(latent, traits, p)
    bicarbonate = latent.bicarbonate + p.bicarbonate_rate * (target - latent.bicarbonate)
    return replace(
        latent,
        bicarbonate=jnp.clip(bicarbonate + p.bicarbonate_noise * eps["bicarbonate"], *_BICARBONATE),
        slow=advance_slow(latent, litres, traits, noise, p.slow),
    )


def _settle(latent: Latent, vasopressor: jax.Array, traits: Traits, p: PhysiologyParams) -> Latent:
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
        urine=urine * traits.urine * jnp.exp(latent.urine_drift),
        paco2=jnp.clip(paco2, 18.0, 110.0),
    )


def _injure(
    latent: Latent, debt: jax.Array, traits: Traits, noise: Noise, p: PhysiologyParams
) -> Latent:
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
        + p.lactate_hypoperfusion * debt
        + p.lactate_inflammation * latent.inflammation
        + p.lactate_ischaemia * latent.ischaemia
        + p.lactate_liver * liver
    )
    lactate = latent.lactate + p.lactate_rate * (traits.lactate * level - latent.lactate)
    return replace(
        latent,
        lung=jnp.clip(lung + p.lung_noise * noise.process["lung"], 0.0, 1.2),
        kidney=jnp.clip(kidney, 0.0, 1.0),
        liver=jnp.clip(liver, 0.0, 1.0),
        brain=jnp.clip(brain + p.brain_noise * noise.process["brain"], 0.0, 1.0),
        lactate=jnp.clip(lactate * jnp.exp(p.lactate_noise * noise.process["lactate"]), *_LACTATE),
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


@struct.dataclass
class SupportParams:
    """Decisions on ventilation and oxygen: chances per step, as logits."""

    intubate: float = -6.9  # logit per step at no distress
    intubate_lung: float = 5.0  # logit per unit of lung injury
    intubate_brain: float = 3.5
    intubate_shock: float = 1.5
    admission: float = 3.0  # logit added at admission: intubated before the ICU
    extubate: float = 0.7  # logit per step at no distress
    extubate_distress: float = -6.0  # logit per unit of lung + brain + perfusion distress
    target_pao2: float = 93.0  # mmHg that the oxygen fraction is set for
    fio2_ventilated_low: float = 40.0  # %, usual floor on a ventilator
    fio2_noise: float = 0.10  # log


@struct.dataclass
class Support:
    """Respiratory support of one patient."""

    ventilated: jax.Array  # [] bool
    fio2: jax.Array  # [] %


def update_support(
    previous: Support | None,
    latent: Latent,
    traits: Traits,
    noise: Noise,
    params: SupportParams,
    physiology: PhysiologyParams,
) -> Support:
    """Support in the next step; `previous` is None at admission."""
    start = (
        params.intubate
        + params.intubate_lung * latent.lung
        + params.intubate_brain * latent.brain
        + params.intubate_shock * latent.hypoperfusion
    )
    if previous is None:
        chance = jax.nn.sigmoid(start + params.admission)
    else:
        distress = latent.lung + 0.6 * latent.brain + 0.6 * latent.hypoperfusion
        stop = jax.nn.sigmoid(params.extubate + params.extubate_distress * distress)
        chance = jnp.where(previous.ventilated, 1.0 - stop, jax.nn.sigmoid(start))
    ventilated = noise.event["ventilation"] < chance
    wanted = 100.0 * params.target_pao2 / pf_ratio(latent.lung, traits, physiology)
    wanted *= jnp.exp(params.fio2_noise * noise.process["oxygen"])
    floor = jnp.where(ventilated, params.fio2_ventilated_low, 21.0)
    fio2 = jnp.clip(wanted, floor, jnp.where(ventilated, 100.0, 70.0))
    return Support(ventilated=ventilated, fio2=fio2)
