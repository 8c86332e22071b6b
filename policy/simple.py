"""Policies without anything learned: the brackets of every comparison, and the guidelines."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from policy.base import Policy
from worldmodel import schema, struct
from worldmodel.clinical import rules, sofa
from worldmodel.observation import Observation
from worldmodel.synthetic import maximum_treatment, no_treatment, random_policy, titration


@struct.dataclass
class RandomPolicy(Policy):
    """All 25 actions alike."""

    def __call__(self, key: jax.Array, observation: Observation) -> Float[Array, " 25"]:
        """[25] the uniform distribution."""
        return random_policy(key, observation)


@struct.dataclass
class NoTreatment(Policy):
    """Neither drug, ever."""

    def __call__(self, key: jax.Array, observation: Observation) -> Float[Array, " 25"]:
        """[25] all on action 0."""
        return no_treatment(key, observation)


@struct.dataclass
class MaximumTreatment(Policy):
    """The highest level of both drugs, always."""

    def __call__(self, key: jax.Array, observation: Observation) -> Float[Array, " 25"]:
        """[25] all on action 24."""
        return maximum_treatment(key, observation)


@struct.dataclass
class Constant(Policy):
    """One action, whatever is seen."""

    action: int | jax.Array  # joint action 0-24

    def __call__(self, key: jax.Array, observation: Observation) -> Float[Array, " 25"]:
        """[25] all on the action."""
        del key, observation
        return jax.nn.one_hot(self.action, schema.NUM_ACTIONS)


@struct.dataclass
class Titration(Policy):
    """Early fluid, then a vasopressor titrated to MAP: a strong rule in the synthetic world."""

    def __call__(self, key: jax.Array, observation: Observation) -> Float[Array, " 25"]:
        """[25] all on the action that the rule asks for."""
        return titration(key, observation)


@struct.dataclass
class GuidelineRules(Policy):
    """The Surviving Sepsis Campaign 2021 (Evans et al., Intensive Care Medicine 47:1181) as code.

    Deterministic. What it turns into levels:

    - at least 30 mL/kg of crystalloid within 3 h of hypoperfusion: the highest fluid level in the
      first hours, while the patient is hypoperfused (lactate above 2 mmol/L or MAP below 65 mmHg);
    - a MAP target of 65 mmHg rather than a higher one: the vasopressor goes up one level where MAP
      is below 65 and down one where it is above `wean_above`; fluid comes first, unless MAP is
      below `severe_map`, since vasopressors are not to be delayed;
    - resuscitation that brings lactate down: a modest fluid level later on, as long as
      hypoperfusion lasts;
    - no recommendation for liberal or for restrictive fluid after that: restraint where the lungs
      fail (half the level at a P/F below `restrain_pf`) and `maintenance` for the well perfused.
      High levels end with `early_hours`, so that no large volume can build up.

    It breaks neither G1 nor G2 of `worldmodel.clinical.rules` in any state and with any setting,
    and never changes the vasopressor by more than one level. The guideline gives MAP, lactate,
    volume and time; levels, `wean_above`, `severe_map` and `restrain_pf` are choices made here.
    """

    early_hours: float = 8.0  # h; two steps of 4 h: the 3 h of the guideline and a reassessment
    early_fluid: int = 4  # level while hypoperfused in the first hours
    later_fluid: int = 2  # level while hypoperfused afterwards
    maintenance: int = 1  # level while well perfused
    severe_map: float = 55.0  # mmHg; below, vasopressor and fluid start together
    wean_above: float = 75.0  # mmHg; the vasopressor goes down
    restrain_pf: float = 200.0  # mmHg, moderate ARDS; below, half the fluid level
    highest: int = 4  # vasopressor level that is not exceeded
    step_hours: float = schema.STEP_HOURS

    def __call__(self, key: jax.Array, observation: Observation) -> Float[Array, " 25"]:
        """[25] all on the action that the rules ask for."""
        del key
        meanbp, lactate, pao2, fio2 = (
            observation.dynamic[schema.INDEX[name]]
            for name in ("meanbp", "lactate", "pao2", "fio2")
        )
        poor = rules.hypoperfused(meanbp, lactate)
        early = observation.step * self.step_hours < self.early_hours
        fluid = jnp.where(early, self.early_fluid, self.later_fluid)
        fluid = jnp.where(poor, fluid, self.maintenance)
        fluid = jnp.where(sofa.pf_ratio(pao2, fio2) < self.restrain_pf, fluid // 2, fluid)

        fluid_first = (observation.step == 0) & (meanbp >= self.severe_map)
        ceiling = jnp.clip(self.highest, observation.vasopressor, schema.NUM_LEVELS - 1)
        raised = jnp.minimum(observation.vasopressor + 1, ceiling)
        up = (meanbp < rules.MAP_TARGET) & ~fluid_first
        down = meanbp > jnp.maximum(self.wean_above, rules.MAP_TARGET)
        lowered = jnp.maximum(observation.vasopressor - 1, 0)
        vasopressor = jnp.where(up, raised, jnp.where(down, lowered, observation.vasopressor))

        untreated = poor & (vasopressor == 0)
        fluid = jnp.clip(fluid, jnp.where(untreated, 1, 0), schema.NUM_LEVELS - 1)
        action = schema.action_index(vasopressor, fluid)
        return jax.nn.one_hot(action, schema.NUM_ACTIONS)
