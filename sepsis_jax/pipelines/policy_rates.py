"""What policies prescribe, and how often that breaks a rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import schema
from worldmodel.clinical import sofa
from worldmodel.clinical.safety import Prescriptions, assess_episodes, judge
from worldmodel.episodes import Episodes

RATES = ("adherence", "unsafe", "underdosing", "overdosing", "g1", "g2", "dose_jump", "abrupt_stop",
         "early_fluid_missed", "fluid_overload", "vasopressor_at_high_map")  # fmt: skip
"""Shown of a safety report, percent of prescriptions."""
_DRAWS = 16  # of the actions of a policy that is not deterministic


def simulated_rates(episodes: Episodes, step_hours: float) -> dict[str, float]:
    """Rates of what was given, in records or in stays simulated under a policy."""
    return assess_episodes(episodes, step_hours).table()


def prescribed_rates(
    key: jax.Array,
    episodes: Episodes,
    probs: np.ndarray,
    *,
    step_hours: float,
    dose_edges: schema.DoseEdges,
) -> dict[str, float]:
    """Rates of what a policy would give in recorded states.

    The vasopressor running and the volume given before are the clinician's, since they made the
    states; only the prescription of the row is the policy's.

    Args:
      key: of the actions drawn where a policy is not deterministic.
      episodes: the recorded stays.
      probs: [N, T, 25] of the policy.
      step_hours: hours per step.
      dose_edges: whose middle doses the fluid levels stand for.
    """
    valid = np.asarray(episodes.valid)
    draws = 1 if (probs[valid].max(-1) > 1 - 1e-6).all() else _DRAWS
    logits = jnp.log(jnp.asarray(probs))
    action = jax.random.categorical(key, logits, shape=(draws, *valid.shape))
    vasopressor, fluid = schema.action_levels(action)
    shape = action.shape
    before = jnp.pad(episodes.vasopressor[:, :-1], ((0, 0), (1, 0)))
    given = jnp.where(episodes.valid, episodes.fluid_dose, 0.0)
    seen = ("meanbp", "lactate", "pao2", "fio2")
    at = {name: episodes.dynamic[..., schema.INDEX[name]] for name in seen}
    rows = {
        "meanbp": at["meanbp"],
        "lactate": at["lactate"],
        "pf_ratio": sofa.pf_ratio(at["pao2"], at["fio2"]),
        "previous_vasopressor": before,
        "cumulative_fluid": jnp.cumsum(given, -1) - given,
        "step": jnp.arange(episodes.num_steps),
        "valid": episodes.valid,
    }
    report = judge(
        Prescriptions(
            vasopressor=vasopressor,
            fluid=fluid,
            fluid_dose=jnp.asarray(schema.level_doses(dose_edges.fluid))[fluid],
            **{name: jnp.broadcast_to(value, shape) for name, value in rows.items()},
        ),
        step_hours,
    )
    return report.table()


def taken(episodes: Episodes) -> np.ndarray:
    """[N, T, 25] one-hot actions that were taken."""
    return np.eye(schema.NUM_ACTIONS, dtype=np.float32)[np.asarray(episodes.action)]
