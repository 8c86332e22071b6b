"""How should a patient be treated? Policies: simple, cloned, offline, online, planned, language.

The names below are imported on first use, so that `import policy` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldmodel import lazy_attributes

if TYPE_CHECKING:
    from policy.base import Policy, action_probs
    from policy.checkpoint import load_policy, save_policy
    from policy.offline.algorithms import OfflineConfig, OfflinePolicy
    from policy.offline.data import transitions
    from policy.offline.training import train_offline
    from policy.planner import Planner, PlannerConfig, fit_planner
    from policy.ppo import PPOConfig, train_ppo
    from policy.registry import find, make, names

_HOMES = {
    "OfflineConfig": "policy.offline.algorithms",
    "OfflinePolicy": "policy.offline.algorithms",
    "PPOConfig": "policy.ppo",
    "Planner": "policy.planner",
    "PlannerConfig": "policy.planner",
    "Policy": "policy.base",
    "action_probs": "policy.base",
    "find": "policy.registry",
    "fit_planner": "policy.planner",
    "load_policy": "policy.checkpoint",
    "make": "policy.registry",
    "names": "policy.registry",
    "save_policy": "policy.checkpoint",
    "train_offline": "policy.offline.training",
    "train_ppo": "policy.ppo",
    "transitions": "policy.offline.data",
}

__all__ = [
    "OfflineConfig",
    "OfflinePolicy",
    "PPOConfig",
    "Planner",
    "PlannerConfig",
    "Policy",
    "action_probs",
    "find",
    "fit_planner",
    "load_policy",
    "make",
    "names",
    "save_policy",
    "train_offline",
    "train_ppo",
    "transitions",
]


__getattr__ = lazy_attributes(__name__, _HOMES)
