"""Cohorts, off-policy evaluation, pipelines, reports and the command line."""
