"""Off-policy estimates of policies on recorded stays: no files are read or written here.

`estimate_policies` runs the estimators of `sepsis_jax.ope`, the sensitivity analyses and, where a
world model is given, the value of every policy in simulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pandas as pd

from policy.base import Policy
from policy.registry import CLINICIAN
from sepsis_jax import ope
from sepsis_jax.ope import robustness
from sepsis_jax.ope.data import FlawError, clean, inspect
from sepsis_jax.ope.diagnostics import Limits
from sepsis_jax.ope.intervals import mean_of
from sepsis_jax.ope.policies import check_softening
from sepsis_jax.ope.simulated import SimulatedValue, simulated_value
from sepsis_jax.pipelines.policy_training import patients_per_call
from sepsis_jax.runs import Progress, silent
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.world_model import WorldModel

ESTIMATOR = "world_model"


@dataclass(frozen=True)
class OPEOptions:
    """Settings of an evaluation; see `sepsis_jax.ope.evaluate`.

    Attributes:
      split: "train", "validation", "test" or "all".
      estimators: names separated by commas; empty for all that apply.
      values: "linear", "neural" or "none".
      gamma: discount.
      n_bootstrap: resamples.
      interval: "adaptive_t", "percentile", "bca", "delta" or "t".
      clip: largest cumulative weight; 0 for no clipping.
      soften: "none", "uniform" or "clinician"; of all policies but the clinician.
      soften_share: share of probability that softening moves.
      zero_behavior, row_sums, missing_reward: "error", or how to treat the flaw; see
        `sepsis_jax.ope.InputPolicy`.
      behavior_folds: of a fitted clinician, where evaluated stays would be in its training split.
      behavior_stays: number of other stays that a table of the clinician's probabilities was
        estimated from; 0 if the table holds the true ones.
      effective: least effective sample size that is trusted, in stays.
      confounding: least strength (Gamma) of unrecorded confounding that a trusted conclusion must
        withstand.
      horizon: steps in a world model; 0 for whole stays (`ope.simulated.whole_stay`).
      samples: futures per stay in a world model; 0 for one per ensemble member.
      subgroups: whether to repeat it by kind of patient, which takes most of the time.
      seed: seed of every random choice.
    """

    split: str = "test"
    estimators: str = ""
    values: str = "linear"
    gamma: float = 1.0
    n_bootstrap: int = 2000
    interval: str = "adaptive_t"
    clip: float = 0.0
    soften: str = "none"
    soften_share: float = 0.01
    zero_behavior: str = "error"
    row_sums: str = "error"
    missing_reward: str = "error"
    behavior_folds: int = 5
    behavior_stays: int = 0
    effective: float = Limits.effective
    confounding: float = Limits.confounding
    horizon: int = 0
    samples: int = 0
    subgroups: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_softening(self.soften, self.soften_share)
        if not (self.effective >= 0 and self.confounding >= 1 and self.behavior_stays >= 0):
            raise InputError(
                f"effective, confounding, behavior_stays: got {self.effective}, "
                f"{self.confounding}, {self.behavior_stays}; expected at least 0, 1 and 0"
            )


class OPEKeys(NamedTuple):
    """Random keys of one evaluation, one per use."""

    fit: jax.Array  # fitted value functions
    behavior: jax.Array  # fitted model of the clinician
    bootstrap: jax.Array
    groups: jax.Array  # subgroups


def ope_keys(seed: int) -> OPEKeys:
    """The random keys that follow from a seed."""
    return OPEKeys(*jax.random.split(jax.random.key(seed), 4))


class _EvaluateOptions(TypedDict):
    """Arguments that `ope.evaluate` gets for all stays and for every subgroup."""

    estimators: Sequence[str] | None
    gamma: float
    clip: ope.Clip | None
    interval: str
    n_bootstrap: int
    fitted: ope.Fitted | None
    limits: Limits
    clinician: ope.ClinicianFit | None


@dataclass(frozen=True)
class OPEResult:
    """Estimates of several policies.

    Attributes:
      table: of `sepsis_jax.ope.evaluate`, with rows "world_model" where one was given.
      confounding: bounds on the values under unrecorded confounding.
      groups: the same estimates by subgroup of the stays that were kept; empty if not wanted.
      stays: number of stays before any were dropped.
      treated: what was changed in flawed inputs, with counts.
    """

    table: pd.DataFrame
    confounding: pd.DataFrame
    groups: pd.DataFrame
    stays: int
    treated: Mapping[str, int]


def estimate_policies(
    episodes: Episodes,
    probs: Mapping[str, np.ndarray | jax.Array],
    policies: Mapping[str, Policy],
    *,
    keys: OPEKeys,
    options: OPEOptions,
    behavior_probs: npt.NDArray[np.float32] | None = None,
    clinician: ope.ClinicianFit | None = None,
    world_model: WorldModel | None = None,
    progress: Progress = silent,
) -> OPEResult:
    """Estimates the value of every policy on recorded stays.

    Args:
      episodes: N recorded stays.
      probs: [N, T, 25] action probabilities of every policy.
      policies: those that can be run in a world model, and the fitted clinician if there is one.
      keys: from `ope_keys`.
      options: settings.
      behavior_probs: [N, T, 25] probabilities of the clinician; None where only those of the
        recorded actions are known.
      clinician: how they were estimated; None where they are true.
      world_model: to run `policies` in as well.
      progress: called with (phase, share done).
    """
    data = ope.from_episodes(
        episodes, behavior_probs=behavior_probs, features=ope.state_features(episodes)
    )
    stays = data.num_stays
    input_policy = ope.InputPolicy(
        zero_behavior=options.zero_behavior,
        row_sums=options.row_sums,
        missing_reward=options.missing_reward,
    )
    try:
        found = inspect(data, probs, input_policy)
    except FlawError as flaw:
        raise flaw.named(np.asarray(episodes.stay_id)) from None
    data, checked = clean(data, found)
    episodes = episodes.select(found.kept)
    fitted = None
    if options.values != "none":
        progress("fitted values", 0.2)
        fitted = ope.fit(keys.fit, data, checked, method=options.values, gamma=options.gamma)
    progress("estimates", 0.5)
    wanted = [name.strip() for name in options.estimators.split(",") if name.strip()]
    clip = ope.Clip(cumulative=(0.0, options.clip)) if options.clip else None
    shared: _EvaluateOptions = {
        "estimators": wanted or None, "gamma": options.gamma, "clip": clip,
        "interval": options.interval, "n_bootstrap": options.n_bootstrap, "fitted": fitted,
        "limits": Limits(effective=options.effective, confounding=options.confounding),
        "clinician": clinician,
    }  # fmt: skip
    table = ope.evaluate(data, checked, key=keys.bootstrap, treated=found.counts, **shared)
    if world_model is not None:
        progress("world model", 0.6)
        attrs = table.attrs
        rows = world_model_rows(
            world_model, list(checked), policies, episodes,
            horizon=options.horizon, samples=options.samples, seed=options.seed,
        )  # fmt: skip
        table = pd.concat([table, rows], ignore_index=True)
        table.attrs = attrs
    weights = ope.weigh(data, jnp.stack(list(checked.values())), clip)
    confounding = robustness.confounding_table(
        list(checked), data.returns(options.gamma), weights.log_weight[..., -1],
        trusted=_trusted(table, list(checked)),
    )  # fmt: skip
    progress("subgroups", 0.7)
    few: _EvaluateOptions = {
        **shared,
        "estimators": ("wis",) if fitted is None else ("wis", "wdr"),
        "n_bootstrap": min(options.n_bootstrap, 1000),
        # A group is evaluated with a clinician that was fitted to more than its stays.
        "clinician": None if clinician is None else ope.ClinicianFit(clinician.stays),
    }
    masks = robustness.groups(episodes) if options.subgroups else {}
    groups = robustness.evaluate_groups(data, checked, masks, key=keys.groups, **few)
    return OPEResult(table, confounding, groups, stays, found.counts)


def _trusted(table: pd.DataFrame, names: Sequence[str]) -> list[bool]:
    """[K] whether WIS, or else any weighted estimate, of each policy is trusted."""
    wis = table[table["estimator"] == "wis"]
    chosen = wis if len(wis) else table[table["estimator"] != "on_policy"]
    trusted = chosen.groupby("policy")["trust"].any()
    return [bool(trusted.get(name, False)) for name in names]


def world_model_rows(
    world_model: WorldModel,
    names: Sequence[str],
    policies: Mapping[str, Policy],
    episodes: Episodes,
    *,
    horizon: int,
    samples: int,
    seed: int,
) -> pd.DataFrame:
    """One row per policy in the columns of `sepsis_jax.ope.evaluate`, and the members' `spread`.

    Differences are from the fitted clinician in the same model, paired by patient, where there is
    one.

    Args:
      world_model: to simulate in.
      names: of all policies, in order.
      policies: those that can be run, and the fitted clinician if there is one.
      episodes: stays whose first rows are the starts.
      horizon: steps; 0 for whole stays (`ope.simulated.whole_stay`).
      samples: futures per stay; 0 for one per ensemble member.
      seed: seed of the noise, which all policies share.
    """
    key = jax.random.key(seed)
    found: dict[str, SimulatedValue] = {
        name: simulated_value(
            world_model, key, episodes, policy, horizon=horizon or None,
            samples=samples or world_model.num_members, block=patients_per_call(policy),
        )
        for name, policy in policies.items()
    }  # fmt: skip
    return pd.DataFrame([_row(name, found.get(name), found.get(CLINICIAN)) for name in names])


def _row(
    name: str, found: SimulatedValue | None, clinician: SimulatedValue | None
) -> dict[str, object]:
    row: dict[str, object] = {"policy": name, "estimator": ESTIMATOR, "trust": False}
    if found is None:
        return row | {"estimate": np.nan, "reason": "a table cannot be played in a world model"}
    mean = mean_of(found.total)
    row |= {"estimate": mean.value, "se": mean.se, "low": mean.low, "high": mean.high}
    if clinician is not None and clinician is not found:
        gain = mean_of(found.total - clinician.total)
        row |= {"difference": gain.value, "difference_low": gain.low, "difference_high": gain.high}
    reason = f"the model's own word; its members differ by {found.spread:.2g}"
    return row | {"spread": found.spread, "reason": reason}
