"""Search over the world model before every prescription."""

from policy.planner.configuration import PlannerConfig
from policy.planner.fitting import fit_planner
from policy.planner.search import Planner

__all__ = ["Planner", "PlannerConfig", "fit_planner"]
