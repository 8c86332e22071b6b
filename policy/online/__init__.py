"""Reinforcement learning in a simulated environment."""
