"""Off-policy evaluation by playing policies in a world model, beside the other estimators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd

from policy.base import Policy
from sepsis_jax.ope.intervals import mean_of
from sepsis_jax.ope.simulated import SimulatedValue, simulated_value
from sepsis_jax.pipelines.policies import CLINICIAN, patients_per_call
from sepsis_jax.pipelines.policy_values import typical_horizon
from worldmodel.episodes import Episodes
from worldmodel.models.world_model import WorldModel

ESTIMATOR = "world_model"


def world_model_rows(
    world_model: WorldModel,
    names: Sequence[str],
    played: Mapping[str, Policy],
    episodes: Episodes,
    *,
    horizon: int,
    samples: int,
    seed: int,
) -> pd.DataFrame:
    """One row per policy, as `sepsis_jax.ope.evaluate` has them, with the members' `spread`.

    Differences are from the clinician in the same model, paired, where a clone can be played.

    Args:
      world_model: to play in.
      names: of all policies, in order.
      played: the policies that can be played, and the cloned clinician if there is one.
      episodes: whose first rows are the starts.
      horizon: steps; 0 for the mean length of the stays.
      samples: futures per stay; 0 for one per ensemble member.
      seed: of the noise, which all policies share.
    """
    key = jax.random.key(seed)
    horizon = horizon or typical_horizon(episodes)
    found: dict[str, SimulatedValue] = {
        name: simulated_value(
            world_model, key, episodes, policy, horizon=horizon,
            samples=samples or world_model.num_members, block=patients_per_call(policy),
        )
        for name, policy in played.items()
    }  # fmt: skip
    return pd.DataFrame([_row(name, found.get(name), found.get(CLINICIAN)) for name in names])


def _row(
    name: str, found: SimulatedValue | None, clinician: SimulatedValue | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"policy": name, "estimator": ESTIMATOR, "trust": False}
    if found is None:
        return row | {"estimate": np.nan, "reason": "a table cannot be played in a world model"}
    mean = mean_of(found.total)
    row |= {"estimate": mean.value, "se": mean.se, "low": mean.low, "high": mean.high}
    if clinician is not None and clinician is not found:
        gain = mean_of(found.total - clinician.total)
        row |= {"difference": gain.value, "difference_low": gain.low, "difference_high": gain.high}
    reason = f"the model's own word; its members differ by {found.spread:.2g}"
    return row | {"spread": found.spread, "reason": reason}
