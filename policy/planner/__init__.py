"""Search over the world model before every prescription."""

from policy.planner.advantage import fit_planner
from policy.planner.search import Planner, PlannerConfig

__all__ = ["Planner", "PlannerConfig", "fit_planner"]
