"""All rules on whole trajectories: how often each is broken, pooled over prescriptions.

    report = assess(dynamic, action, fluid_dose, valid)
    report.table()["adherence"]

Rules judge the state that the decision saw (row t) against the treatment of row t; the previous
treatment is that of row t - 1. Rules on changes (G2, `dose_jump`, `abrupt_stop`) are never broken
in the first step of a stay. Rates are in percent of all prescriptions, whoever they were for
(micro-averages), as SepsisAgent counts them; `*_of_exposed` are in percent of the prescriptions
whose state puts the rule at stake, as Festor et al. count them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from worldmodel import schema, struct
from worldmodel.clinical import rules, sofa
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError

RULES: tuple[str, ...] = (
    "g1",
    "g2",
    "underdosing",
    "overdosing",
    *(f"underdosing_{name}" for name in rules.UNDERDOSING),
    *(f"overdosing_{name}" for name in rules.OVERDOSING),
    "dose_jump",
    "abrupt_stop",
    "early_fluid_missed",
    "fluid_overload",
    "vasopressor_at_high_map",
)
"""Names of all rules in the order of a report; `underdosing`, `overdosing` are the chosen ones."""


@dataclass(frozen=True)
class SafetyConfig:
    """Thresholds of the rules that have any; G1 and G2 have none.

    Attributes:
      underdosing, overdosing: definitions (`rules.UNDERDOSING`, `rules.OVERDOSING`) that make up
        `unsafe`.
      jump_levels: levels within one step that make a dose jump.
      stop_from: vasopressor level from which on a stop is abrupt.
      early_hours: hours in which hypoperfusion must be answered with fluid.
      overload_level: fluid level that is high for fluid-intolerant patients.
      overload_volume: mL given before, above which a patient is fluid-intolerant.
      overload_pf: PaO2 / FiO2 in mmHg, below which a patient is fluid-intolerant.
      high_map: mmHg, above which no vasopressor is needed.
    """

    underdosing: str = "festor_a"
    overdosing: str = "festor_b"
    jump_levels: int = 2
    stop_from: int = 3
    early_hours: float = 3.0
    overload_level: int = 3
    overload_volume: float = 10_000.0
    overload_pf: float = 200.0
    high_map: float = 90.0

    def __post_init__(self) -> None:
        for field, known in (("underdosing", rules.UNDERDOSING), ("overdosing", rules.OVERDOSING)):
            name = getattr(self, field)
            if name not in known:
                raise InputError(f"{field}: got {name!r}, expected one of {', '.join(known)}")


@struct.dataclass
class Prescriptions:
    """Inputs of the rules, all [..., T]. Rows that are not valid have no effect."""

    meanbp: jax.Array  # mmHg, seen before the treatment of the row
    lactate: jax.Array  # mmol/L
    pf_ratio: jax.Array  # PaO2 / FiO2, mmHg
    vasopressor: jax.Array  # level 0-4 given in the row
    previous_vasopressor: jax.Array  # level given in the row before; 0 at admission
    fluid: jax.Array  # level 0-4 given in the row
    fluid_dose: jax.Array  # mL given in the row
    cumulative_fluid: jax.Array  # mL given in all rows before
    step: jax.Array  # int32 steps since admission
    valid: jax.Array  # bool, a prescription was made


@struct.dataclass
class SafetyReport:
    """Counts by rule over all prescriptions, and measures of each trajectory."""

    broken: dict[str, jax.Array]  # [] int32 prescriptions that break the rule
    exposed: dict[str, jax.Array]  # [] int32 prescriptions where the state makes it applicable
    prescriptions: jax.Array  # [] int32
    adherence: jax.Array  # [] percent of prescriptions that break neither G1 nor G2
    hours_below_65: jax.Array  # [...] h; NaN where a trajectory has no prescription
    area_below_65: jax.Array  # [...] mmHg h; NaN likewise
    lactate_clearance: jax.Array  # [...] from first to last row; NaN with fewer than two rows
    raised_lactate: jax.Array  # [...] bool, first lactate above 2 mmol/L

    def table(self) -> dict[str, float]:
        """Plain numbers by name, NaN where nothing was there to count.

        `prescriptions` and `stays` are numbers; `adherence`, `unsafe` and every rule are percent
        of prescriptions; each rule has `<rule>_count`, `<rule>_exposed` and
        `<rule>_of_exposed` (percent) beside it; the rest are means over stays:
        `hours_below_65`, `area_below_65` (mmHg h), `lactate_clearance` and
        `raised_lactate_clearance` (percent, the latter of stays with a first lactate above 2).
        """
        total = int(self.prescriptions)
        counts = {name: int(self.broken[name]) for name in RULES}
        exposed = {name: int(count) for name, count in self.exposed.items()}
        unsafe = counts["underdosing"] + counts["overdosing"]
        row: dict[str, float] = {
            "prescriptions": total,
            "stays": int(jnp.isfinite(self.hours_below_65).sum()),
            "adherence": float(self.adherence),
            "unsafe": _percent(unsafe, total),
            "unsafe_count": unsafe,
        }
        for name, count in counts.items():
            row[name] = _percent(count, total)
            row[f"{name}_count"] = count
            row[f"{name}_exposed"] = exposed[name]
            row[f"{name}_of_exposed"] = _percent(count, exposed[name])
        raised = jnp.where(self.raised_lactate, self.lactate_clearance, jnp.nan)
        row["hours_below_65"] = float(jnp.nanmean(self.hours_below_65))
        row["area_below_65"] = float(jnp.nanmean(self.area_below_65))
        row["lactate_clearance"] = 100.0 * float(jnp.nanmean(self.lactate_clearance))
        row["raised_lactate_clearance"] = 100.0 * float(jnp.nanmean(raised))
        return row


@partial(jax.jit, static_argnames="config")
def assess(
    dynamic: Float[Array, "*b T 39"],
    action: Int[Array, "*b T"],
    fluid_dose: Num[Array, "*b T"],
    valid: Bool[Array, "*b T"],
    step_hours: float | jax.Array = schema.STEP_HOURS,
    config: SafetyConfig | None = None,
) -> SafetyReport:
    """Assesses trajectories that start at admission, recorded or simulated.

    Args:
      dynamic: [..., T, 39] physical units, what was seen before each treatment.
      action: [..., T] joint actions 0-24.
      fluid_dose: [..., T] mL given per step.
      valid: [..., T] bool, a prescription was made; the valid rows of a trajectory come first.
      step_hours: hours per step.
      config: thresholds.
    """
    vasopressor, fluid = schema.action_levels(action)
    dose = jnp.where(valid, fluid_dose, 0.0)
    first = jnp.zeros_like(vasopressor[..., :1])
    report: SafetyReport = judge(
        Prescriptions(
            meanbp=dynamic[..., schema.INDEX["meanbp"]],
            lactate=dynamic[..., schema.INDEX["lactate"]],
            pf_ratio=sofa.pf_ratio(
                dynamic[..., schema.INDEX["pao2"]], dynamic[..., schema.INDEX["fio2"]]
            ),
            vasopressor=vasopressor,
            previous_vasopressor=jnp.concatenate([first, vasopressor[..., :-1]], -1),
            fluid=fluid,
            fluid_dose=fluid_dose,
            cumulative_fluid=jnp.cumsum(dose, -1) - dose,
            step=jnp.broadcast_to(jnp.arange(valid.shape[-1]), valid.shape),
            valid=valid,
        ),
        step_hours,
        config,
    )
    return report


def assess_episodes(
    episodes: Episodes,
    step_hours: float | jax.Array = schema.STEP_HOURS,
    config: SafetyConfig | None = None,
) -> SafetyReport:
    """`assess` on recorded stays: how the clinicians kept to the rules."""
    result: SafetyReport = assess(
        episodes.dynamic, episodes.action, episodes.fluid_dose, episodes.valid, step_hours, config
    )
    return result


@partial(jax.jit, static_argnames="config")
def judge(
    given: Prescriptions,
    step_hours: float | jax.Array = schema.STEP_HOURS,
    config: SafetyConfig | None = None,
) -> SafetyReport:
    """Applies every rule; for trajectories that `assess` cannot describe, such as late starts."""
    config = config or SafetyConfig()
    found = _rules(given, step_hours, config)
    valid = given.valid

    def count(rows: jax.Array) -> jax.Array:
        return (rows & valid).sum()

    rows = valid.sum(-1)
    treated = rows > 0
    last = jnp.maximum(rows - 1, 0)[..., None]
    first_lactate = given.lactate[..., 0]
    last_lactate = jnp.take_along_axis(given.lactate, last, -1)[..., 0]
    clearance = rules.lactate_clearance(first_lactate, last_lactate)
    hours = rules.hours_below_target(given.meanbp, valid, step_hours=step_hours)
    area = rules.area_below_target(given.meanbp, valid, step_hours=step_hours)
    return SafetyReport(
        broken={name: count(broken) for name, (broken, _) in found.items()},
        exposed={name: count(exposed) for name, (_, exposed) in found.items()},
        prescriptions=valid.sum(),
        adherence=rules.adherence(found["g1"][0], found["g2"][0], valid),
        hours_below_65=jnp.where(treated, hours, jnp.nan),
        area_below_65=jnp.where(treated, area, jnp.nan),
        lactate_clearance=jnp.where(rows > 1, clearance, jnp.nan),
        raised_lactate=(first_lactate > rules.LACTATE_LIMIT) & treated,
    )


@partial(jax.jit, static_argnames="config")
def where_broken(
    given: Prescriptions,
    step_hours: float | jax.Array = schema.STEP_HOURS,
    config: SafetyConfig | None = None,
) -> dict[str, jax.Array]:
    """By rule, [..., T] bool: which prescriptions break it."""
    found = _rules(given, step_hours, config or SafetyConfig())
    return {name: broken & given.valid for name, (broken, _) in found.items()}


def _rules(
    given: Prescriptions, step_hours: float | jax.Array, config: SafetyConfig
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """By rule, where it is broken and where the state makes it applicable."""
    meanbp, lactate, step = given.meanbp, given.lactate, given.step
    vasopressor, previous, fluid = given.vasopressor, given.previous_vasopressor, given.fluid
    rate = given.fluid_dose / step_hours
    later = step > 0
    hours = config.early_hours
    limits = {"volume_above": config.overload_volume, "pf_below": config.overload_pf}

    def under(name: str) -> tuple[jax.Array, jax.Array]:
        rule = rules.UNDERDOSING[name]
        return rule(meanbp, vasopressor, fluid, rate), rule.exposed(meanbp)

    def over(name: str) -> tuple[jax.Array, jax.Array]:
        rule = rules.OVERDOSING[name]
        return rule(meanbp, vasopressor), rule.exposed(meanbp)

    return {
        "g1": (
            rules.g1_untreated_hypoperfusion(meanbp, lactate, vasopressor, fluid),
            rules.hypoperfused(meanbp, lactate),
        ),
        "g2": (
            rules.g2_unneeded_escalation(meanbp, vasopressor, previous, step),
            (meanbp >= rules.MAP_TARGET) & later,
        ),
        "underdosing": under(config.underdosing),
        "overdosing": over(config.overdosing),
        **{f"underdosing_{name}": under(name) for name in rules.UNDERDOSING},
        **{f"overdosing_{name}": over(name) for name in rules.OVERDOSING},
        "dose_jump": (
            rules.dose_jump(vasopressor, previous, step, levels=config.jump_levels),
            later,
        ),
        "abrupt_stop": (
            rules.abrupt_stop(vasopressor, previous, step, from_level=config.stop_from),
            (previous >= config.stop_from) & later,
        ),
        "early_fluid_missed": (
            rules.early_fluid_missed(
                meanbp, lactate, fluid, step, within_hours=hours, step_hours=step_hours
            ),
            rules.needs_early_fluid(
                meanbp, lactate, step, within_hours=hours, step_hours=step_hours
            ),
        ),
        "fluid_overload": (
            rules.fluid_overload(
                fluid, given.cumulative_fluid, given.pf_ratio,
                min_level=config.overload_level, **limits,
            ),
            rules.fluid_intolerant(given.cumulative_fluid, given.pf_ratio, **limits),
        ),
        "vasopressor_at_high_map": (
            rules.vasopressor_at_high_map(meanbp, vasopressor, map_above=config.high_map),
            meanbp > config.high_map,
        ),
    }  # fmt: skip


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else float("nan")
