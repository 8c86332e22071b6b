"""Cohorts: from MIMIC-IV files to episodes."""

from sepsis_jax.cohort.build import CohortReport, build_cohort
from sepsis_jax.cohort.options import CHOICES, CohortOptions, parity_options

__all__ = ["CHOICES", "CohortOptions", "CohortReport", "build_cohort", "parity_options"]
