"""What a sweep is asked to do, and everything that it needs for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa

from policy import registry
from policy.base import Policy
from policy.checkpoint import load_policy
from policy.planner import Planner
from policy.registry import CLINICIAN, SIMPLE
from sepsis_jax.pipelines.policy_training import digest_folder
from sepsis_jax.pipelines.sweep_folder import KIND
from sepsis_jax.runs import JsonDict, provenance
from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.episode_files import EPISODES_FILE, load_episodes_for
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import digest_file
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.clinical_model import PRECISIONS
from worldmodel.models.world_model import WorldModel
from worldmodel.resources import BFLOAT16, require_memory
from worldmodel.simulate.plans import CONSTANT, PlanSet, read_plan_set
from worldmodel.simulate.rollout import check_mode
from worldmodel.simulate.sharded import branches_per_device, device_memory
from worldmodel.simulate.stay_kernel import AUTOMATIC
from worldmodel.simulate.step import MODES
from worldmodel.simulate.sweep import Grid, find_starts, make_grid
from worldmodel.simulate.unroll import KERNELS, RolloutConfig

POLICY = "policy"  # kind of a group, beside those of the plans
_BLOCK = {"cpu": 65_536}  # branches: seconds of work, and little memory
_BLOCK_ACCELERATOR = 1_048_576
_GROUP_BYTES = 256  # of one future of a group, while its block is summarised


@dataclass(frozen=True)
class SweepOptions:
    """RolloutConfig of a sweep.

    Attributes:
      plans: as `worldmodel.simulate.plans.read_plan_set` takes them; "constant" where neither
        plans nor policies are given.
      policies: built-in names, folders of policies, or NAME=FOLDER.
      then: "V,F" that follows the first action of "deviations"; "" for what was really given.
      steps: rows of every stay to start from; those after its end are skipped and counted.
      every: instead of `steps`, every so many-th row of every stay; 1 for all.
      split: stays of "train", "validation" or "test", or "all".
      stays: stay_ids; empty for all of the split.
      patients: only the first so many stays; 0 for all.
      horizon: steps to simulate.
      samples: futures per start and plan, a multiple of the ensemble size.
      seed: of the noise.
      features: whose last values are summarised.
      support: a first action that the behaviour policy gives with at least this probability is
        supported.
      mode: "corrected" or "reference".
      precision: of matrix products; "" for the model's own.
      kernel: of plans in the recurrent variant: "xla", "pallas", or "auto", as the device suits.
      block: branches per file, about; 0 for what suits the kind of device.
      task: branches that a device simulates at a time; 0 likewise.
    """

    plans: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    then: str = ""
    steps: tuple[int, ...] = (2,)
    every: int = 0
    split: str = "all"
    stays: tuple[int, ...] = ()
    patients: int = 0
    horizon: int = 6
    samples: int = 120
    seed: int = 0
    features: tuple[str, ...] = ("meanbp", "lactate")
    support: float = 0.01
    mode: str = "corrected"
    precision: str = ""
    kernel: str = "auto"
    block: int = 0
    task: int = 0

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda value: value >= 1, "horizon", "samples")
        require(self, "0 or more", lambda value: value >= 0, "every", "patients", "block", "task")
        require(self, "within 0 and 1", lambda value: 0 <= value <= 1, "support")
        require(self, f"one of {', '.join(MODES)}", lambda value: value in MODES, "mode")
        require(self, f"one of {', '.join(KERNELS)}", KERNELS.__contains__, "kernel")
        known = ("", *PRECISIONS, BFLOAT16)
        require(self, f"one of {', '.join(known[1:])}", known.__contains__, "precision")
        unknown = [name for name in self.features if name not in schema.INDEX]
        if unknown or not self.features or len(set(self.features)) < len(self.features):
            raise InputError(
                f"features: got {list(self.features)}, expected different names of "
                "worldmodel.schema.FEATURES"
            )


@dataclass(frozen=True)
class Sweep:
    """A request with what it refers to.

    Attributes:
      options: as given.
      world_model: to simulate in.
      episodes: the stays asked for; NumPy leaves.
      grid: the work.
      plan_set: the K plans.
      policies: by name; their groups are numbered after the plans.
      behavior: the behaviour policy of the support flag.
      task: branches that a device simulates at a time.
      manifest: everything that the result depends on, and nothing else but the code revision.
    """

    options: SweepOptions
    world_model: WorldModel
    episodes: Episodes
    grid: Grid
    plan_set: PlanSet
    policies: dict[str, Policy]
    behavior: Policy | None
    task: int
    manifest: JsonDict

    @property
    def settings(self) -> RolloutConfig:
        """What is compiled."""
        options = self.options
        return RolloutConfig(
            options.horizon,
            options.features,
            options.mode,
            precision=options.precision or None,
            kernel=options.kernel,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of plans and policies, in the order of their numbers."""
        return (*self.plan_set.names, *self.policies)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Likewise."""
        return (*self.plan_set.kinds, *(POLICY for _ in self.policies))


def load_sweep(
    episodes_path: Path, model: Path, options: SweepOptions, behavior: Path | None
) -> Sweep:
    """Reads everything and lays out the work.

    Raises:
      InputError: an input is missing or unfit, or the request is impossible.
    """
    world_model = load_world_model(model)
    members = world_model.num_members
    if options.samples % members:
        raise InputError(f"samples: got {options.samples}, expected a multiple of {members} "
                         "(members of the ensemble)")  # fmt: skip
    check_mode(world_model, options.mode)
    plans = max(len(options.plans) + len(options.policies), schema.NUM_ACTIONS)
    require_memory("horizon", options.horizon, 16.0 * plans)
    require_memory("samples", options.samples, _GROUP_BYTES + 8.0 * len(options.features))
    texts = options.plans or (() if options.policies else (CONSTANT,))
    plan_set = read_plan_set(texts, horizon=options.horizon, then=options.then)
    policies = _load_policies(options.policies, plan_set.names)
    clinician = load_policy(behavior) if behavior else None
    episodes = jax.tree.map(
        np.asarray,
        _chosen(load_episodes_for(world_model, episodes_path), options),
    )
    platform = jax.local_devices()[0].platform
    block = options.block or _BLOCK.get(platform, _BLOCK_ACCELERATOR)
    task = options.task or branches_per_device(
        world_model.config, platform, options.kernel, device_memory()
    )
    grid = make_grid(
        find_starts(episodes.length, options.steps, options.every),
        plans=len(plan_set.names),
        policies=[_cost(policy) for policy in policies.values()],
        samples=options.samples,
        horizon=options.horizon,
        branches=block,
    )
    request = {name: value for name, value in asdict(options).items() if name != "policies"}
    kernel = options.kernel if options.kernel != "auto" or platform in AUTOMATIC else "xla"
    request |= {"block": block, "task": task, "plans": list(texts), "kernel": kernel}
    made = provenance()
    manifest = {
        "kind": KIND,
        "schema_version": schema.SCHEMA_VERSION,
        "request": _plain(request),
        "inputs": {
            "episodes": digest_file(episodes_path / EPISODES_FILE),
            "model": digest_folder(model),
            "behavior": digest_folder(behavior) if behavior else None,
            "policies": {
                name: _digest(text)
                for name, text in zip(policies, options.policies, strict=True)
            },
        },
        "groups": {
            "stays": len(np.unique(grid.starts.stay)),
            "starts": len(grid.starts.stay),
            "skipped_starts": grid.starts.skipped,
            "plans": [
                {"name": name, "kind": kind, "actions": _readable(actions)}
                for name, kind, actions in zip(*plan_set, strict=True)
            ],
            "blocks": len(grid.blocks),
            "branch_steps": sum(map(grid.branch_steps, grid.blocks)),
        },
        "software": {
            # One device alone runs a program that is fused otherwise (`sharded`).
            "platform": platform, "devices": "one" if jax.local_device_count() == 1 else "several",
            "machine": made["machine"], "python": made["python"],
            "versions": made["versions"] | {"pyarrow": pa.__version__},
        },
        "revision": made["revision"],
    }  # fmt: skip
    return Sweep(
        options, world_model, episodes, grid, plan_set, policies, clinician, task, manifest
    )


def _load_policies(texts: tuple[str, ...], plans: tuple[str, ...]) -> dict[str, Policy]:
    found = registry.find_all(list(texts)) if texts else {}
    policies: dict[str, Policy] = {}
    for name, policy in found.items():
        if policy is None:
            raise InputError(
                f"policy {CLINICIAN}: for the recorded treatments use plan {CLINICIAN}"
            )
        if name in plans:
            raise InputError(f"policy {name}: a plan has that name; write NAME=FOLDER")
        policies[name] = policy
    return policies


def _chosen(episodes: Episodes, options: SweepOptions) -> Episodes:
    splits = (*schema.SPLITS, "all")
    if options.split not in splits:
        raise InputError(f"split: got {options.split!r}, expected one of {', '.join(splits)}")
    if options.split != "all":
        episodes = episodes.of_split(options.split)
    if options.stays:
        ids = np.asarray(episodes.stay_id)
        absent = sorted(set(options.stays) - set(ids.tolist()))
        if absent:
            raise InputError(f"stay {absent[0]} is not in split {options.split!r} of the episodes")
        episodes = episodes.select(np.isin(ids, options.stays))
    if options.patients:
        episodes = episodes.select(np.arange(min(options.patients, episodes.num_stays)))
    if not episodes.num_stays:
        raise InputError(f"split {options.split!r} has no stays")
    return episodes


def _cost(policy: Policy) -> int:
    """Model calls per step: a planner asks about every action."""
    return schema.NUM_ACTIONS if isinstance(policy, Planner) else 1


def _digest(text: str) -> str:
    """Of a policy as it is asked for: a folder's contents, or the built-in name."""
    _, sign, folder = text.partition("=")
    return text if text in SIMPLE else digest_folder(Path(folder if sign else text))


def _readable(actions: np.ndarray) -> str:
    """A plan as "V,F" per step, or the name of the recorded treatments."""
    levels = (schema.action_levels(int(action)) for action in actions)
    return ";".join("recorded" if v < 0 else f"{v},{f}" for v, f in levels)


def _plain(value: object) -> object:
    """As JSON gives it back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
