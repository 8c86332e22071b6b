"""Qwen3 in Flax NNX."""
