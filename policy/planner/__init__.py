"""Search over the world model before every prescription."""

from policy.planner.search import Planner, PlannerConfig, fit_planner

__all__ = ["Planner", "PlannerConfig", "fit_planner"]
