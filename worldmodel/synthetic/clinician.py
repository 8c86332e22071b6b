"""The recorded clinician, whose action probabilities are known, and simple policies."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from worldmodel import schema, struct
from worldmodel.observation import Observation

_LEVELS = tuple(range(schema.NUM_LEVELS))


@struct.dataclass
class ClinicianParams:
    """Coefficients of the clinician; wanted levels are in units of levels."""

    floor: float = 0.002  # least probability of any action
    vasopressor_width: float = 0.7  # levels
    vasopressor_inertia: float = 0.97  # share of the level before that is kept
    vasopressor_map: float = 0.06  # levels per mmHg of MAP below the target
    vasopressor_target: float = 68.0  # mmHg
    vasopressor_wean: float = 0.035  # levels per mmHg of MAP above the target
    vasopressor_lactate: float = 0.06  # levels per mmol/L above 2
    vasopressor_reluctance: float = 2.4  # logit more for staying without, if without
    vasopressor_hold: float = 1.0  # logit for the level before
    vasopressor_start: float = 0.16  # of that logit lost per mmHg of MAP below 67
    fluid_width: float = 1.05
    fluid_base: float = 1.5
    fluid_inertia: float = 0.5
    fluid_hold: float = 1.1  # logit for the level before
    fluid_early: float = 0.6  # at admission, fading over `fluid_fade` steps
    fluid_fade: float = 4.0
    fluid_hypotension: float = 0.15  # at MAP far below 66
    fluid_lactate: float = 0.12  # per mmol/L above 2, up to 4
    fluid_oliguria: float = 0.2  # at no urine
    fluid_hypoxaemia: float = -0.4  # at a P/F far below 180
    confounding: float = 0.0  # levels wanted more per SD of the unrecorded frailty


def probabilities(
    observation: Observation, frailty: jax.Array, params: ClinicianParams
) -> jax.Array:
    """[25] probabilities of the joint actions.

    Args:
      observation: of the patient before the treatment.
      frailty: [] unrecorded severity, seen only where `params.confounding` is not 0.
      params: coefficients.
    """
    p = params
    pressure = observation.dynamic[schema.INDEX["meanbp"]]
    lactate = observation.dynamic[schema.INDEX["lactate"]]
    before = observation.vasopressor.astype(jnp.float32)
    hidden = p.confounding * frailty

    lacking = jnp.clip(p.vasopressor_target - pressure, -30.0, 30.0)
    wanted = p.vasopressor_inertia * before
    wanted += jnp.where(lacking > 0, p.vasopressor_map, p.vasopressor_wean) * lacking
    wanted += p.vasopressor_lactate * jnp.clip(lactate - 2.0, 0.0, 6.0) + hidden
    reluctance = p.vasopressor_reluctance - p.vasopressor_start * jnp.clip(
        67.0 - pressure, 0.0, 30.0
    )
    hold = p.vasopressor_hold + jnp.where(
        observation.vasopressor == 0, jnp.maximum(reluctance, 0.0), 0.0
    )
    vasopressor = _softmax(wanted, p.vasopressor_width, observation.vasopressor, hold)

    oxygen = (
        observation.dynamic[schema.INDEX["pao2"]]
        / observation.dynamic[schema.INDEX["fio2"]]
        * 100.0
    )
    early = jnp.exp(-observation.step / p.fluid_fade)
    wanted = (
        p.fluid_base
        + p.fluid_inertia * (observation.fluid - 1.5) * (observation.step > 0)
        + p.fluid_early * early
        + p.fluid_hypotension * jax.nn.sigmoid((66.0 - pressure) / 3.0)
        + p.fluid_lactate * jnp.clip(lactate - 2.0, 0.0, 4.0)
        + p.fluid_oliguria * jax.nn.sigmoid((120.0 - observation.dynamic[schema.URINE]) / 40.0)
        + p.fluid_hypoxaemia * jax.nn.sigmoid((180.0 - oxygen) / 30.0)
        + hidden
    )
    hold = jnp.where(observation.step > 0, p.fluid_hold, 0.0)
    fluid = _softmax(wanted, p.fluid_width, observation.fluid, hold)
    joint = jnp.outer(vasopressor, fluid).reshape(schema.NUM_ACTIONS)
    return (1.0 - schema.NUM_ACTIONS * p.floor) * joint + p.floor


def _softmax(wanted: jax.Array, width: float, before: jax.Array, hold: jax.Array) -> jax.Array:
    """[5] probabilities of the levels; `hold` is added to the logit of the level before."""
    logits = [
        jnp.where(before == level, hold, 0.0) - (level - wanted) ** 2 / (2.0 * width**2)
        for level in _LEVELS
    ]
    return jax.nn.softmax(jnp.stack(logits))


_AT = schema.INDEX


def random_policy(key: jax.Array, observation: Observation) -> jax.Array:
    """Every action with probability 1/25."""
    del key, observation
    return jnp.full(schema.NUM_ACTIONS, 1.0 / schema.NUM_ACTIONS)


def no_treatment(key: jax.Array, observation: Observation) -> jax.Array:
    """Never gives vasopressor or fluid."""
    del key, observation
    return jax.nn.one_hot(0, schema.NUM_ACTIONS)


def maximum_treatment(key: jax.Array, observation: Observation) -> jax.Array:
    """Always gives the highest level of both drugs."""
    del key, observation
    return jax.nn.one_hot(schema.NUM_ACTIONS - 1, schema.NUM_ACTIONS)


def titration(key: jax.Array, observation: Observation) -> jax.Array:
    """Early fluid, then vasopressor titrated to a MAP of 65 to 78 mmHg and weaned at once."""
    del key
    pressure, lactate = observation.dynamic[_AT["meanbp"]], observation.dynamic[_AT["lactate"]]
    urine = observation.dynamic[_AT["output_4hourly"]]
    change = (
        (pressure < 68).astype(jnp.int32)
        + (pressure < 58)
        - (pressure > 80)
        - (pressure > 92)
    )  # fmt: skip
    vasopressor = jnp.clip(observation.vasopressor + change, 0, 3)
    needs = (pressure < 65) | (lactate > 2.2) | (urine < 100)
    dry = observation.dynamic[_AT["heart_rate"]] > 88
    early = jnp.where(needs, 4, 3)
    late = jnp.where(needs & dry, 2, 1)
    fluid = jnp.where(
        observation.step < 2, early, jnp.where(observation.step < 4, jnp.where(needs, 3, 2), late)
    )
    return jax.nn.one_hot(schema.action_index(vasopressor, fluid), schema.NUM_ACTIONS)
