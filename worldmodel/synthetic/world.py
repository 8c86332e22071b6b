"""The synthetic world as an environment: `reset` and `step` on one patient.

Both are pure, vmappable and free of Python control flow on values; jit them at the outermost
call. With the same patient key two runs differ only by their actions (common random numbers).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from worldmodel import schema, struct
from worldmodel.clinical import reward, sofa
from worldmodel.observation import Observation, ObservationHistory
from worldmodel.synthetic import clinician, physiology, recording
from worldmodel.synthetic.latent import Latent, PhysiologyParams
from worldmodel.synthetic.patients import Noise, PatientParams, Traits, draw, draw_traits
from worldmodel.synthetic.physiology import Support, SupportParams


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
    death: float = -12.6  # logit per step at no burden
    death_burden: float = 1.3  # logit per unit of burden
    discharge: float = -0.75  # logit per step at no burden
    discharge_burden: float = -1.15
    discharge_first: float = 5.0  # earliest step of discharge
    late: float = -7.3  # logit of death by day 90 after the ICU at no burden
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


def end_of_step(
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


@dataclass(frozen=True)
class Config:
    """Static settings, which change compilation.

    Attributes:
      horizon: most steps of a stay.
      past: rows that `Observation.past` holds; 0 leaves it out.
      dose_edges: edges of the dose levels.
    """

    horizon: int = 20
    past: int = 0
    dose_edges: schema.DoseEdges = schema.DEFAULT_DOSE_EDGES


@struct.dataclass
class Params:
    """Every coefficient of the world; a PyTree, so that worlds can be mapped over."""

    patient: PatientParams = struct.field(default_factory=PatientParams)
    physiology: PhysiologyParams = struct.field(default_factory=PhysiologyParams)
    support: SupportParams = struct.field(default_factory=SupportParams)
    observation: recording.ObservationParams = struct.field(
        default_factory=recording.ObservationParams
    )
    clinician: clinician.ClinicianParams = struct.field(default_factory=clinician.ClinicianParams)
    outcome: OutcomeParams = struct.field(default_factory=OutcomeParams)
    dose_spread: float = 0.5  # spread of doses within a level, share of the level's half-width


@struct.dataclass
class State:
    """One patient at the start of a step."""

    traits: Traits
    latent: Latent
    support: Support
    record: recording.Record
    observation: Observation
    done: jax.Array  # [] bool, the stay has ended; further steps change nothing of value


class Transition(NamedTuple):
    """Result of a step; all scalars."""

    reward: jax.Array  # shaping, or the terminal reward where the stay ends; 0 after the end
    done: jax.Array  # bool, the stay has ended with this step or before
    died_icu: jax.Array  # bool
    died_90d: jax.Array  # bool, meaningful where the stay ends with this step
    died_in_hospital: jax.Array  # bool, likewise
    vasopressor_dose: jax.Array  # mcg/kg/min given
    fluid_dose: jax.Array  # mL given


def reset(key: jax.Array, params: Params, *, config: Config) -> State:
    """A patient at ICU admission.

    Args:
      key: the patient's key (`noise.patient_key`), not consumed: give the same to `step`.
      params: coefficients.
      config: static settings.
    """
    noise = draw(key, jnp.int32(0))
    traits = draw_traits(key, params.patient)
    latent = physiology.start(traits, noise, params.physiology)
    care = physiology.update_support(None, latent, traits, noise, params.support, params.physiology)
    record = recording.record_step(
        None, latent, care, traits, noise, params.observation, params.physiology
    )
    step = jnp.int32(0)
    observation = _observation(record, care, traits, step, step, jnp.zeros(()), step, None, config)
    return State(traits, latent, care, record, observation, done=jnp.bool_(False))


def step(
    key: jax.Array, state: State, action: jax.Array, params: Params, *, config: Config
) -> tuple[State, Transition]:
    """Four hours under one of the 25 actions.

    Args:
      key: the patient's key, the same for all steps (the step number is folded in).
      state: from `reset` or `step`.
      action: [] int32 joint action 0-24.
      params: coefficients.
      config: static settings.
    """
    return step_with_noise(
        draw(key, state.observation.step + 1), state, action, params, config=config
    )


def step_with_noise(
    noise: Noise, state: State, action: jax.Array, params: Params, *, config: Config
) -> tuple[State, Transition]:
    """`step` with its noise given."""
    vasopressor, fluid = schema.action_levels(action)
    dose = doses(vasopressor, fluid, noise, params, config)
    before, count = state.observation, state.observation.step + 1
    latent = physiology.advance(
        state.latent, *dose, before.step, state.traits, noise, params.physiology
    )
    care = physiology.update_support(
        state.support, latent, state.traits, noise, params.support, params.physiology
    )
    record = recording.record_step(
        state.record, latent, care, state.traits, noise, params.observation, params.physiology
    )
    observation = _observation(
        record, care, state.traits, vasopressor, fluid, dose[0], count, before.past, config
    )
    ending = end_of_step(
        latent, state.traits, care.ventilated, vasopressor, count, noise, params.outcome
    )
    ended = ending.died_icu | ending.released | (count >= config.horizon)
    shaping = reward.step_reward(
        before.sofa, observation.sofa, before.dynamic[_LACTATE], observation.dynamic[_LACTATE]
    )
    earned = jnp.where(ended, reward.terminal_reward(ending.died_90d), shaping)
    transition = Transition(
        reward=jnp.where(state.done, 0.0, earned),
        done=state.done | ended,
        died_icu=ending.died_icu,
        died_90d=ending.died_90d,
        died_in_hospital=ending.died_in_hospital,
        vasopressor_dose=dose[0],
        fluid_dose=dose[1],
    )
    return State(state.traits, latent, care, record, observation, transition.done), transition


def sample_action(probabilities: jax.Array, noise: Noise) -> jax.Array:
    """[] int32 joint action by the inverse of the cumulative probabilities [25]."""
    total = jnp.cumsum(probabilities)
    below = (total <= noise.event["action"] * total[-1]).sum()
    return jnp.minimum(below, schema.NUM_ACTIONS - 1).astype(jnp.int32)


def doses(
    vasopressor: jax.Array, fluid: jax.Array, noise: Noise, params: Params, config: Config
) -> tuple[jax.Array, jax.Array]:
    """Doses of two levels, in mcg/kg/min and mL, symmetric about `schema.level_doses`."""
    edges = config.dose_edges
    return (
        _dose(vasopressor, edges.vasopressor, noise.event["vasopressor_dose"], params.dose_spread),
        _dose(fluid, edges.fluid, noise.event["fluid_dose"], params.dose_spread),
    )


def _dose(
    level: jax.Array, edges: tuple[float, float, float], chance: jax.Array, spread: float
) -> jax.Array:
    middle = schema.level_doses(edges)
    half = (0.0, *(m - low for m, low in zip(middle[1:], (0.0, *edges), strict=True)))
    return _pick(middle, level) + spread * (2.0 * chance - 1.0) * _pick(half, level)


def _pick(table: tuple[float, ...], level: jax.Array) -> jax.Array:
    return sum(
        (jnp.where(level == i, value, 0.0) for i, value in enumerate(table)), start=jnp.zeros(())
    )


_LACTATE = schema.INDEX["lactate"]


def _observation(
    record: recording.Record,
    care: physiology.Support,
    traits: Traits,
    vasopressor: jax.Array,
    fluid: jax.Array,
    dose: jax.Array,
    step: jax.Array,
    past: ObservationHistory | None,
    config: Config,
) -> Observation:
    """The row after a step, whose levels and vasopressor dose are given."""
    urine = recording.urine_24h(record.urine, step)
    score = sofa.standard(
        record.filled, ventilated=care.ventilated, vasopressor_dose=dose, urine_24h=urine
    )
    measured = record.measured[: schema.NUM_MASKED]
    return Observation(
        dynamic=record.filled,
        measured=measured,
        static=traits.static,
        ventilated=care.ventilated,
        sofa=score.total,
        urine_24h=urine,
        vasopressor=vasopressor,
        fluid=fluid,
        step=step,
        past=_remember(past, record.filled, measured, vasopressor, fluid, config),
    )


def _remember(
    past: ObservationHistory | None,
    dynamic: jax.Array,
    measured: jax.Array,
    vasopressor: jax.Array,
    fluid: jax.Array,
    config: Config,
) -> ObservationHistory | None:
    if not config.past:
        return None
    if past is None:
        rows = config.past
        past = ObservationHistory(
            dynamic=jnp.zeros((rows, schema.NUM_FEATURES)),
            measured=jnp.zeros((rows, schema.NUM_MASKED), bool),
            vasopressor=jnp.zeros(rows, jnp.int32),
            fluid=jnp.zeros(rows, jnp.int32),
            valid=jnp.zeros(rows, bool),
        )
    else:
        # The row before is now known with its treatment.
        past = replace(
            past,
            vasopressor=past.vasopressor.at[-1].set(vasopressor),
            fluid=past.fluid.at[-1].set(fluid),
        )
    newest = ObservationHistory(dynamic, measured, jnp.int32(0), jnp.int32(0), jnp.bool_(True))
    result: ObservationHistory | None = jax.tree.map(
        lambda old, new: jnp.concatenate([old[1:], new[None]]), past, newest
    )
    return result
