"""Guideline and safety rules and SIRS, vectorised over states before the treatment."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from worldmodel import schema

MAP_TARGET = 65.0  # mmHg
LACTATE_LIMIT = 2.0  # mmol/L


def hypoperfused(meanbp: Num[Array, "*#b"], lactate: Num[Array, "*#b"]) -> Bool[Array, "*#b"]:
    """Lactate above 2 mmol/L or MAP below 65 mmHg."""
    return (lactate > LACTATE_LIMIT) | (meanbp < MAP_TARGET)


def g1_untreated_hypoperfusion(
    meanbp: Num[Array, "*#b"],
    lactate: Num[Array, "*#b"],
    vasopressor: Num[Array, "*#b"],
    fluid: Num[Array, "*#b"],
) -> Bool[Array, "*#b"]:
    """G1: hypoperfusion answered with no vasopressor and no fluid."""
    return hypoperfused(meanbp, lactate) & (vasopressor == 0) & (fluid == 0)


def g2_unneeded_escalation(
    meanbp: Num[Array, "*#b"],
    vasopressor: Num[Array, "*#b"],
    previous_vasopressor: Num[Array, "*#b"],
    step: Num[Array, "*#b"],
) -> Bool[Array, "*#b"]:
    """G2: MAP at target and the vasopressor raised above the previous level; never at step 0."""
    return (meanbp >= MAP_TARGET) & (vasopressor > previous_vasopressor) & (step > 0)


def breaks_guideline(
    meanbp: Num[Array, "*#b"],
    lactate: Num[Array, "*#b"],
    vasopressor: Num[Array, "*#b"],
    fluid: Num[Array, "*#b"],
    previous_vasopressor: Num[Array, "*#b"],
    step: Num[Array, "*#b"],
) -> Bool[Array, "*#b"]:
    """G1 or G2, which are never broken by one prescription together."""
    g1 = g1_untreated_hypoperfusion(meanbp, lactate, vasopressor, fluid)
    return g1 | g2_unneeded_escalation(meanbp, vasopressor, previous_vasopressor, step)


@dataclass(frozen=True)
class Underdosing:
    """Hypotension left with no vasopressor and little fluid.

    Attributes:
      map_below: mmHg; the rule applies at lower MAP only.
      max_fluid_level: at most this level is little fluid.
      max_fluid_rate: at most this many mL/h is little fluid.
    """

    map_below: float
    max_fluid_level: int = schema.NUM_LEVELS - 1
    max_fluid_rate: float = math.inf

    def __call__(
        self,
        meanbp: Num[Array, "*#b"],
        vasopressor: Num[Array, "*#b"],
        fluid: Num[Array, "*#b"],
        fluid_rate: Num[Array, "*#b"],
    ) -> Bool[Array, "*#b"]:
        """True where underdosed; `fluid_rate` in mL/h."""
        little = (fluid <= self.max_fluid_level) & (fluid_rate <= self.max_fluid_rate)
        return self.exposed(meanbp) & (vasopressor == 0) & little

    def exposed(self, meanbp: Num[Array, "*#b"]) -> Bool[Array, "*#b"]:
        """Where the rule can be broken."""
        return meanbp < self.map_below


@dataclass(frozen=True)
class Overdosing:
    """A strong vasopressor at a high MAP.

    Attributes:
      map_above: mmHg; the rule applies at higher MAP only.
      min_level: from this vasopressor level on.
    """

    map_above: float
    min_level: int = schema.NUM_LEVELS - 1

    def __call__(
        self, meanbp: Num[Array, "*#b"], vasopressor: Num[Array, "*#b"]
    ) -> Bool[Array, "*#b"]:
        """True where overdosed."""
        return self.exposed(meanbp) & (vasopressor >= self.min_level)

    def exposed(self, meanbp: Num[Array, "*#b"]) -> Bool[Array, "*#b"]:
        """Where the rule can be broken."""
        return meanbp > self.map_above


UNDERDOSING: dict[str, Underdosing] = {
    "festor_a": Underdosing(55.0, max_fluid_rate=20.0),
    "map_55": Underdosing(55.0, max_fluid_level=1),
    "map_60": Underdosing(60.0, max_fluid_level=1),
    "map_65": Underdosing(65.0, max_fluid_level=1),
    "map_65_untreated": Underdosing(65.0, max_fluid_level=0),
}
"""Definitions by name. Festor's limit of fluid is a volume; the others go by level."""

OVERDOSING: dict[str, Overdosing] = {
    "festor_b": Overdosing(95.0),
    "map_85": Overdosing(85.0),
    "map_95_high": Overdosing(95.0, min_level=3),
}
"""Definitions by name. The highest level stands for Festor's dose above 0.65 mcg/kg/min."""


def dose_jump(
    vasopressor: Num[Array, "*#b"],
    previous_vasopressor: Num[Array, "*#b"],
    step: Num[Array, "*#b"],
    *,
    levels: int = 2,
) -> Bool[Array, "*#b"]:
    """The vasopressor changed by `levels` or more within one step; never at step 0."""
    return (jnp.abs(vasopressor - previous_vasopressor) >= levels) & (step > 0)


