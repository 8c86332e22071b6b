"""Clinical scores, rules and rewards as vectorised functions."""

from worldmodel.clinical import reward, rules, safety, sofa

__all__ = ["reward", "rules", "safety", "sirs", "sofa"]
