"""World model of patients with sepsis: schema, episodes, clinical rules, models, rollouts.

The names below are imported on first use, so that `import worldmodel` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldmodel.lazy import lazy_attributes

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


__getattr__ = lazy_attributes(__name__, _HOMES)
