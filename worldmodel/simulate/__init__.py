"""Rollouts of patients in the world model."""
