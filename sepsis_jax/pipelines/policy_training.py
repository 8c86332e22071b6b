"""Policies by name: how each is trained, and the folder of a trained one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from policy.base import Policy
from policy.checkpoint import MARKER, load_policy, save_policy
from policy.clinician import BehaviorConfig, BehaviorFit, fit_behavior
from policy.offline.algorithms import NAMES as OFFLINE
from policy.offline.algorithms import OfflineConfig, OfflinePolicy
from policy.offline.data import transitions
from policy.offline.training import train_offline
from policy.planner import Planner, PlannerConfig, fit_planner
from policy.ppo import PPOConfig, train_ppo
from policy.registry import CLINICIAN, TRAINED
from policy.train.loop.metrics import check_wandb, log_courses
from sepsis_jax.pipelines.episodes import of_split, taken
from sepsis_jax.report.policies import (
    action_heat_map,
    action_shares,
    course_figure,
    reliability_figure,
)
from sepsis_jax.runs import JsonDict, Progress, provenance, silent
from worldmodel.cards import CARD, policy_card
from worldmodel.envs.env import SepsisEnv
from worldmodel.episode_files import EPISODES_FILE, load_episodes_for, load_manifest, load_scaler
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, check_replaceable, digest_file, read_json
from worldmodel.models.checkpoint import load_world_model
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
      critic: trained first, unless given; only where an advantage is learned.
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
    critic: OfflinePolicy | None,
    clone: Policy,
    config: PlannerConfig,
    progress: Progress = silent,
) -> Trained:
    """A planner; its advantage, if it learns one, is of the training split."""
    progress("planner", 0.0)
    return Trained(fit_planner(episodes, world_model, critic, clone, config))


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


def train_policy(
    episodes_path: str | Path,
    out: str | Path,
    method: str,
    config: Any,  # each method has a configuration of its own
    *,
    model: str | Path | None = None,
    critic: str | Path | None = None,
    clinician: str | Path | None = None,
    progress: Progress = silent,
) -> JsonDict:
    """Trains one policy on the training split and writes it with its pictures.

    Args:
      episodes_path: folder of episodes.
      out: folder to write: the policy, losses.csv and losses.png or
        reliability.csv and reliability.png, actions.png.
      method: one of `TRAINED`.
      config: of the class `OPTIONS[method]`.
      model: world model of a planner or of PPO.
      critic: policy of IQL: critic of a planner, start of PPO; None trains the planner's.
      clinician: cloned clinician of a planner; None fits one.
      progress: called with (phase, share done).

    Returns:
      Method, settings and figures of the training, as kept in the manifest.

    Raises:
      InputError: an input is missing or is not what the method needs.
    """
    if method not in TRAINED:
        raise InputError(f"method: got {method!r}, expected one of {', '.join(TRAINED)}")
    if method in ("planner", "ppo") and model is None:
        raise InputError(f"model: {method} needs a world model; see sepsis-jax world-model train")
    for option, given, users in (
        ("model", model, ("planner", "ppo")),
        ("critic", critic, ("planner", "ppo")),
        ("clinician", clinician, ("planner",)),
    ):
        if given is not None and method not in users:
            raise InputError(f"{option}: only for method {' and '.join(users)}")
    needs_none = isinstance(config, PlannerOptions) and not config.search.learns_advantage
    if critic is not None and needs_none:
        search = config.search.search
        raise InputError(f"critic: search={search} of the planner uses none; leave it out")
    episodes_path, out = Path(episodes_path), Path(out)
    check_replaceable(out, MARKER)  # before training, not after
    check_wandb()
    progress("reading", 0.0)
    world_model = None if model is None else load_world_model(model)
    episodes = load_episodes_for(world_model, episodes_path)
    scaler = load_scaler(episodes_path)
    if method in OFFLINE:
        config = with_algorithm(config, method)
    start = None if critic is None else of_iql(load_policy(critic))
    given_clone = None if clinician is None else load_policy(clinician)

    def report(what: str, share: float) -> None:
        progress(what, 0.05 + 0.85 * share)

    if method in OFFLINE:
        trained = train_offline_policy(episodes, scaler, config, report)
    elif method == CLINICIAN:
        trained = fit_clone(episodes, config, report)
    else:
        assert world_model is not None
        if isinstance(config, PPOOptions):
            env = SepsisEnv.learned(world_model, episodes.of_split("train"), past=config.ppo.past)
            trained = optimise(env, scaler, config, start, report)
        else:
            assert isinstance(config, PlannerOptions)
            if start is None and config.search.learns_advantage:
                settings = with_algorithm(config.critic, "iql")
                start = of_iql(train_offline_policy(episodes, scaler, settings, report).policy)
            clone: Policy
            if given_clone is None:
                clone = fit_clone(episodes, config.clone, report).policy
            else:
                clone = given_clone
            trained = make_planner(episodes, world_model, start, clone, config.search, report)
    inputs = {
        "episodes": digest_file(episodes_path / EPISODES_FILE),
        **{
            name: None if path is None else digest_folder(Path(path))
            for name, path in (("model", model), ("critic", critic), ("clinician", clinician))
        },
    }
    progress("writing", 0.92)
    source = load_manifest(episodes_path).get("source")
    record = write_policy(out, method, trained, config, inputs, episodes, source=source)
    progress("done", 1.0)
    return record


def write_policy(
    out: Path,
    method: str,
    trained: Trained,
    config: DataclassInstance,
    inputs: dict[str, str | None],
    episodes: Episodes,
    *,
    source: str | None,
) -> JsonDict:
    """Writes a policy with its record, card and pictures; the folder is written atomically.

    Args:
      out: folder to write.
      method: how it was trained.
      trained: the policy.
      config: settings it was trained with.
      inputs: digests of what it was trained on, part of the fingerprint.
      episodes: with a test split, for the heat map.
      source: of the episodes, as their manifest says it.

    Returns:
      The record.
    """
    record = {
        "method": method,
        "fingerprint": fingerprint(method, config, **inputs),
        "config": asdict(config),
        "inputs": inputs,
        **_facts(trained),
    }
    with atomic_folder(out, marker=MARKER) as folder:
        manifest = provenance(**record, source=source)
        save_policy(trained.policy, folder, manifest=manifest)
        (folder / CARD).write_text(policy_card(manifest))
        if trained.losses is not None:
            trained.losses.to_csv(folder / "losses.csv", index=False)
            course_figure(trained.losses, f"{method}: training", folder / "losses.png")
        if trained.fit is not None:
            fit = trained.fit
            fit.reliability.to_csv(folder / "reliability.csv", index=False)
            curves = {"calibrated": fit.reliability, "before": fit.uncalibrated_reliability}
            errors = {"calibrated": fit.report["ece"], "before": fit.uncalibrated_report["ece"]}
            title = f"{fit.name}: probabilities on the test split"
            reliability_figure(curves, errors, title, folder / "reliability.png")
        test, _ = of_split(episodes, "test")
        valid = np.asarray(test.valid)
        shares = {
            method if method != CLINICIAN else "clone": action_shares(
                trained.policy.action_probs(test), valid
            ),
            "clinician, recorded": action_shares(taken(test), valid),
        }
        action_heat_map(shares, "What is given, test split", folder / "actions.png")
    if trained.losses is not None:
        log_courses(out, {method: trained.losses.to_dict("records")})
    return record


def _facts(trained: Trained) -> JsonDict:
    if trained.fit is not None:
        return {"report": trained.fit.report}
    if trained.losses is not None:
        last = trained.losses.iloc[-1]
        return {"last": {str(name): float(value) for name, value in last.items()}}
    return {}


def known(folder: Path, expected: str) -> bool:
    """Whether a folder holds a policy of that fingerprint."""
    file = folder / MARKER
    return file.exists() and read_json(file).get("fingerprint") == expected
