"""Clinical scores, rules and rewards as vectorised functions."""

from worldmodel.clinical import reward, rules, sirs, sofa

__all__ = ["reward", "rules", "sirs", "sofa"]
