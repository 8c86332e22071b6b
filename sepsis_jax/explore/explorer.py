"""What the pages show: recorded stays, and their futures under plans, simulated once and kept.

Every question about plans is a call of one compiled rollout: the 25 plans of the grid and those
beside it, from one row of one stay. A new plan compiles nothing, and with common random numbers
the futures of a plan do not depend on those that are simulated with it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from policy.agent.records import RECORDS_FILE, Record, last_attempts
from policy.base import Policy
from policy.registry import CLINICIAN as CLONE
from policy.registry import find_all
from sepsis_jax.explore.address import MOST_BESIDE, PatientAddress, read_plan
from sepsis_jax.pipelines.example_futures import TrueCourses, true_courses
from sepsis_jax.pipelines.world_model import outcome_table, trajectory_table
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.episode_files import load_episodes_for, load_manifest
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import start_history
from worldmodel.simulate.plans import CLINICIAN, RECORDED, Plan, plans_from
from worldmodel.simulate.rollout import Rollouts, require_rollouts, rollout
from worldmodel.simulate.statistics import disagreement

VALUES = ("meanbp", "lactate", "output_4hourly", "heart_rate", "creatinine")
"""Values whose futures are drawn, beside SOFA."""
DAY = 24.0  # hours that a plan lasts
PLANS = schema.NUM_ACTIONS + MOST_BESIDE  # of every call
_KEPT = 40 * PLANS  # futures of plans that stay in memory, a few ten kB each
_QUANTILES = (0.05, 0.95)


@dataclass(frozen=True)
class Sources:
    """Where everything is read from.

    Attributes:
      model: folder of a world model.
      episodes: folder of recorded stays.
      policies: names and folders, as `policy.registry.find_all` takes them.
      runs: folders of agents' runs, or NAME=FOLDER.
      samples: futures per plan; rounded up to a multiple of the ensemble size.
      seed: of the noise.
    """

    model: Path
    episodes: Path
    policies: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    samples: int = 200
    seed: int = 0


class AgentRun(NamedTuple):
    """Dialogues of an agent."""

    folder: Path
    records: dict[int, Record]  # last attempts by patient


class Futures(NamedTuple):
    """Futures of one stay from one row.

    Attributes:
      grid: a row per joint action, for the plan with that action in the steps that are set.
      shown: the chosen plan and those beside it.
      repeats: recorded steps after which the record's last treatment is repeated in the recorded
        plan; None where the record lasts, or the plan is not asked for.
      table: bands of the shown plans (`trajectory_table`).
      outcomes: a row per shown plan.
      survival: [K, H + 1] share still alive after each step; None without hazards.
      by_member: [K, E] predicted mortality by member of the ensemble.
      truth: what truly happens; None where it is not known or not asked for.
    """

    grid: pd.DataFrame
    shown: list[Plan]
    repeats: int | None
    table: pd.DataFrame
    outcomes: pd.DataFrame
    survival: np.ndarray | None
    by_member: np.ndarray
    truth: TrueCourses | None


class Explorer:
    """Answers questions about recorded stays; safe to share between threads.

    Args:
      sources: what to read.

    Raises:
      InputError: a folder holds something else, or the episodes do not fit the model.
    """

    world_model: WorldModel
    episodes: Episodes

    def __init__(self, sources: Sources):
        self.sources = sources
        self.world_model = load_world_model(sources.model)
        self.episodes = load_episodes_for(self.world_model, sources.episodes)
        self.manifest: JsonDict = load_manifest(sources.episodes)
        self.samples = self.world_model.whole_samples(sources.samples)
        self.hours = self.world_model.step_hours
        self.horizon = max(1, round(DAY / self.hours))
        require_rollouts(
            self.samples, patients=1, plans=PLANS, horizon=self.horizon, features=len(VALUES)
        )
        self.policies = _policies(sources.policies)
        self.runs = _runs(sources.runs)
        ids = np.asarray(self.episodes.stay_id).tolist()
        self.rows: dict[int, int] = {int(stay): row for row, stay in enumerate(ids)}
        self.length = np.asarray(self.episodes.length)
        self._lock = threading.RLock()
        self._futures: OrderedDict[tuple[int, int, bytes], Rollouts] = OrderedDict()
        self._given: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def row_of(self, stay: int, step: int = 0) -> int:
        """Position of a stay among the episodes.

        Raises:
          InputError: no such stay, or it has no such row.
        """
        if stay not in self.rows:
            raise InputError(f"stay {stay} is not among the {self.episodes.num_stays} episodes")
        row = self.rows[stay]
        if step >= self.length[row]:
            raise InputError(f"step: stay {stay} has rows 0 to {self.length[row] - 1}, got {step}")
        return row

    def one(self, stay: int) -> Episodes:
        """The episodes of one stay."""
        return self.episodes.select(np.array([self.row_of(stay)]))

    def recorded_plan(self, stay: int, step: int) -> tuple[Plan, int | None]:
        """What was really given, and after how many steps the record repeats its last treatment."""
        follows = np.full((1, self.horizon), RECORDED, np.int32)
        actions, within = plans_from(follows, self.one(stay), np.array([0]), np.array([step]))
        known = int(within[0, 0])
        return Plan(CLINICIAN, actions[0, 0]), None if known == self.horizon else known

    def shown_plans(self, address: PatientAddress) -> tuple[list[Plan], int | None]:
        """The chosen plan and those beside it, and `Futures.repeats`."""
        plans, repeats = [Plan("chosen", np.array(address.plan))], None
        for text in address.beside:
            if text == CLINICIAN:
                plan, repeats = self.recorded_plan(address.stay, address.step)
                plans.append(plan)
            else:
                plans.append(Plan(text, np.array(read_plan(text, self.horizon))))
        return plans, repeats

    def futures(self, address: PatientAddress) -> Futures:
        """Futures that a patient's page shows.

        Raises:
          InputError: no such stay or row.
        """
        self.row_of(address.stay, address.step)
        shown, repeats = self.shown_plans(address)
        variants = plan_variants(np.array(address.plan), address.edit)
        # Always as many plans, as another number would be another program.
        padded = [*shown, *[shown[-1]] * (1 + MOST_BESIDE - len(shown))]
        named = [Plan(schema.action_name(action), plan) for action, plan in enumerate(variants)]
        asked = [*named, *padded]
        whole = self.simulated(
            address.stay, address.step, np.stack([plan.actions for plan in asked])
        )
        outcomes = _outcomes(whole, asked, self.world_model.num_members)
        part = slice(len(named), len(named) + len(shown))
        found: Rollouts = jax.tree.map(lambda leaf: leaf[:, part], whole)
        start = self._start_values(address.stay, address.step)
        hours = self.hours * (address.step + np.arange(self.horizon + 1))
        members = self.world_model.num_members
        mortality = np.asarray(found.mortality[0], np.float64)
        return Futures(
            grid=outcomes.iloc[: len(named)],
            shown=shown,
            repeats=repeats,
            table=trajectory_table(found, shown, hours, start),
            outcomes=outcomes.iloc[part].reset_index(drop=True),
            survival=_survival(found),
            by_member=mortality.reshape(len(shown), -1, members).mean(1),
            truth=self._courses(address.stay, address.step, shown) if address.truth else None,
        )

    @cached_property
    def knows_truth(self) -> bool:
        """Whether the world that made the stays can be asked."""
        stay = next(iter(self.rows))
        plan = Plan("held", np.zeros(self.horizon, np.int64))
        return self._courses(stay, 0, [plan]) is not None

    def simulated(self, stay: int, step: int, plans: Int[np.ndarray, "K H"]) -> Rollouts:
        """NumPy `Rollouts` of one stay under K plans, of which only new ones are simulated."""
        keys = [(stay, step, plan.astype(np.int32).tobytes()) for plan in plans]
        with self._lock:
            new = {key: plan for key, plan in zip(keys, plans, strict=True)
                   if key not in self._futures}  # fmt: skip
            waiting = list(new)
            while waiting:
                some, waiting = waiting[:PLANS], waiting[PLANS:]
                padded = [*some, *[some[-1]] * (PLANS - len(some))]
                whole = self._rollout(stay, step, np.stack([new[key] for key in padded]))
                for k, key in enumerate(some):
                    self._futures[key] = jax.tree.map(lambda leaf, k=k: leaf[:, k : k + 1], whole)
            for key in keys:
                self._futures.move_to_end(key)
            found = [self._futures[key] for key in keys]
            while len(self._futures) > max(_KEPT, len(keys)):
                self._futures.popitem(last=False)
        joined: Rollouts = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *found)
        return joined

    def _rollout(self, stay: int, step: int, plans: np.ndarray) -> Rollouts:
        found = rollout(
            self.world_model,
            jax.random.key(self.sources.seed),
            start_history(self.world_model, self.one(stay), step),
            plans,
            samples=self.samples,
            features=VALUES,
        )
        host: Rollouts = jax.tree.map(np.asarray, found)
        return host

    def _start_values(self, stay: int, step: int) -> pd.Series:
        dynamic = np.asarray(self.episodes.dynamic)[self.row_of(stay), step]
        values = {name: float(dynamic[schema.INDEX[name]]) for name in VALUES}
        history = start_history(self.world_model, self.one(stay), step)
        return pd.Series(values | {"sofa": float(history.sofa[0])})

    def _courses(self, stay: int, step: int, plans: Sequence[Plan]) -> TrueCourses | None:
        names = [plan.name for plan in plans]
        more = range(1 + MOST_BESIDE - len(plans))
        padded = [*plans, *(Plan(f"filling {i}", plans[-1].actions) for i in more)]
        found = true_courses(self.one(stay), step, padded, self.manifest, self.hours, values=VALUES)
        if found is None:
            return None
        rows, outcomes = found.rows, found.outcomes
        return TrueCourses(rows[rows["plan"].isin(names)], outcomes.iloc[: len(plans)])

    def clinician_probs(self, stay: int, step: int) -> Float[np.ndarray, " 25"] | None:
        """[25] probabilities of the model's own clinician in a row; None if it has none."""
        held = plan_variants(np.zeros(self.horizon, np.int64), None)
        support = self.simulated(stay, step, held).support
        return None if support is None else np.asarray(support[0, :, :, 0], np.float64).mean(1)

    def given(self, stay: int, name: str) -> Float[np.ndarray, "T 25"]:
        """[T, 25] probabilities of a policy in the rows of a stay."""
        key = (name, stay)
        with self._lock:
            if key not in self._given:
                probs = self.policies[name].action_probs(
                    self.one(stay), block=self.episodes.num_steps
                )
                self._given[key] = probs[0]
            self._given.move_to_end(key)
            while len(self._given) > _KEPT:
                self._given.popitem(last=False)
            return self._given[key]


