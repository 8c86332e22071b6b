"""Qwen3 and Llama in Flax NNX."""

from policy.qwen3.config import Qwen3Config
from policy.qwen3.model import Qwen3, logits
from policy.qwen3.weights import load, save_hf

__all__ = ["Qwen3", "Qwen3Config", "load", "logits", "save_hf"]
