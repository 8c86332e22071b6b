"""Guideline and safety rules, each a vectorised predicate on the state the decision saw.

All functions return booleans of the broadcast shape, True where the rule is *broken* (or the
condition named holds). Levels are 0 to 4; MAP in mmHg, lactate in mmol/L, doses in physical
units. Sources: SepsisAgent's G1 and G2 (arXiv 2605.14723); Festor et al., BMJ Health & Care
Informatics 2022 (A: under-, B: overdosing); Surviving Sepsis Campaign 2021 (early fluid);
Jia et al. (abrupt dose changes).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MAP_TARGET = 65.0  # mmHg
LACTATE_LIMIT = 2.0  # mmol/L


def hypoperfused(meanbp: jax.Array, lactate: jax.Array) -> jax.Array:
    """Lactate above 2 mmol/L or MAP below 65 mmHg."""
    return (lactate > LACTATE_LIMIT) | (meanbp < MAP_TARGET)


def g1_untreated_hypoperfusion(
    meanbp: jax.Array, lactate: jax.Array, vasopressor: jax.Array, fluid: jax.Array
) -> jax.Array:
    """G1: hypoperfusion answered with no vasopressor and no fluid."""
    return hypoperfused(meanbp, lactate) & (vasopressor == 0) & (fluid == 0)


def g2_unneeded_escalation(
    meanbp: jax.Array, vasopressor: jax.Array, previous_vasopressor: jax.Array, step: jax.Array
) -> jax.Array:
    """G2: MAP at target and the vasopressor raised above the previous level; never at step 0."""
    return (meanbp >= MAP_TARGET) & (vasopressor > previous_vasopressor) & (step > 0)


def underdosed(
    meanbp: jax.Array,
    vasopressor: jax.Array,
    fluid: jax.Array,
    *,
    map_below: float = 55.0,
    max_fluid_level: int = 1,
) -> jax.Array:
    """Severe hypotension left with no vasopressor and little fluid (Festor A: MAP < 55).

    Festor's limit is 20 mL/h, 80 mL per 4 h: level 1 of the default dose edges is its nearest.
    """
    return (meanbp < map_below) & (vasopressor == 0) & (fluid <= max_fluid_level)


def overdosed(meanbp: jax.Array, vasopressor: jax.Array, *, map_above: float = 95.0) -> jax.Array:
    """The highest vasopressor level at a high MAP (Festor B: MAP > 95)."""
    return (meanbp > map_above) & (vasopressor == 4)


def dose_jump(
    vasopressor: jax.Array, previous_vasopressor: jax.Array, step: jax.Array, *, levels: int = 2
) -> jax.Array:
    """The vasopressor changed by `levels` or more within one step; never at step 0."""
    return (jnp.abs(vasopressor - previous_vasopressor) >= levels) & (step > 0)


def late_early_fluid(
    meanbp: jax.Array,
    lactate: jax.Array,
    fluid: jax.Array,
    step: jax.Array,
    *,
    step_hours: float = 4.0,
    within_hours: float = 3.0,
) -> jax.Array:
    """Hypoperfusion in the first hours answered without any fluid."""
    return (step * step_hours < within_hours) & hypoperfused(meanbp, lactate) & (fluid == 0)


def fluid_overload(
    fluid: jax.Array,
    cumulative_fluid: jax.Array,
    pf_ratio: jax.Array,
    *,
    min_level: int = 3,
    balance_above: float = 10_000.0,
    pf_below: float = 200.0,
) -> jax.Array:
    """High fluid level although 10 L are in already or the lungs fail.

    Args:
      fluid: level 0-4.
      cumulative_fluid: mL so far.
      pf_ratio: PaO2 / FiO2, mmHg.
      min_level, balance_above, pf_below: the rule's limits.
    """
    return (fluid >= min_level) & ((cumulative_fluid > balance_above) | (pf_ratio < pf_below))


def adherence(g1: jax.Array, g2: jax.Array, valid: jax.Array) -> jax.Array:
    """Guideline adherence in percent, pooled over prescriptions.

    Args:
      g1, g2: [...] bool violations.
      valid: [...] bool, True where a prescription was made.
    """
    prescriptions = valid.sum()
    return 100.0 * (prescriptions - (g1 & valid).sum() - (g2 & valid).sum()) / prescriptions


def hours_below_target(
    meanbp: jax.Array, valid: jax.Array, *, target: float = MAP_TARGET, step_hours: float = 4.0
) -> jax.Array:
    """Hours with MAP below target along the last axis: [..., T] -> [...]."""
    return step_hours * ((meanbp < target) & valid).sum(-1)


def lactate_clearance(lactate_first: jax.Array, lactate_last: jax.Array) -> jax.Array:
    """Relative fall of lactate, (first - last) / first; negative where it rose."""
    return (lactate_first - lactate_last) / lactate_first
