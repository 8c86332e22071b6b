"""Futures of a few recorded patients under a few plans, beside what truly happens if it is known.

Of a synthetic patient it is known: the world plays the same patient with the same random numbers
under every plan, and the clinician goes on where a plan ends.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    samples = world_model.whole_samples(samples)
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
        truth = true_courses(stay, START_STEP, plans, manifest, world_model.step_hours)
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


class TrueCourses(NamedTuple):
    """What truly happens to one synthetic stay under K plans.

    Attributes:
      rows: rows (plan, hour) from the start on with a column per value, while the stay lasts.
      outcomes: a row per plan: true_died (by day 90) and true_reward (from the start on).
    """

    rows: pd.DataFrame
    outcomes: pd.DataFrame


def true_courses(
    stay: Episodes,
    step: int,
    plans: Sequence[Plan],
    manifest: JsonDict,
    step_hours: float,
    *,
    values: Sequence[str] = FEATURES,
) -> TrueCourses | None:
    """Plays one stay again under each plan; None where it is not of the synthetic world.

    Args:
      stay: one recorded stay.
      step: its row from which the plans are followed; the clinician goes on after them.
      plans: of equal length.
      manifest: of the stay's folder, which says whether and how it was simulated.
      step_hours: length of a step.
      values: features to return, beside SOFA.
    """
    made = manifest.get("options", {})
    if manifest.get("source") != SOURCE or "seed" not in made:
        return None
    episodes, truth = _played_again(stay, step, plans, made)
    known = step + 1
    record = np.asarray(stay.dynamic)[0, :known]
    if not np.allclose(np.asarray(episodes.dynamic)[:, :known], record, _TOLERANCE, _TOLERANCE):
        return None
    dynamic, sofa = np.asarray(episodes.dynamic), np.asarray(episodes.sofa)
    length = np.asarray(episodes.length)
    end = step + len(plans[0].actions)
    rows: list[JsonDict] = []
    for k, plan in enumerate(plans):
        for row in range(step, min(int(length[k]) - 1, end) + 1):
            found = {name: float(dynamic[k, row, schema.INDEX[name]]) for name in values}
            found["sofa"] = float(sofa[k, row])
            rows.append({"plan": plan.name, "hour": row * step_hours} | found)
    outcomes = pd.DataFrame(
        {
            "plan": [plan.name for plan in plans],
            "true_died": np.asarray(episodes.died_90d),
            "true_reward": np.asarray(truth.reward, np.float64)[:, step:].sum(1),
        }
    )
    return TrueCourses(pd.DataFrame(rows), outcomes)


_BLOCK = 64  # stays that the world simulates at a time: a few plans of one patient


def _played_again(
    stay: Episodes, step: int, plans: Sequence[Plan], made: JsonDict
) -> tuple[Episodes, Truth]:
    """One synthetic stay under each plan."""
    actions = np.full((len(plans), Config.horizon), FOLLOW_POLICY, np.int32)
    actions[:, :step] = np.asarray(stay.action)[0, :step]
    until = min(step + len(plans[0].actions), Config.horizon)
    actions[:, step:until] = [plan.actions[: until - step] for plan in plans]
    world = TrueWorld(2, int(made["seed"]), float(made.get("confounding", 0.0)))
    patients = np.repeat(np.asarray(stay.stay_id, np.int32), len(plans))
    return generate_patients(
        jax.random.key(world.seed), patients, actions, params=world.params(), keep_latent=False,
        block=_BLOCK,
    )  # fmt: skip