def plan_variants(plan: Int[np.ndarray, " H"], edit: int | None) -> Int[np.ndarray, "25 H"]:
    """The 25 plans that a cell of the grid may choose: each action in one step, or in all.

    Args:
      plan: [H] joint actions, kept in the other steps.
      edit: the step; None for all.
    """
    actions = np.arange(schema.NUM_ACTIONS)
    plans = np.tile(np.asarray(plan), (len(actions), 1))
    plans[:, slice(None) if edit is None else slice(edit, edit + 1)] = actions[:, None]
    return plans


def _outcomes(found: Rollouts, plans: list[Plan], members: int) -> pd.DataFrame:
    """`outcome_table` with the spread of the reward and the disagreement of the members."""
    table = outcome_table(found, plans)
    reward = np.asarray(found.total_reward[0], np.float64)
    table["reward_q05"], table["reward_q95"] = np.quantile(reward, _QUANTILES, axis=-1)
    table["disagreement"] = disagreement(np.asarray(found.mortality, np.float64), members)[0]
    if "support" not in table:
        table["support"] = np.nan
    return table


def _survival(found: Rollouts) -> np.ndarray | None:
    if found.death is None:
        return None
    alive = 1.0 - np.asarray(found.death[0], np.float64).mean(1).cumsum(-1)
    return np.concatenate([np.ones((len(alive), 1)), alive], axis=1)


def _policies(texts: Sequence[str]) -> Mapping[str, Policy]:
    if not texts:
        return {}
    found = find_all(texts)
    if CLONE in found:
        raise InputError(
            f"policy {CLONE!r}: give the folder of a clone, which `sepsis-jax policy train "
            "--method clinician` writes; a recurrent model's own clinician is shown in any case"
        )
    return {name: policy for name, policy in found.items() if policy is not None}


def _runs(texts: Sequence[str]) -> dict[str, AgentRun]:
    found: dict[str, AgentRun] = {}
    for text in texts:
        name, sign, folder = text.partition("=")
        path = Path(folder if sign else text)
        name = name if sign else path.name
        if name in found:
            raise InputError(f"run {text!r}: {name} is already there; write NAME=FOLDER")
        found[name] = AgentRun(path, last_attempts(path / RECORDS_FILE))
    return found
