"""Futures of a few recorded patients under a few plans, beside what truly happens if it is known.

Of a synthetic patient it is known: the world plays the same patient with the same random numbers
under every plan, and the clinician goes on where a plan ends.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
import pandas as pd

from sepsis_jax.pipelines.episodes import SOURCE
from sepsis_jax.pipelines.policy_values import TrueWorld
from sepsis_jax.pipelines.world_model import FEATURES, patient_futures
from sepsis_jax.report import words
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.plans import Plan
from worldmodel.synthetic.generate import Truth, generate_patients
from worldmodel.synthetic.simulate import FOLLOW_POLICY
from worldmodel.synthetic.world import Config

HORIZON = 6
START_STEP = 2
PLANS = ("clinician", "nothing=0,0", "fluids=0,3", "vasopressor=2,1", "both=2,3;2,1")
_LOW_PRESSURE = 58.0  # mmHg: in need of treatment, and treatable
_TOLERANCE = 1e-2  # of values that are simulated again, which hang on the machine in the last digit


class ExampleFutures(NamedTuple):
    """Futures of one patient.

    Attributes:
      stay_id: the stay.
      reason: why this one, in words.
      table: of `pipelines.world_model.trajectory_table`.
      outcomes: of `pipelines.world_model.outcome_table`, with `given`, the plan in words, and
        where the truth is known true_died and true_reward, the total reward from the start on.
      past: recorded rows up to the start.
      truth: rows (plan, hour) with a column per value, while the stay lasts; None if not known.
    """

    stay_id: int
    reason: str
    table: pd.DataFrame
    outcomes: pd.DataFrame
    past: pd.DataFrame
    truth: pd.DataFrame | None


def example_futures(
    world_model: WorldModel, episodes: Episodes, manifest: JsonDict, *, samples: int, seed: int
) -> list[ExampleFutures]:
    """Up to three patients, chosen by what was recorded when the plans begin.

    Args:
      world_model: to simulate in.
      episodes: recorded stays; those that last from the start to the end of the plans are used.
      manifest: of their folder, which says whether they are synthetic.
      samples: futures per plan, rounded up to a multiple of the ensemble size.
      seed: of the noise.
    """
    members = world_model.num_members
    samples = -(-samples // members) * members
    found = []
    for index, reason in chosen_stays(episodes).items():
        stay = episodes.select(np.array([index]))
        plans, table, outcomes, recorded = patient_futures(
            world_model, stay, step=START_STEP, plans=PLANS, horizon=HORIZON, samples=samples,
            seed=seed,
        )  # fmt: skip
        outcomes["given"] = [
            "as recorded" if plan.name == PLANS[0] else words.plan(plan.actions.tolist())
            for plan in plans
        ]
        start = table["hour"].min()
        truth = _truth(stay, plans, manifest, world_model.step_hours)
        if truth is not None:
            outcomes = outcomes.merge(truth.outcomes, on="plan")
        found.append(
            ExampleFutures(
                int(np.asarray(stay.stay_id)[0]), reason, table, outcomes,
                recorded[recorded["hour"] <= start], None if truth is None else truth.rows,
            )
        )  # fmt: skip
    return found


def chosen_stays(episodes: Episodes) -> dict[int, str]:
    """Up to three stays that last to the end of the plans, and why each was chosen.

    One with low pressure, one with high lactate, one that is mildly ill; fewer if there are fewer.
    """
    usable = np.flatnonzero(np.asarray(episodes.length) >= START_STEP + HORIZON)
    row = np.asarray(episodes.dynamic)[:, START_STEP]
    pressure, lactate = (row[:, schema.INDEX[name]] for name in ("meanbp", "lactate"))
    score = np.asarray(episodes.sofa)[:, START_STEP]
    found: dict[int, str] = {}
    for reason, distance in (
        ("low blood pressure", np.abs(pressure - _LOW_PRESSURE)),
        ("high lactate", -lactate),
        ("mildly ill", score),
    ):
        left = [stay for stay in usable if stay not in found]
        if left:
            found[int(left[int(np.argmin(distance[left]))])] = reason
    return found


class _TrueCourses(NamedTuple):
    rows: pd.DataFrame
    outcomes: pd.DataFrame  # plan, true_died, true_reward


def _truth(
    stay: Episodes, plans: list[Plan], manifest: JsonDict, step_hours: float
) -> _TrueCourses | None:
    """What truly happens to a synthetic stay under each plan; None of any other stay."""
    made = manifest.get("options", {})
    if manifest.get("source") != SOURCE or "seed" not in made:
        return None
    episodes, truth = _played_again(stay, plans, made)
    known = START_STEP + 1
    record = np.asarray(stay.dynamic)[0, :known]
    if not np.allclose(np.asarray(episodes.dynamic)[:, :known], record, _TOLERANCE, _TOLERANCE):
        return None
    rows: list[JsonDict] = []
    for k, plan in enumerate(plans):
        last = min(int(episodes.length[k]) - 1, START_STEP + HORIZON)
        for step in range(START_STEP, last + 1):
            values = {
                name: float(episodes.dynamic[k, step, schema.INDEX[name]]) for name in FEATURES
            }
            values["sofa"] = float(episodes.sofa[k, step])
            rows.append({"plan": plan.name, "hour": step * step_hours} | values)
    outcomes = pd.DataFrame(
        {
            "plan": [plan.name for plan in plans],
            "true_died": np.asarray(episodes.died_90d),
            "true_reward": np.asarray(truth.reward, np.float64)[:, START_STEP:].sum(1),
        }
    )
    return _TrueCourses(pd.DataFrame(rows), outcomes)


def _played_again(stay: Episodes, plans: list[Plan], made: JsonDict) -> tuple[Episodes, Truth]:
    """One synthetic stay under each plan."""
    actions = np.full((len(plans), Config.horizon), FOLLOW_POLICY, np.int32)
    actions[:, :START_STEP] = np.asarray(stay.action)[0, :START_STEP]
    actions[:, START_STEP : START_STEP + HORIZON] = [plan.actions for plan in plans]
    world = TrueWorld(2, int(made["seed"]), float(made.get("confounding", 0.0)))
    patients = np.repeat(np.asarray(stay.stay_id, np.int32), len(plans))
    return generate_patients(
        jax.random.key(world.seed), patients, actions, params=world.params(), keep_latent=False
    )
