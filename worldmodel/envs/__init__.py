"""Environments in which septic patients are treated, over three sources of dynamics.

The names below are imported on first use, so that `import worldmodel.envs` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldmodel.lazy import lazy_attributes

if TYPE_CHECKING:
    from worldmodel.envs.base import Info, Timestep
    from worldmodel.envs.env import AutoReset, EnvState, SepsisEnv, episode_key
    from worldmodel.envs.trajectory import FollowActions, Trajectory, unroll

_HOMES = {
    "AutoReset": "worldmodel.envs.env",
    "EnvState": "worldmodel.envs.env",
    "FollowActions": "worldmodel.envs.trajectory",
    "Info": "worldmodel.envs.base",
    "SepsisEnv": "worldmodel.envs.env",
    "Timestep": "worldmodel.envs.base",
    "Trajectory": "worldmodel.envs.trajectory",
    "episode_key": "worldmodel.envs.env",
    "unroll": "worldmodel.envs.trajectory",
}

__all__ = [
    "AutoReset",
    "EnvState",
    "FollowActions",
    "Info",
    "SepsisEnv",
    "Timestep",
    "Trajectory",
    "episode_key",
    "unroll",
]


__getattr__ = lazy_attributes(__name__, _HOMES)
