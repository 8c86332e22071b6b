"""Reinforcement learning of a language model inside the simulator."""
