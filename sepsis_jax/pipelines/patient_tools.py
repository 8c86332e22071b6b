"""Questions about recorded patients and their simulated futures, answered as JSON with units.

What `sepsis-jax mcp` offers to other programs. Nothing is written.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from sepsis_jax.pipelines.episodes import of_split
from sepsis_jax.pipelines.world_model import find_stay, patient_futures
from sepsis_jax.report.ope import records
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.episode_files import dose_edges_to_dict, load_episodes_for
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.world_model import WorldModel

MOST_PATIENTS = 100  # in one list
MOST_PLANS = schema.NUM_ACTIONS
MOST_SAMPLES = 2000  # futures per plan
UNITS = {
    "mortality_mean": "probability of death within 90 days",
    "mortality_q05": "5% quantile over futures",
    "mortality_q95": "95% quantile over futures",
    "total_reward": "sum of rewards, from about -15 (death) to 15 (survival)",
    "map_below_65": "share of simulated steps with a mean arterial pressure below 65 mmHg",
    "ventilation": "share of simulated steps with mechanical ventilation",
    "projected_share": "share of simulated values that were moved into the physiological range",
    "support": "least probability that a clinician gives a step of the plan",
}
"""Of the columns of `pipelines.world_model.outcome_table`."""


class PatientTools:
    """Answers to questions about the patients of a folder; the methods are the tools.

    Args:
      world_model: that simulates.
      episodes: the patients.
      split: of the episodes: "train", "validation", "test" or "all".

    Raises:
      InputError: there is no such split, or nobody in it.
    """

    def __init__(self, world_model: WorldModel, episodes: Episodes, *, split: str = "test"):
        self._world_model = world_model
        self._episodes, _ = of_split(episodes, split)

    @classmethod
    def load(cls, model: str | Path, episodes: str | Path, *, split: str = "test") -> PatientTools:
        """From a folder of a world model and one of episodes."""
        world_model = load_world_model(model)
        return cls(world_model, load_episodes_for(world_model, episodes), split=split)

    def list_patients(self, offset: int = 0, limit: int = 20) -> JsonDict:
        """Lists recorded ICU stays of patients with sepsis that can be asked about.

        Args:
          offset: stays to leave out.
          limit: stays to list, at most 100.
        """
        _require("offset", offset, 0, None)
        _require("limit", limit, 1, MOST_PATIENTS)
        total = self._episodes.num_stays
        rows = np.arange(offset, min(offset + limit, total))
        stays = self._episodes.select(rows) if len(rows) else None
        return {
            "total": total,
            "patients": [] if stays is None else [_summary(stays, i) for i in range(len(rows))],
            "units": self._units([]),
        }

    def describe_patient(self, stay_id: int, step: int = 2) -> JsonDict:
        """Describes a patient from admission up to a step; what comes later is not told.

        Args:
          stay_id: of `list_patients`.
          step: last step to tell of; step 0 is admission.
        """
        stay = self._stay(stay_id, step)
        rows = slice(0, step + 1)
        dynamic, measured = np.asarray(stay.dynamic)[0, rows], np.asarray(stay.measured)[0, rows]
        masks = {name: measured[:, i].tolist() for i, name in enumerate(schema.MASKED_NAMES)}
        values = [
            {
                "name": feature.name,
                "unit": feature.unit,
                "values": [round(value, feature.decimals) for value in dynamic[:, i].tolist()],
                **({"measured": masks[feature.name]} if feature.name in masks else {}),
            }
            for i, feature in enumerate(schema.FEATURES)
        ]
        given = np.asarray(stay.action)[0, :step]
        return {
            **_summary(stay, 0),
            "step": step,
            "hours_since_admission": step * self._world_model.step_hours,
            "sofa_by_step": np.asarray(stay.sofa)[0, rows].tolist(),
            "ventilated_by_step": np.asarray(stay.ventilated)[0, rows].tolist(),
            "treatments": [self._treatment(int(action)) for action in given],
            "features": values,
            "units": self._units([]),
        }

    def simulate(
        self,
        stay_id: int,
        plan: str,
        step: int = 2,
        horizon: int = 6,
        samples: int = 200,
        seed: int = 0,
    ) -> JsonDict:
        """Simulates a patient's futures under one treatment plan.

        Args:
          stay_id: of `list_patients`.
          plan: vasopressor and fluid levels from 0 (none) to 4 (highest) per step, as "2,1;1,1";
            the last pair goes on. "clinician" is what was really given.
          step: step to start from.
          horizon: steps to simulate.
          samples: futures.
          seed: of the futures; the same for plans that are compared.
        """
        table, outcomes = self._futures(stay_id, [plan], step, horizon, samples, seed)
        series: list[JsonDict] = []
        for (feature, unit), part in table.groupby(["feature", "unit"], sort=False):
            rows = records(part.drop(columns=["plan", "feature", "unit"]))
            series.append(
                {"name": feature, "unit": unit}
                | {name: [row[name] for row in rows] for name in rows[0]}
            )
        return {
            "stay_id": stay_id,
            "outcome": outcomes[0],
            "series": series,
            "units": {**self._units(outcomes), "hour": "hours since admission"},
        }

    def compare_plans(
        self,
        stay_id: int,
        plans: list[str],
        step: int = 2,
        horizon: int = 6,
        samples: int = 200,
        seed: int = 0,
    ) -> JsonDict:
        """Compares a patient's simulated outcomes under several treatment plans.

        All plans meet the same random numbers, so that differences are due to treatment.

        Args:
          stay_id: of `list_patients`.
          plans: as for `simulate`, each with a name: "early=3,2;1,1", or "clinician"; at most 25.
          step: step to start from.
          horizon: steps to simulate.
          samples: futures per plan.
          seed: of the futures.
        """
        _require("plans", len(plans), 1, MOST_PLANS)
        _, outcomes = self._futures(stay_id, plans, step, horizon, samples, seed)
        return {"stay_id": stay_id, "plans": outcomes, "units": self._units(outcomes)}

    def _futures(
        self, stay_id: int, plans: list[str], step: int, horizon: int, samples: int, seed: int
    ) -> tuple[pd.DataFrame, list[JsonDict]]:
        stay = self._stay(stay_id, step)
        _require("horizon", horizon, 1, None)
        _require("samples", samples, 1, MOST_SAMPLES)
        _require("seed", seed, 0, 2**32 - 1)
        found = patient_futures(
            self._world_model, stay, step=step, plans=plans, horizon=horizon,
            samples=self._world_model.whole_samples(samples), seed=seed,
        )  # fmt: skip
        rows = [
            row | {"treatments": [self._treatment(int(action)) for action in plan.actions]}
            for row, plan in zip(records(found.outcomes), found.plans, strict=True)
        ]
        return found.table, rows

    def _stay(self, stay_id: int, step: int) -> Episodes:
        _require("step", step, 0, None)
        stay = find_stay(self._episodes, stay_id, step, needed=step + 1)
        length = int(np.asarray(stay.length)[0])
        _require("step", step, 0, length - 1)
        return stay

    def _treatment(self, action: int) -> JsonDict:
        vasopressor, fluid = (int(level) for level in schema.action_levels(action))
        return {"vasopressor_level": vasopressor, "fluid_level": fluid}

    def _units(self, outcomes: list[JsonDict]) -> JsonDict:
        known = set().union(*outcomes)
        hours = f"{self._world_model.step_hours:g} h"
        return {
            "steps": hours,
            "age": "years",
            "sofa": "points at admission",
            "treatments": "levels from 0 (none) to 4, one pair per step",
            "level_edges": dose_edges_to_dict(self._world_model.dose_edges),
            **{name: unit for name, unit in UNITS.items() if name in known},
        }


def _summary(stays: Episodes, row: int) -> JsonDict:
    age, male, charlson = np.asarray(stays.static)[row].tolist()
    return {
        "stay_id": int(np.asarray(stays.stay_id)[row]),
        "steps": int(np.asarray(stays.length)[row]),
        "age": round(age),
        "male": bool(male > 0.5),
        "charlson": round(charlson),
        "sofa": float(np.asarray(stays.sofa)[row, 0]),
    }


def _require(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise InputError(f"{name}: got {value}, expected {expected}")
