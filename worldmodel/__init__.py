"""World model of patients with sepsis: schema, episodes, clinical rules, models, rollouts.

The names below are imported on first use, so that `import worldmodel` costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worldmodel.envs.env import SepsisEnv
    from worldmodel.episode_files import load_episodes, save_episodes
    from worldmodel.episodes import Episodes
    from worldmodel.errors import InputError
    from worldmodel.models.checkpoint import load_world_model, save_world_model
    from worldmodel.models.training import TrainConfig, train_world_model
    from worldmodel.models.world_model import WorldModel
    from worldmodel.scaling import Scaler
    from worldmodel.simulate.history import start_history
    from worldmodel.simulate.randomness import abduct_noise
    from worldmodel.simulate.rollout import Rollouts, rollout
    from worldmodel.synthetic.generate import generate
    from worldmodel.synthetic.truth import true_value

_HOMES = {
    "Episodes": "worldmodel.episodes",
    "InputError": "worldmodel.errors",
    "Rollouts": "worldmodel.simulate.rollout",
    "Scaler": "worldmodel.scaling",
    "SepsisEnv": "worldmodel.envs.env",
    "TrainConfig": "worldmodel.models.training",
    "WorldModel": "worldmodel.models.world_model",
    "abduct_noise": "worldmodel.simulate.randomness",
    "generate": "worldmodel.synthetic.generate",
    "load_episodes": "worldmodel.episode_files",
    "load_world_model": "worldmodel.models.checkpoint",
    "rollout": "worldmodel.simulate.rollout",
    "save_episodes": "worldmodel.episode_files",
    "save_world_model": "worldmodel.models.checkpoint",
    "start_history": "worldmodel.simulate.history",
    "train_world_model": "worldmodel.models.training",
    "true_value": "worldmodel.synthetic.truth",
}

__all__ = [
    "Episodes",
    "InputError",
    "Rollouts",
    "Scaler",
    "SepsisEnv",
    "TrainConfig",
    "WorldModel",
    "abduct_noise",
    "generate",
    "load_episodes",
    "load_world_model",
    "rollout",
    "save_episodes",
    "save_world_model",
    "start_history",
    "train_world_model",
    "true_value",
]


def lazy_attributes(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package (PEP 562) whose public names lie in its modules.

    Args:
      package: `__name__` of the package.
      homes: the module of each name.

    Returns:
      A function from a name to its value, which raises AttributeError for names without a home.
    """

    def get(name: str) -> object:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get


__getattr__ = lazy_attributes(__name__, _HOMES)
