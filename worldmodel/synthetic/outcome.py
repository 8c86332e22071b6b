"""Death in the ICU, discharge, and death by day 90 after the last recorded step."""

from __future__ import annotations

import jax
from flax import struct

from worldmodel.synthetic.latent import Latent
from worldmodel.synthetic.noise import Noise
from worldmodel.synthetic.patients import Traits


@struct.dataclass
class OutcomeParams:
    """Logits of death in the ICU per step, of discharge per step, of death by day 90."""

    age: float = 0.30  # per SD of age (16 years)
    charlson: float = 0.22  # per SD of the Charlson index (3 points)
    frailty: float = 0.45  # per SD of the unrecorded severity
    # burden = sum of weight x injury
    hypoperfusion: float = 4.0
    ischaemia: float = 2.2
    lung: float = 3.0
    kidney: float = 2.4
    liver: float = 2.0
    brain: float = 1.0
    inflammation: float = 0.3
    death: float = -11.2  # logit per step at no burden
    death_burden: float = 1.3  # logit per unit of burden
    discharge: float = 0.6  # logit per step at no burden
    discharge_burden: float = -1.15
    discharge_first: float = 5.0  # earliest step of discharge
    late: float = -7.6  # logit of death by day 90 after the ICU at no burden
    late_burden: float = 1.6
    in_hospital: float = 0.62  # share of deaths after the ICU that fall into the hospital stay


@struct.dataclass
class Ending:
    """How a step ended, all scalars bool; `released` and `died_icu` exclude each other."""

    died_icu: jax.Array
    released: jax.Array
    died_90d: jax.Array  # meaningful at the end of the stay
    died_in_hospital: jax.Array


def burden(latent: Latent, params: OutcomeParams) -> jax.Array:
    """Weighted organ injury, about 1 when recovered and 4 in shock."""
    return (
        params.hypoperfusion * latent.hypoperfusion
        + params.ischaemia * latent.ischaemia
        + params.lung * latent.lung
        + params.kidney * latent.kidney
        + params.liver * latent.liver
        + params.brain * latent.brain
        + params.inflammation * latent.inflammation
    )


def end(
    latent: Latent,
    traits: Traits,
    ventilated: jax.Array,
    vasopressor: jax.Array,
    step: jax.Array,
    noise: Noise,
    params: OutcomeParams,
) -> Ending:
    """Whether the stay ends with a step, and how.

    Args:
      latent: state after the step.
      traits: the patient.
      ventilated: [] bool.
      vasopressor: [] level during the step; no patient leaves the ICU on a vasopressor.
      step: [] int32 steps since admission, after the step.
      noise: random numbers of the step.
      params: coefficients.
    """
    load, host = burden(latent, params), _host(traits, params)
    died = noise.event["death"] < jax.nn.sigmoid(params.death + params.death_burden * load + host)
    leave = jax.nn.sigmoid(params.discharge + params.discharge_burden * load)
    may_leave = ~ventilated & (vasopressor == 0) & (step >= params.discharge_first)
    released = ~died & may_leave & (noise.event["discharge"] < leave)
    late = noise.event["outcome"] < late_death(latent, traits, params)
    return Ending(
        died_icu=died,
        released=released,
        died_90d=died | late,
        died_in_hospital=died | (late & (noise.event["hospital"] < params.in_hospital)),
    )


def late_death(latent: Latent, traits: Traits, params: OutcomeParams) -> jax.Array:
    """[] probability of death by day 90 of a patient who leaves the ICU alive in this state."""
    host = _host(traits, params)
    return jax.nn.sigmoid(params.late + params.late_burden * burden(latent, params) + host)


def _host(traits: Traits, params: OutcomeParams) -> jax.Array:
    return (
        params.age * (traits.static[0] - 64.0) / 16.0
        + params.charlson * (traits.static[2] - 5.3) / 3.0
        + params.frailty * traits.frailty
    )
