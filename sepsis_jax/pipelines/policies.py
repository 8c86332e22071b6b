"""Policies by name: what they are, how each is trained, where they lie."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
import pandas as pd

from policy.base import Policy
from policy.clinician import BehaviorConfig, BehaviorFit, fit_behavior
from policy.offline.algorithms import NAMES as OFFLINE
from policy.offline.algorithms import OfflineConfig, OfflinePolicy
from policy.offline.data import transitions
from policy.offline.training import train_offline
from policy.planner import Planner, PlannerConfig, fit_planner
from policy.ppo import PPOConfig, train_ppo
from sepsis_jax.runs import Progress, silent
from worldmodel.envs.env import SepsisEnv
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import digest_file
from worldmodel.models.world_model import WorldModel
from worldmodel.scaling import Scaler

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class CloneConfig:
    """A cloned clinician.

    Attributes:
      model: one of `policy.clinician.MODELS`.
      fit: how it is fitted.
      seed: of parameters and batches.
    """

    model: str = "mlp"
    fit: BehaviorConfig = field(default_factory=BehaviorConfig)
    seed: int = 0


@dataclass(frozen=True)
class PlannerOptions:
    """A planner and what it needs.

    Attributes:
      search: how it searches.
      critic: trained first, unless given.
      clone: fitted first, unless given.
    """

    search: PlannerConfig = field(default_factory=PlannerConfig)
    critic: OfflineConfig = field(default_factory=OfflineConfig)
    clone: CloneConfig = field(default_factory=CloneConfig)


@dataclass(frozen=True)
class PPOOptions:
    """Policy optimisation in a simulated unit.

    Attributes:
      ppo: the optimisation.
      seed: of patients, actions and minibatches.
    """

    ppo: PPOConfig = field(default_factory=PPOConfig)
    seed: int = 0


OPTIONS: dict[str, type] = {
    **dict.fromkeys(OFFLINE, OfflineConfig),
    "clinician": CloneConfig,
    "planner": PlannerOptions,
    "ppo": PPOOptions,
}
"""Settings by method."""


class Trained(NamedTuple):
    """A policy with how it came about."""

    policy: Policy
    losses: pd.DataFrame | None = None  # update, and a column per seed or per measure
    fit: BehaviorFit | None = None  # of a cloned clinician


def train_offline_policy(
    episodes: Episodes, scaler: Scaler, config: OfflineConfig, progress: Progress = silent
) -> Trained:
    """Offline reinforcement learning on the training split."""
    recorded = transitions(episodes.of_split("train"), scaler, past=config.past)

    def update(done: int, total: int, loss: float) -> None:
        progress(f"{config.algorithm}, loss {loss:.3g}", done / total)

    learned = train_offline(recorded, scaler, config, progress=update)
    records = learned.losses.shape[1]
    losses = pd.DataFrame(learned.losses.T, columns=[f"seed {s}" for s in range(config.seeds)])
    losses.insert(0, "update", (np.arange(records) + 1) * config.updates // records)
    return Trained(learned.policy, losses)


def fit_clone(episodes: Episodes, config: CloneConfig, progress: Progress = silent) -> Trained:
    """A clone of the clinician, calibrated on the validation split."""
    progress(f"clinician, {config.model}", 0.0)
    key = jax.random.key(config.seed)
    fit = fit_behavior(key, episodes, models=(config.model,), config=config.fit)[0]
    return Trained(fit.policy, fit=fit)


def make_planner(
    episodes: Episodes,
    world_model: WorldModel,
    critic: Policy,
    clone: Policy,
    config: PlannerConfig,
    progress: Progress = silent,
) -> Trained:
    """A planner whose advantage is learned from the training split."""
    progress("planner", 0.0)
    return Trained(fit_planner(episodes, world_model, of_iql(critic), clone, config))


def of_iql(policy: Policy) -> OfflinePolicy:
    """The policy, if it can be a critic or a start.

    Raises:
      InputError: it was not trained by implicit Q-learning.
    """
    if not isinstance(policy, OfflinePolicy) or policy.config.algorithm != "iql":
        raise InputError("critic: expected a policy trained by method iql")
    return policy


def optimise(
    env: SepsisEnv,
    scaler: Scaler,
    options: PPOOptions,
    start: OfflinePolicy | None = None,
    progress: Progress = silent,
) -> Trained:
    """PPO in an environment, from a policy or from nothing."""

    def update(done: int, total: int, value: float) -> None:
        progress(f"ppo, return {value:.3g}", done / total)

    policy, history = train_ppo(
        jax.random.key(options.seed), env, scaler, options.ppo, start=start, progress=update
    )
    course = pd.DataFrame(history._asdict())
    course.insert(0, "update", np.arange(len(course)) + 1)
    return Trained(policy, course)


def fingerprint(method: str, config: DataclassInstance, **inputs: str | None) -> str:
    """What a policy depends on, as one digest; the revision of the software is not in it."""
    facts = {"method": method, "config": asdict(config), **inputs}
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_folder(path: Path) -> str:
    """Digest of all files of a folder, names included."""
    sha = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        sha.update(f"{file.relative_to(path)} {digest_file(file)}\n".encode())
    return sha.hexdigest()


def with_algorithm(config: OfflineConfig, method: str) -> OfflineConfig:
    """The settings under the algorithm that the method names."""
    return replace(config, algorithm=method)


def patients_per_call(policy: Policy | None) -> int:
    """In a simulation; a planner asks the world model about 25 actions per patient and step."""
    return 128 if isinstance(policy, Planner) else 1024
