"""Reinforcement learning of a language model in the simulator."""
