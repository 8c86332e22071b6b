"""How often policies break rules: what was given, and what is prescribed in recorded states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from policy.registry import CLINICIAN
from sepsis_jax.ope.intervals import delta, ends, mean_of, share_of
from sepsis_jax.ope.robustness import SMALLEST, groups
from worldmodel import schema
from worldmodel.clinical import sofa
from worldmodel.clinical.safety import (
    Prescriptions,
    SafetyReport,
    assess_episodes,
    judge,
    where_broken,
)
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
      dose_edges: edges whose middle doses represent the fluid levels.
    """
    valid = np.asarray(episodes.valid)
    draws = 1 if (probs[valid].max(-1) > 1 - 1e-6).all() else _DRAWS
    logits = jnp.log(jnp.asarray(probs))
    action = jax.random.categorical(key, logits, shape=(draws, *valid.shape))
    report: SafetyReport = judge(_prescriptions(episodes, action, dose_edges), step_hours)
    return report.table()


def _prescriptions(
    episodes: Episodes, action: jax.Array, dose_edges: schema.DoseEdges
) -> Prescriptions:
    """Joint actions [..., N, T] prescribed in recorded states."""
    vasopressor, fluid = schema.action_levels(action)
    given = jnp.where(episodes.valid, episodes.fluid_dose, 0.0)
    seen = ("meanbp", "lactate", "pao2", "fio2")
    at = {name: episodes.dynamic[..., schema.INDEX[name]] for name in seen}
    rows = {
        "meanbp": at["meanbp"],
        "lactate": at["lactate"],
        "pf_ratio": sofa.pf_ratio(at["pao2"], at["fio2"]),
        "previous_vasopressor": jnp.pad(episodes.vasopressor[:, :-1], ((0, 0), (1, 0))),
        "cumulative_fluid": jnp.cumsum(given, -1) - given,
        "step": jnp.arange(episodes.num_steps),
        "valid": episodes.valid,
    }
    return Prescriptions(
        vasopressor=vasopressor,
        fluid=fluid,
        fluid_dose=jnp.asarray(schema.level_doses(dose_edges.fluid))[fluid],
        **{name: jnp.broadcast_to(value, action.shape) for name, value in rows.items()},
    )


HEADLINE_RATES = ("adherence", "unsafe", "underdosing", "overdosing")


class RuleCounts(NamedTuple):
    """Of each of N stays, how many of its prescriptions are expected to be of a kind."""

    of_kind: dict[str, np.ndarray]  # [N] by name of `HEADLINE_RATES`
    rows: np.ndarray  # [N] prescriptions

    def rates(self, stays: np.ndarray | None = None) -> dict[str, tuple[float, float, float]]:
        """Percent of the prescriptions, as (estimate, low, high) by name of `HEADLINE_RATES`.

        95% intervals are by the delta method over stays.

        Args:
          stays: [N] mask of at least two stays; None for all.
        """
        chosen = slice(None) if stays is None else stays
        found = {}
        for name, counts in self.of_kind.items():
            share, influence = share_of(counts[chosen], self.rows[chosen])
            low, high = delta(np.asarray(share), influence)
            found[name] = (100.0 * share, 100.0 * float(low), 100.0 * float(high))
        return found


def rule_counts(
    episodes: Episodes,
    probs: np.ndarray,
    *,
    step_hours: float,
    dose_edges: schema.DoseEdges,
) -> RuleCounts:
    """A policy's prescriptions in recorded states, exact over its 25 probabilities.

    Args:
      episodes: N recorded stays, at least two.
      probs: [N, T, 25] of the policy.
      step_hours, dose_edges: as for `prescribed_rates`.

    Returns:
      Counts of `HEADLINE_RATES`: adherence to G1 and G2, underdosing and overdosing as
      `SafetyConfig` defines them, and unsafe, their sum.
    """
    valid = np.asarray(episodes.valid)
    every = jnp.arange(schema.NUM_ACTIONS)[:, None, None]
    action = jnp.broadcast_to(every, (schema.NUM_ACTIONS, *valid.shape))
    broken = where_broken(_prescriptions(episodes, action, dose_edges), step_hours)
    per_action = np.moveaxis(np.asarray(probs, np.float64), -1, 0)
    counts = {
        name: (np.asarray(broken[name]) * per_action).sum((0, 2))
        for name in ("g1", "g2", "underdosing", "overdosing")
    }
    rows = valid.sum(-1).astype(np.float64)
    parts = {
        "adherence": rows - counts["g1"] - counts["g2"],
        "unsafe": counts["underdosing"] + counts["overdosing"],
        "underdosing": counts["underdosing"],
        "overdosing": counts["overdosing"],
    }
    return RuleCounts({name: parts[name] for name in HEADLINE_RATES}, rows)


def group_table(
    episodes: Episodes,
    returns: np.ndarray,
    estimates: pd.DataFrame,
    counts: Mapping[str, RuleCounts],
) -> pd.DataFrame:
    """Rules and estimates by kind of patient.

    Args:
      episodes: N recorded stays.
      returns: [N] total reward of each.
      estimates: of `sepsis_jax.ope.robustness.evaluate_groups`.
      counts: by policy.

    Returns:
      Rows (group, policy) with stays, small (too few to say anything), mortality (percent);
      adherence and unsafe with _low and _high; wis with _low and _high, trust and reason. Of the
      clinician who made the records WIS is the mean of the group's own returns.
    """
    died = np.asarray(episodes.died_90d)
    rated = "estimator" in estimates  # any group is large enough
    by = (
        estimates[estimates["estimator"] == "wis"].set_index(["group", "policy"]) if rated else None
    )
    rows = []
    for group, mask in groups(episodes).items():
        stays = int(mask.sum())
        for name, of in counts.items():
            row: dict[str, object] = {"group": group, "policy": name, "stays": stays}
            row |= {"small": stays < SMALLEST, "mortality": np.nan}
            row |= dict.fromkeys((*ends("adherence"), *ends("unsafe"), *ends("wis")), np.nan)
            row |= {"trust": False, "reason": "too few stays" if row["small"] else ""}
            if not row["small"]:
                row["mortality"] = 100.0 * float(died[mask].mean())
                rates = of.rates(mask)
                for rate in ("adherence", "unsafe"):
                    row |= dict(zip(ends(rate), rates[rate], strict=True))
                if by is not None and (group, name) in by.index:
                    own = by.loc[(group, name)]
                    value = (own["estimate"], own["low"], own["high"])
                    row |= {"trust": bool(own["trust"]), "reason": own["reason"]}
                    row |= dict(zip(ends("wis"), value, strict=True))
                elif name == CLINICIAN:
                    mean = mean_of(returns[mask])
                    row |= dict(zip(ends("wis"), (mean.value, mean.low, mean.high), strict=True))
                    row["trust"] = True
            rows.append(row)
    return pd.DataFrame(rows)
