"""vLLM servers: their environment, their life, their weights, and tokens from them."""

from policy.serving.vllm.command import (
    KEY_VARIABLE,
    ServerOptions,
    ServingEnvironment,
    find_environment,
)
from policy.serving.vllm.control import Swap, WeightControl
from policy.serving.vllm.generator import VLLMGenerator
from policy.serving.vllm.server import ServerError, VLLMServer

__all__ = [
    "KEY_VARIABLE",
    "ServerError",
    "ServerOptions",
    "ServingEnvironment",
    "Swap",
    "VLLMGenerator",
    "VLLMServer",
    "WeightControl",
    "find_environment",
]
