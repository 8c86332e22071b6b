"""All policies on the same patients: trained, valued, judged by the rules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from policy.base import Policy
from policy.checkpoint import load_policy
from policy.offline.algorithms import NAMES as OFFLINE
from policy.offline.algorithms import OfflineConfig
from policy.planner import PlannerConfig
from policy.registry import CLINICIAN, SIMPLE
from policy.train.loop.metrics import check_wandb
from sepsis_jax.pipelines.episodes import SOURCE, of_split
from sepsis_jax.pipelines.policy_training import (
    CloneConfig,
    PPOOptions,
    Trained,
    digest_folder,
    fingerprint,
    fit_clone,
    known,
    make_planner,
    of_iql,
    optimise,
    train_offline_policy,
    with_algorithm,
    write_policy,
)
from sepsis_jax.pipelines.policy_values import (
    ModelWorld,
    Outcome,
    TrueWorld,
    value_table,
)
from sepsis_jax.report.policies import write_comparison
from sepsis_jax.runs import JsonDict, Progress, provenance, silent
from worldmodel.envs.env import SepsisEnv
from worldmodel.episode_files import (
    EPISODES_FILE,
    load_dose_edges,
    load_episodes_for,
    load_manifest,
    load_scaler,
)
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, check_replaceable, digest_file
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.world_model import WorldModel
from worldmodel.scaling import Scaler
from worldmodel.synthetic import Config
from worldmodel.synthetic.generate import require_patients

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

POLICIES = "policies"  # the folder that marks a comparison
CLONE, PLANNER, PPO = "clone", "planner", "ppo"
KINDS = {
    CLINICIAN: "clinician", CLONE: "clone", PLANNER: "planner", PPO: "with the truth",
    **dict.fromkeys(("guideline", "titration"), "rules"),
    **dict.fromkeys(("random", "none", "max"), "bracket"),
    **dict.fromkeys(OFFLINE, "offline"),
}  # fmt: skip


@dataclass(frozen=True)
class ComparisonOptions:
    """Settings of a comparison.

    Attributes:
      methods: trained beside the clone: offline methods, "planner", "ppo"; PPO is trained in
        the true world and is left out without it.
      patients: fresh patients of the synthetic world, or most test stays in a world model.
      samples: futures per stay in a world model; 0 for one per ensemble member.
      horizon: steps in a world model; 0 for whole stays (`ope.simulated.whole_stay`).
      seed: of patients and noise.
      wd3qne, cql, iql, dqn, bcq: settings of the offline methods.
      clone: of the cloned clinician.
      planner: of the planner; where it learns an advantage, its critic is the policy of IQL.
      ppo: of PPO, which starts from the policy of IQL.
    """

    methods: tuple[str, ...] = ("wd3qne", "cql", "iql", "planner", "ppo")
    patients: int = 2000
    samples: int = 0
    horizon: int = 0
    seed: int = 1000
    wd3qne: OfflineConfig = field(default_factory=OfflineConfig)
    cql: OfflineConfig = field(default_factory=OfflineConfig)
    iql: OfflineConfig = field(default_factory=OfflineConfig)
    dqn: OfflineConfig = field(default_factory=OfflineConfig)
    bcq: OfflineConfig = field(default_factory=OfflineConfig)
    clone: CloneConfig = field(default_factory=CloneConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    ppo: PPOOptions = field(default_factory=PPOOptions)

    def __post_init__(self) -> None:
        known_methods = (*OFFLINE, PLANNER, PPO)
        unknown = [name for name in self.methods if name not in known_methods]
        if unknown or len(set(self.methods)) < len(self.methods):
            raise InputError(
                f"methods: got {list(self.methods)}, expected different ones of "
                f"{', '.join(known_methods)}"
            )
        users = (*([PLANNER] if self.planner.learns_advantage else []), PPO)
        needing = [name for name in users if name in self.methods]
        if needing and "iql" not in self.methods:
            raise InputError(f"methods: {needing[0]} needs iql among them")
        if self.patients < 2:
            raise InputError(f"patients: got {self.patients}, expected at least 2")
        if self.samples < 0 or self.horizon < 0:
            raise InputError("samples, horizon: expected 0 or more")

    def of(self, name: str) -> OfflineConfig:
        """Settings of an offline method."""
        return with_algorithm(getattr(self, name), name)


class _Workshop:
    """Trains policies into a folder; what is there with the same fingerprint is read instead."""

    def __init__(
        self,
        folder: Path,
        episodes: Episodes,
        scaler: Scaler,
        inputs: dict[str, str | None],
        source: str | None,
    ):
        self.folder, self.episodes, self.scaler, self.inputs = folder, episodes, scaler, inputs
        self.source = source

    def make(
        self,
        name: str,
        config: DataclassInstance,
        inputs: dict[str, str | None],
        train: Callable[[], Trained],
    ) -> Policy:
        path = self.folder / name
        method = CLINICIAN if name == CLONE else name
        inputs = {"episodes": self.inputs["episodes"], **inputs}
        if not known(path, fingerprint(method, config, **inputs)):
            trained = train()
            write_policy(path, method, trained, config, inputs, self.episodes, source=self.source)
        return load_policy(path)


def compare_policies(
    episodes_path: str | Path,
    model: str | Path,
    out: str | Path,
    options: ComparisonOptions | None = None,
    *,
    truth: bool | None = None,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Trains policies and compares them with the clinician, with each other and with the rules.

    Policies are kept in `<out>/policies` as soon as they are trained; the same call goes on from
    there, and trains again only what depends on other settings or data.

    Args:
      episodes_path: folder of episodes.
      model: world model.
      out: folder to write: policies/, comparison.csv/.json/.md, comparison.png, actions.png,
        report.html, manifest.json.
      options: settings.
      truth: value policies in the synthetic world itself; None where the episodes come from it.
      progress: called with (phase, share done).

    Returns:
      The table of `value_table`.
    """
    options = options or ComparisonOptions()
    episodes_path, model, out = Path(episodes_path), Path(model), Path(out)
    check_replaceable(out, POLICIES)
    check_wandb()
    progress("reading", 0.0)
    manifest, world_model = load_manifest(episodes_path), load_world_model(model)
    episodes = load_episodes_for(world_model, episodes_path)
    truth = manifest.get("source") == SOURCE if truth is None else truth
    world = _world(episodes_path, manifest, episodes, world_model, options, truth=truth)
    inputs: dict[str, str | None] = {
        "episodes": digest_file(episodes_path / EPISODES_FILE),
        "model": digest_folder(model),
    }
    scaler, source = load_scaler(episodes_path), manifest.get("source")
    shop = _Workshop(out / POLICIES, episodes, scaler, inputs, source)
    policies = _train_all(shop, world_model, options, world, progress)
    outcomes: dict[str, Outcome] = {}
    for number, (name, policy) in enumerate(policies.items()):
        progress(f"value of {name}", 0.6 + 0.35 * number / len(policies))
        outcomes[name] = world.outcome(policy)
    table = value_table(
        outcomes,
        KINDS,
        baseline=CLINICIAN if truth else CLONE,
        best=PPO if PPO in policies else None,
    )
    progress("writing", 0.97)
    facts = {
        "truth": truth, "options": asdict(options), "inputs": inputs, "patients":
        len(outcomes[CLINICIAN].total), "horizon": getattr(world, "horizon", None), **table.attrs,
    }  # fmt: skip
    with atomic_folder(out, marker=POLICIES) as folder:
        shutil.copytree(out / POLICIES, folder / POLICIES)
        shares = {name: found.shares for name, found in outcomes.items()}
        write_comparison(folder, table, shares, provenance(**facts))
    progress("done", 1.0)
    return table


