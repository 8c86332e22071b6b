"""Policies as folders: arrays by Orbax, everything else as JSON; nothing is pickled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from policy.base import Policy, feature_width
from policy.clinician_models import (
    GRU,
    MLP,
    ClonedClinician,
    Clusters,
    Logistic,
    uncalibrated,
)
from policy.offline.algorithms import (
    ALGORITHMS,
    Networks,
    OfflineConfig,
    OfflinePolicy,
    Perceptron,
    make_networks,
)
from policy.planner import Planner, PlannerConfig
from policy.planner_advantage import untrained_advantage
from policy.ppo import OnlinePolicy, PPOConfig
from policy.simple import (
    Constant,
    GuidelineRules,
    MaximumTreatment,
    NoTreatment,
    RandomPolicy,
    Titration,
)
from worldmodel import schema
from worldmodel.configuration import from_mapping
from worldmodel.errors import InputError
from worldmodel.files import (
    atomic_folder,
    load_arrays,
    read_json,
    require_folder,
    save_arrays,
    write_json,
)
from worldmodel.models.checkpoint import load_world_model, save_world_model
from worldmodel.scaling import Scaler

KIND = "sepsis-jax policy"
MARKER = "policy.json"
_ARRAYS, _WORLD_MODEL, _CLINICIAN = "arrays", "world_model", "clinician"

_SIMPLE = {cls.__name__: cls for cls in (
    RandomPolicy, NoTreatment, MaximumTreatment, Constant, Titration, GuidelineRules)}  # fmt: skip
# each class has a constructor and settings of its own
_CLONES: dict[str, Any] = {cls.__name__: cls for cls in (Logistic, MLP, GRU, Clusters)}


def save_policy(
    policy: Policy, path: str | Path, *, manifest: Mapping[str, object] | None = None
) -> Path:
    """Writes a policy as a folder that appears whole or not at all.

    Args:
      policy: of any kind that this software has.
      path: folder to make; an existing policy there is replaced.
      manifest: provenance to keep beside it.

    Raises:
      InputError: the policy is of no known kind, or something else is in the way.
    """
    path = Path(path).absolute()
    kind = _kind_of(policy)
    with atomic_folder(path, marker=MARKER) as folder:
        if kind.arrays is not None:
            save_arrays(folder / _ARRAYS, kind.arrays(policy))
        if isinstance(policy, Planner):
            save_world_model(policy.world_model, folder / _WORLD_MODEL)
            save_policy(policy.clinician, folder / _CLINICIAN)
        write_json(
            folder / MARKER,
            {
                "kind": KIND,
                "schema_version": schema.SCHEMA_VERSION,
                "class": type(policy).__name__,
                "settings": kind.settings(policy),
                **(manifest or {}),
            },
        )
    return path


def load_policy(path: str | Path) -> Policy:
    """The policy that `save_policy` wrote.

    Raises:
      InputError: the folder is missing, is not a policy, or is damaged.
    """
    path = Path(path).absolute()
    require_folder(path, "train one with `sepsis-jax policy train`")
    file = path / MARKER
    manifest = read_json(file)
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if found != KIND:
        raise InputError(f"{path}: not a policy (its {MARKER} says {found!r})")
    if manifest.get("schema_version") != schema.SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema version {manifest.get('schema_version')}, this software reads "
            f"{schema.SCHEMA_VERSION}; train the policy again"
        )
    name, settings = manifest.get("class"), manifest.get("settings")
    kind = next((kind for kind in _KINDS if name in kind.names), None)
    if kind is None or not isinstance(settings, dict):
        raise InputError(f"{file}: policies of class {name!r} are unknown to this software")
    try:
        return kind.load(name, cast("Settings", settings), path)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: field missing or malformed ({error})") from None


class Settings(TypedDict, total=False):
    """Settings of a saved policy, as JSON holds them; those of simple policies are their fields."""

    config: dict[str, object]
    temperature: float
    seeds: int
    hidden: int
    clusters: int
    features: int


class _Kind(NamedTuple):
    """How policies of some classes are written and read."""

    names: tuple[str, ...]
    settings: Callable[[Any], dict[str, object]]
    arrays: Callable[[Any], object] | None
    load: Callable[[str, Settings, Path], Policy]


def _kind_of(policy: Policy) -> _Kind:
    name = type(policy).__name__
    for kind in _KINDS:
        if name in kind.names:
            return kind
    raise InputError(f"policies of class {name} cannot be saved")


def _scaler() -> Scaler:
    widths = (schema.NUM_FEATURES, schema.NUM_FEATURES, schema.NUM_STATIC, schema.NUM_STATIC)
    return Scaler(*(jnp.zeros(width) for width in widths))


def _simple_settings(policy: Any) -> dict[str, object]:
    return {field.name: np.asarray(getattr(policy, field.name)).item() for field in fields(policy)}


def _load_simple(name: str, settings: Settings, path: Path) -> Policy:
    del path
    return _SIMPLE[name](**cast("dict[str, int]", settings))


def _learned_settings(policy: OfflinePolicy | OnlinePolicy) -> dict[str, object]:
    seeds = {"seeds": policy.num_seeds} if isinstance(policy, OfflinePolicy) else {}
    return {"config": asdict(policy.config), "temperature": policy.temperature, **seeds}


def _load_offline(name: str, settings: Settings, path: Path) -> Policy:
    del name
    config = from_mapping(OfflineConfig, settings["config"], source=str(path / MARKER))
    algorithm, width = ALGORITHMS[config.algorithm], feature_width(config.past)

    def make(key: jax.Array) -> Networks:
        return make_networks(algorithm, width, config, nnx.Rngs(key))

    def untrained() -> OfflinePolicy:
        keys = jax.random.split(jax.random.key(0), settings["seeds"])
        return OfflinePolicy(jax.vmap(make)(keys), _scaler(), config, settings["temperature"])

    result: Policy = load_arrays(path / _ARRAYS, jax.eval_shape(untrained))
    return result


def _load_online(name: str, settings: Settings, path: Path) -> Policy:
    del name
    config = from_mapping(PPOConfig, settings["config"], source=str(path / MARKER))

    def untrained() -> OnlinePolicy:
        rngs = nnx.Rngs(jax.random.key(0))
        width = feature_width(config.past)
        actor = Perceptron(width, config.hidden, schema.NUM_ACTIONS, rngs=rngs)
        return OnlinePolicy(actor, _scaler(), config, settings["temperature"])

    result: Policy = load_arrays(path / _ARRAYS, jax.eval_shape(untrained))
    return result


def _clone_settings(policy: Clusters | Logistic | MLP | GRU) -> dict[str, object]:
    if isinstance(policy, Clusters):
        return {"clusters": policy.centers.shape[0], "features": policy.centers.shape[1]}
    width = policy.params["in_bias"].shape[0] if "in_bias" in policy.params else 1
    return {"hidden": width}


def _load_clone(name: str, settings: Settings, path: Path) -> Policy:
    def untrained() -> ClonedClinician:
        if name == Clusters.__name__:
            count = settings["clusters"]
            centers = jnp.zeros((count, settings["features"]))
            log_probs = jnp.zeros((count, schema.NUM_ACTIONS))
            return Clusters(_scaler(), uncalibrated(), centers, log_probs)
        result: ClonedClinician = _CLONES[name].initial(
            jax.random.key(0), _scaler(), settings["hidden"]
        )
        return result

    result: Policy = load_arrays(path / _ARRAYS, jax.eval_shape(untrained))
    return result


def _planner_settings(policy: Planner) -> dict[str, object]:
    return {"config": asdict(policy.config)}


def _load_planner(name: str, settings: Settings, path: Path) -> Policy:
    del name
    config = from_mapping(PlannerConfig, settings["config"], source=str(path / MARKER))
    advantage = load_arrays(path / _ARRAYS, jax.eval_shape(lambda: untrained_advantage(_scaler())))
    world_model = load_world_model(path / _WORLD_MODEL)
    return Planner(world_model, advantage, load_policy(path / _CLINICIAN), config)


def _itself(policy: object) -> object:
    return policy


_KINDS = (
    _Kind(tuple(_SIMPLE), _simple_settings, None, _load_simple),
    _Kind(tuple(_CLONES), _clone_settings, _itself, _load_clone),
    _Kind((OfflinePolicy.__name__,), _learned_settings, _itself, _load_offline),
    _Kind((OnlinePolicy.__name__,), _learned_settings, _itself, _load_online),
    _Kind((Planner.__name__,), _planner_settings, lambda policy: policy.advantage, _load_planner),
)
