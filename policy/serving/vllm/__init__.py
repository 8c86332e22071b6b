"""vLLM servers: their environment, their life, and their weights."""

from policy.serving.vllm.command import KEY_VARIABLE, ServerOptions
from policy.serving.vllm.environment import ServingEnvironment, find_environment
from policy.serving.vllm.server import ServerError, VLLMServer

__all__ = [
    "KEY_VARIABLE",
    "ServerError",
    "ServerOptions",
    "ServingEnvironment",
    "VLLMServer",
    "find_environment",
]