def _world(
    path: Path,
    manifest: JsonDict,
    episodes: Episodes,
    world_model: WorldModel,
    options: ComparisonOptions,
    *,
    truth: bool,
) -> TrueWorld | ModelWorld:
    if truth:
        made = manifest.get("options", {})
        if manifest.get("source", SOURCE) != SOURCE:
            raise InputError(
                f"truth: {path} comes from {manifest['source']}; only synthetic patients have a "
                "truth"
            )
        if made.get("seed") == options.seed:
            raise InputError(
                f"seed: {options.seed} made the episodes too; choose another for fresh patients"
            )
        require_patients(options.patients)
        return TrueWorld(options.patients, options.seed, float(made.get("confounding", 0.0)))
    test, _ = of_split(episodes, "test")
    test = test.select(np.arange(min(options.patients, test.num_stays)))
    return ModelWorld(
        world_model, test, options.horizon or None,
        options.samples or world_model.num_members, options.seed, load_dose_edges(path),
    )  # fmt: skip


def _train_all(
    shop: _Workshop,
    world_model: WorldModel,
    options: ComparisonOptions,
    world: TrueWorld | ModelWorld,
    progress: Progress,
) -> dict[str, Policy | None]:
    """Policies in the order of the table."""
    offline = [name for name in options.methods if name in OFFLINE]
    others = [name for name in (PLANNER, PPO) if name in options.methods]
    jobs, done = 1 + len(offline) + len(others), 0

    def report(what: str, share: float) -> None:
        progress(what, 0.02 + 0.58 * (done + share) / jobs)

    episodes, scaler = shop.episodes, shop.scaler
    policies: dict[str, Policy | None] = {CLINICIAN: None}
    policies |= {name: make() for name, make in SIMPLE.items()}
    clone = shop.make(CLONE, options.clone, {}, lambda: fit_clone(episodes, options.clone, report))
    policies[CLONE] = clone
    for name in offline:
        done += 1
        config = options.of(name)
        policies[name] = shop.make(
            name, config, {},
            partial(train_offline_policy, episodes, scaler, config, report),
        )  # fmt: skip
    if PLANNER in others:
        done += 1
        inputs = {
            "model": shop.inputs["model"], "clinician": fingerprint(CLINICIAN, options.clone),
        }  # fmt: skip
        critic = None
        if options.planner.learns_advantage:
            critic = of_iql(policies["iql"])  # type: ignore[arg-type]
            inputs["critic"] = fingerprint("iql", options.of("iql"))
        policies[PLANNER] = shop.make(
            PLANNER, options.planner, inputs,
            lambda: make_planner(episodes, world_model, critic, clone, options.planner, report),
        )  # fmt: skip
    if PPO in others and isinstance(world, TrueWorld):
        done += 1
        start = of_iql(policies["iql"])  # type: ignore[arg-type]
        env = SepsisEnv.synthetic(config=Config(past=options.ppo.ppo.past), params=world.params())
        inputs = {
            "start": fingerprint("iql", options.of("iql")), "confounding": str(world.confounding)
        }  # fmt: skip
        policies[PPO] = shop.make(
            PPO, options.ppo, inputs, lambda: optimise(env, scaler, options.ppo, start, report)
        )
    return policies
