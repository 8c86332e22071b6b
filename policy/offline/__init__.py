"""Offline reinforcement learning from recorded stays."""
