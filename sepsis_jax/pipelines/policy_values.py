"""What policies are worth, what they prescribe, and how often that breaks a rule.

In the synthetic world values are true values, else those of a world model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from policy.base import Policy
from sepsis_jax.ope.intervals import mean_of
from sepsis_jax.ope.simulated import simulated_value
from sepsis_jax.pipelines.policies import patients_per_call
from sepsis_jax.report.policies import action_shares
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.clinical import sofa
from worldmodel.clinical.reward import episode_rewards
from worldmodel.clinical.safety import Prescriptions, assess_episodes, judge
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.world_model import WorldModel
from worldmodel.synthetic import Config, Params, generate


class Outcome(NamedTuple):
    """What came of one policy on N patients, the same for every policy."""

    total: np.ndarray  # [N] undiscounted total reward
    died: np.ndarray | None  # [N] by day 90; None where unknown
    length: float | None  # mean steps
    rates: dict[str, float]
    shares: np.ndarray  # [5, 5] percent


@dataclass(frozen=True)
class TrueWorld:
    """Fresh synthetic patients, the same for every policy, with the same random numbers."""

    patients: int
    seed: int
    confounding: float

    def params(self) -> Params:
        """Coefficients of the world."""
        params = Params()
        clinician = replace(params.clinician, confounding=self.confounding)
        return replace(params, clinician=clinician)

    def outcome(self, policy: Policy | None) -> Outcome:
        """Of a policy; None is the clinician."""
        episodes, truth = generate(
            jax.random.key(self.seed), self.patients, policy=policy, keep_latent=False,
            config=Config(past=0 if policy is None else policy.past), params=self.params(),
            block=patients_per_call(policy),
        )  # fmt: skip
        return Outcome(
            total=np.asarray(truth.reward, np.float64).sum(1),
            died=np.asarray(episodes.died_90d),
            length=float(np.mean(episodes.length)),
            rates=simulated_rates(episodes, schema.STEP_HOURS),
            shares=action_shares(taken(episodes), np.asarray(episodes.valid)),
        )


@dataclass(frozen=True, eq=False)
class ModelWorld:
    """Recorded patients simulated in a world model; rates on the recorded states."""

    world_model: WorldModel
    episodes: Episodes
    horizon: int
    samples: int
    seed: int
    dose_edges: schema.DoseEdges

    def outcome(self, policy: Policy | None) -> Outcome:
        """Of a policy; for the clinician (None) what the records say."""
        key_value, key_act, key_draw = jax.random.split(jax.random.key(self.seed), 3)
        episodes, step_hours = self.episodes, self.world_model.step_hours
        valid = np.asarray(episodes.valid)
        if policy is None:
            return Outcome(
                total=recorded_returns(episodes),
                died=np.asarray(episodes.died_90d),
                length=float(np.mean(episodes.length)),
                rates=simulated_rates(episodes, step_hours),
                shares=action_shares(taken(episodes), valid),
            )
        found = simulated_value(
            self.world_model, key_value, episodes, policy,
            horizon=self.horizon, samples=self.samples, block=patients_per_call(policy),
        )  # fmt: skip
        probs = policy.action_probs(episodes, key=key_act)
        rates = prescribed_rates(
            key_draw, episodes, probs, step_hours=step_hours, dose_edges=self.dose_edges
        )
        return Outcome(found.total, None, None, rates, action_shares(probs, valid))


def recorded_returns(episodes: Episodes) -> np.ndarray:
    """[N] undiscounted total reward of recorded stays."""
    total: np.ndarray = np.asarray(episode_rewards(episodes), np.float64).sum(1)
    return total


def value_table(
    outcomes: dict[str, Outcome],
    kinds: dict[str, str],
    *,
    baseline: str,
    best: str | None,
) -> pd.DataFrame:
    """One row per policy with value, paired differences, mortality and rates.

    Args:
      outcomes: by policy, of the same patients in the same order.
      kinds: of the policies; the best of kind "offline" is compared with.
      baseline: policy that `less_clinician` is the difference from.
      best: policy that marks 100% of the gap from the baseline; None for no gap.

    Raises:
      InputError: the baseline is missing.
    """
    if baseline not in outcomes:
        raise InputError(f"comparison: the baseline {baseline} is missing")
    values = {name: float(found.total.mean()) for name, found in outcomes.items()}
    offline = [name for name in outcomes if kinds[name] == "offline"]
    best_offline = max(offline, key=values.__getitem__) if offline else None
    gap = np.nan if best is None else values[best] - values[baseline]
    gap = gap if gap > 0 else np.nan  # nothing to close
    rows = []
    for name, found in outcomes.items():
        row: JsonDict = {"policy": name, "kind": kinds[name]}
        total = mean_of(found.total)
        row |= {"value": total.value, "low": total.low, "high": total.high, "value_se": total.se}
        row |= _against("less_clinician", found, outcomes[baseline], same=name == baseline)
        best_offline_outcome = None if best_offline is None else outcomes[best_offline]
        row |= _against("less_best_offline", found, best_offline_outcome, same=name == best_offline)
        row["gap_closed"] = 100.0 * (values[name] - values[baseline]) / gap
        died = None if found.died is None else mean_of(found.died.astype(np.float64))
        row["mortality"] = np.nan if died is None else 100.0 * died.value
        row["mortality_se"] = np.nan if died is None else 100.0 * died.se
        row["length"] = np.nan if found.length is None else found.length
        row |= {rate: found.rates[rate] for rate in RATES}
        rows.append(row)
    table = pd.DataFrame(rows)
    table.attrs = {"best_offline": best_offline, "baseline": baseline, "best": best}
    return table


def _against(name: str, found: Outcome, other: Outcome | None, *, same: bool) -> dict[str, float]:
    """A paired difference; of nothing from itself."""
    if other is None or same:
        return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
    gain = mean_of(found.total - other.total)
    return {name: gain.value, f"{name}_low": gain.low, f"{name}_high": gain.high}


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
    one_hot: np.ndarray = np.eye(schema.NUM_ACTIONS, dtype=np.float32)[np.asarray(episodes.action)]
    return one_hot
