"""Policies learned from the stays that judge them, in the gumbel-max simulator.

Oberst & Sontag (2019) learn a policy from 1,000 stays that hide diabetes and glucose, and estimate
its value from the same stays: importance weighting and a model of the process promise up to 1 where
the truth lies near -0.45. Here the same is done in several settings, with every estimator and the
verdict, beside the exact value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from sepsis_jax.ope.benchmark import HIDDEN, Sample, sample
from sepsis_jax.ope.data import check
from sepsis_jax.ope.evaluate import evaluate
from sepsis_jax.ope.fitted import fit
from sepsis_jax.ope.hidden_state import Recorded, counts, learned, recorded, suggested
from worldmodel.envs.gumbel_max import MAX_STEPS, NUM_ACTIONS, gumbel_max, visible
from worldmodel.envs.tables import MDP, true_value
from worldmodel.errors import InputError

CLINICIANS, POLICIES = ("counted", "known"), ("greedy", "soft", "near")
MODEL = "model"  # the estimator that solves the process that the stays suggest


@dataclass(frozen=True)
class Setting:
    """How a policy is learned and judged.

    Attributes:
      stays: that the policy is learned from, and as many that judge it.
      hidden: variables that are not recorded.
      clinician: "counted", frequencies of actions in recorded states, as published; or "known",
        the physician's probabilities given the whole state.
      policy: "greedy", as learned; "soft", with 0.01 for the other actions, as published for
        importance weighting; or "near", with a tenth of the greedy policy in the counted clinician.
      held_out: judged by other stays than those learned from.
    """

    stays: int = 1000
    hidden: tuple[str, ...] = HIDDEN
    clinician: str = "counted"
    policy: str = "greedy"
    held_out: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("clinician", CLINICIANS), ("policy", POLICIES)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )
        if self.stays < 20:
            raise InputError(f"stays: got {self.stays}, expected at least 20")


_PUBLISHED = Setting()
SETTINGS = (
    _PUBLISHED,
    replace(_PUBLISHED, policy="soft"),
    replace(_PUBLISHED, clinician="known"),
    replace(_PUBLISHED, held_out=True),
    replace(_PUBLISHED, policy="near"),
    replace(_PUBLISHED, policy="near", clinician="known"),
    replace(_PUBLISHED, stays=5000),
    replace(_PUBLISHED, stays=5000, policy="near"),
    replace(_PUBLISHED, hidden=("diabetes",)),
    replace(_PUBLISHED, hidden=()),
    replace(_PUBLISHED, hidden=(), clinician="known", held_out=True),
)


@cache
def _world() -> MDP:
    return gumbel_max()


def judge(setting: Setting, seed: int, *, n_bootstrap: int = 500) -> pd.DataFrame:
    """One row per estimator: estimate, interval, verdict, and the exact values.

    Args:
      setting: how to learn and judge.
      seed: of the stays and resamples.
      n_bootstrap: resamples.

    Returns:
      Columns of `sepsis_jax.ope.evaluate`, with `truth` and `clinician_truth`; and a row `model`,
      what the policy is worth in the process that the judging stays suggest, without an interval
      and never trusted.
    """
    world = _world()
    seen = recorded(world, *visible(setting.hidden))
    taught = sample(world, setting.stays, horizon=MAX_STEPS, seed=(seed, 0))
    process = _process(taught, seen)
    greedy = learned(process)
    policy = {
        "greedy": greedy,
        "soft": np.where(greedy > 0, 0.99, 0.01 / (greedy.shape[1] - 1)),
        "near": 0.1 * greedy + 0.9 * process.clinician,
    }[setting.policy]
    judges = taught
    if setting.held_out:
        judges = sample(world, setting.stays, horizon=MAX_STEPS, seed=(seed, 1))
    counted = _process(judges, seen)
    given = world.clinician if setting.clinician == "known" else seen.whole(counted.clinician)
    data, whole = judges.under(given), seen.whole(policy)
    data, probs, _ = check(data, {setting.policy: judges.probs(whole)})
    state = jnp.asarray(seen.number[judges.state[:, : data.num_steps]], jnp.int32)
    fit_key, key = jax.random.split(jax.random.key(seed))
    fitted = fit(fit_key, data, probs, method="tabular", state=state, num_states=seen.states)
    table = evaluate(
        data, probs, key=key, fitted=fitted, n_bootstrap=n_bootstrap, tail_levels=()
    )  # fmt: skip
    model = {
        "policy": setting.policy, "estimator": MODEL, "trust": False,
        "estimate": true_value(counted, policy, horizon=MAX_STEPS),
        "reason": "the model's own word",
    }  # fmt: skip
    table = pd.concat([table, pd.DataFrame([model])])
    return table.assign(
        truth=true_value(world, whole, horizon=MAX_STEPS),
        clinician_truth=true_value(world, world.clinician, horizon=MAX_STEPS),
    ).reset_index(drop=True)


def _process(stays: Sample, seen: Recorded) -> MDP:
    """The process that stays suggest."""
    state = seen.number[stays.state]
    found = counts(
        state, np.asarray(stays.data.action), np.asarray(stays.data.alive),
        seen.number[stays.last], (seen.states, NUM_ACTIONS),
    )  # fmt: skip
    return suggested(found, np.bincount(state[:, 0], minlength=seen.states))
