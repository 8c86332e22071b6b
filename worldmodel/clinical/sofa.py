"""SOFA: Sequential Organ Failure Assessment (Vincent et al., Intensive Care Medicine 1996).

Two named variants:

- `standard`: vasopressors scored by dose in norepinephrine equivalents (any: 3, above 0.1
  mcg/kg/min: 4), urine of 24 h;
- `reference`: as SepsisAgent scores inside its world model, vasopressors by *level*
  (`min(4, [MAP < 70] + level)`) and the unscaled urine of the up to six steps before.

All functions take physical units and arrays of any shape; features are the last axis.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from worldmodel import schema

MIN_FIO2 = 21.0  # percent, room air
WINDOW_HOURS = 24.0


class SofaScore(NamedTuple):
    """Points 0 to 4 per organ, float32, any shape."""

    respiratory: jax.Array
    coagulation: jax.Array
    liver: jax.Array
    cardiovascular: jax.Array
    cns: jax.Array
    renal: jax.Array

    @property
    def total(self) -> Float[Array, "*b"]:
        """0 to 24."""
        return sum(self[1:], start=self[0])


def standard(
    dynamic: Float[Array, "*#b 39"],
    *,
    ventilated: Bool[Array, "*#b"],
    vasopressor_dose: Num[Array, "*#b"],
    urine_24h: Num[Array, "*#b"],
) -> SofaScore:
    """SOFA where doses are known.

    Args:
      dynamic: [..., 39] physical units.
      ventilated: [...] bool.
      vasopressor_dose: [...] norepinephrine equivalents, mcg/kg/min.
      urine_24h: [...] mL in 24 h (`urine_24h` below makes it).
    """
    on_vasopressor = jnp.where(vasopressor_dose > 0.1, 4.0, 3.0)
    hypotensive = (_feature(dynamic, "meanbp") < 70).astype(jnp.float32)
    return SofaScore(
        cardiovascular=jnp.where(vasopressor_dose > 0, on_vasopressor, hypotensive),
        renal=renal(_feature(dynamic, "creatinine"), urine_24h),
        **_shared(dynamic, ventilated),
    )


def reference(
    dynamic: Float[Array, "*#b 39"],
    *,
    ventilated: Bool[Array, "*#b"],
    vasopressor_level: Num[Array, "*#b"],
    urine_before: Num[Array, "*#b"],
) -> SofaScore:
    """SOFA as SepsisAgent's world model scores it.

    Args:
      dynamic: [..., 39] physical units.
      ventilated: [...] bool, predicted probability above 0.5.
      vasopressor_level: [...] 0 to 4.
      urine_before: [...] mL in the up to six steps before this one, not scaled to 24 h.
    """
    hypotensive = (_feature(dynamic, "meanbp") < 70).astype(jnp.float32)
    return SofaScore(
        cardiovascular=jnp.minimum(4.0, hypotensive + vasopressor_level),
        renal=renal(_feature(dynamic, "creatinine"), urine_before),
        **_shared(dynamic, ventilated),
    )


def _shared(dynamic: jax.Array, ventilated: jax.Array) -> dict[str, jax.Array]:
    gcs = sum(_feature(dynamic, name) for name in ("gcs_eye", "gcs_verbal", "gcs_motor"))
    return {
        "respiratory": respiratory(
            _feature(dynamic, "pao2"), _feature(dynamic, "fio2"), ventilated
        ),
        "coagulation": _points_below(_feature(dynamic, "platelet"), (150, 100, 50, 20)),
        "liver": _points_from(_feature(dynamic, "bilirubin_total"), (1.2, 2, 6, 12)),
        "cns": _points_below(jnp.asarray(gcs), (15, 13, 10, 6)),
    }


def pf_ratio(pao2: Num[Array, "*#b"], fio2: Num[Array, "*#b"]) -> Float[Array, "*#b"]:
    """PaO2 / FiO2 in mmHg, of PaO2 in mmHg and FiO2 in percent (at least 21)."""
    return pao2 / (jnp.maximum(fio2, MIN_FIO2) / 100)


def respiratory(
    pao2: Num[Array, "*#b"], fio2: Num[Array, "*#b"], ventilated: Bool[Array, "*#b"]
) -> Float[Array, "*#b"]:
    """Points from PaO2 (mmHg) / FiO2 (percent); 3 and 4 need ventilation."""
    ratio = pf_ratio(pao2, fio2)
    points = _points_below(ratio, (400, 300, 200, 100))
    return jnp.where(ventilated, points, jnp.minimum(points, 2.0))


def renal(creatinine: Num[Array, "*#b"], urine_24h: Num[Array, "*#b"]) -> Float[Array, "*#b"]:
    """The worse of the points from creatinine (mg/dL) and urine (mL in 24 h)."""
    from_urine = jnp.where(urine_24h < 200, 4.0, jnp.where(urine_24h < 500, 3.0, 0.0))
    return jnp.maximum(_points_from(creatinine, (1.2, 2, 3.5, 5)), from_urine)


def urine_24h(
    urine: Num[Array, "*b T"], *, step_hours: float = schema.STEP_HOURS, scaled: bool = True
) -> Num[Array, "*b T"]:
    """Urine of the 24 h up to the end of each step.

    Args:
      urine: [..., T] mL per step from ICU admission on.
      step_hours: length of a step in hours.
      scaled: scale a shorter history up to 24 h.

    Returns:
      [..., T] mL.
    """
    window = max(round(WINDOW_HOURS / step_hours), 1)
    num_steps = urine.shape[-1]
    total = jnp.cumsum(urine, axis=-1)
    before = jnp.concatenate([jnp.zeros_like(total[..., :1]), total[..., :-1]], axis=-1)
    start = jnp.maximum(jnp.arange(num_steps) - window + 1, 0)
    in_window = total - before[..., start]
    steps = jnp.minimum(jnp.arange(num_steps) + 1, window)
    return in_window * (window / steps) if scaled else in_window


def _feature(dynamic: jax.Array, name: str) -> jax.Array:
    return dynamic[..., schema.INDEX[name]]


def _points_below(values: jax.Array, limits: tuple[float, ...]) -> jax.Array:
    """One point for every limit that the value lies below."""
    return sum(((values < limit).astype(jnp.float32) for limit in limits), jnp.float32(0))


def _points_from(values: jax.Array, limits: tuple[float, ...]) -> jax.Array:
    """One point for every limit that the value reaches."""
    return sum(((values >= limit).astype(jnp.float32) for limit in limits), jnp.float32(0))