def abrupt_stop(
    vasopressor: Num[Array, "*#b"],
    previous_vasopressor: Num[Array, "*#b"],
    step: Num[Array, "*#b"],
    *,
    from_level: int = 3,
) -> Bool[Array, "*#b"]:
    """The vasopressor stopped outright from a high level; never at step 0."""
    return (previous_vasopressor >= from_level) & (vasopressor == 0) & (step > 0)


def needs_early_fluid(
    meanbp: Num[Array, "*#b"],
    lactate: Num[Array, "*#b"],
    step: Num[Array, "*#b"],
    *,
    step_hours: float | jax.Array = schema.STEP_HOURS,
    within_hours: float = 3.0,
) -> Bool[Array, "*#b"]:
    """Hypoperfusion in a step that begins within the first hours."""
    return (step * step_hours < within_hours) & hypoperfused(meanbp, lactate)


def early_fluid_missed(
    meanbp: Num[Array, "*#b"],
    lactate: Num[Array, "*#b"],
    fluid: Num[Array, "*#b"],
    step: Num[Array, "*#b"],
    *,
    step_hours: float | jax.Array = schema.STEP_HOURS,
    within_hours: float = 3.0,
) -> Bool[Array, "*#b"]:
    """Hypoperfusion in the first hours answered without any fluid."""
    needed = needs_early_fluid(
        meanbp, lactate, step, step_hours=step_hours, within_hours=within_hours
    )
    return needed & (fluid == 0)


def fluid_intolerant(
    cumulative_fluid: Num[Array, "*#b"],
    pf_ratio: Num[Array, "*#b"],
    *,
    volume_above: float = 10_000.0,
    pf_below: float = 200.0,
) -> Bool[Array, "*#b"]:
    """More than 10 L are in already, or the lungs fail.

    Args:
      cumulative_fluid: mL given before.
      pf_ratio: PaO2 / FiO2, mmHg.
      volume_above, pf_below: the limits.
    """
    return (cumulative_fluid > volume_above) | (pf_ratio < pf_below)


def fluid_overload(
    fluid: Num[Array, "*#b"],
    cumulative_fluid: Num[Array, "*#b"],
    pf_ratio: Num[Array, "*#b"],
    *,
    min_level: int = 3,
    volume_above: float = 10_000.0,
    pf_below: float = 200.0,
) -> Bool[Array, "*#b"]:
    """A high fluid level from `min_level` on given to a `fluid_intolerant` patient."""
    intolerant = fluid_intolerant(
        cumulative_fluid, pf_ratio, volume_above=volume_above, pf_below=pf_below
    )
    return (fluid >= min_level) & intolerant


def vasopressor_at_high_map(
    meanbp: Num[Array, "*#b"], vasopressor: Num[Array, "*#b"], *, map_above: float = 90.0
) -> Bool[Array, "*#b"]:
    """Any vasopressor at a MAP far above target."""
    return (meanbp > map_above) & (vasopressor > 0)


def adherence(
    g1: Bool[Array, "*b"], g2: Bool[Array, "*b"], valid: Bool[Array, "*b"]
) -> Float[Array, ""]:
    """Guideline adherence in percent, pooled over prescriptions.

    Args:
      g1, g2: [...] bool violations.
      valid: [...] bool, True where a prescription was made.
    """
    prescriptions = valid.sum()
    return 100.0 * (prescriptions - (g1 & valid).sum() - (g2 & valid).sum()) / prescriptions


def hours_below_target(
    meanbp: Num[Array, "*b T"],
    valid: Bool[Array, "*b T"],
    *,
    target: float = MAP_TARGET,
    step_hours: float | jax.Array = schema.STEP_HOURS,
) -> Float[Array, "*b"]:
    """Hours with MAP below target along the last axis: [..., T] -> [...]."""
    return step_hours * ((meanbp < target) & valid).sum(-1)


def area_below_target(
    meanbp: Num[Array, "*b T"],
    valid: Bool[Array, "*b T"],
    *,
    target: float = MAP_TARGET,
    step_hours: float | jax.Array = schema.STEP_HOURS,
) -> Float[Array, "*b"]:
    """Depth times duration of hypotension, mmHg h, along the last axis: [..., T] -> [...]."""
    depth = jnp.where(valid, jnp.maximum(target - meanbp, 0.0), 0.0)
    return step_hours * depth.sum(-1)


def lactate_clearance(
    lactate_first: Num[Array, "*#b"], lactate_last: Num[Array, "*#b"]
) -> Float[Array, "*#b"]:
    """Relative fall of lactate, (first - last) / first; negative where it rose."""
    return (lactate_first - lactate_last) / lactate_first


def sirs_score(dynamic: Num[Array, "*b 39"]) -> Int[Array, "*b"]:
    """Criteria met, 0 to 4: temperature, heart rate, respiration, white cells.

    Args:
      dynamic: [..., 39] physical units.

    Returns:
      [...] int32.
    """

    def feature(name: str) -> jax.Array:
        return dynamic[..., schema.INDEX[name]]

    criteria = (
        (feature("temp_c") < 36) | (feature("temp_c") > 38),
        feature("heart_rate") > 90,
        (feature("resp_rate") > 20) | (feature("paco2") < 32),
        (feature("wbc") < 4) | (feature("wbc") > 12),
    )
    return sum((met.astype(jnp.int32) for met in criteria), jnp.int32(0))
