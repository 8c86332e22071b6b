"""Environments in which septic patients are treated, over four sources of dynamics.

The names below are imported on first use, so that `import worldmodel.envs` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldmodel import lazy_attributes

if TYPE_CHECKING:
    from worldmodel.envs.base import FollowActions, Info, Timestep, Trajectory, unroll
    from worldmodel.envs.env import AutoReset, EnvState, SepsisEnv, episode_key

_HOMES = {
    "AutoReset": "worldmodel.envs.env",
    "EnvState": "worldmodel.envs.env",
    "FollowActions": "worldmodel.envs.base",
    "Info": "worldmodel.envs.base",
    "SepsisEnv": "worldmodel.envs.env",
    "Timestep": "worldmodel.envs.base",
    "Trajectory": "worldmodel.envs.base",
    "episode_key": "worldmodel.envs.env",
    "unroll": "worldmodel.envs.base",
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
