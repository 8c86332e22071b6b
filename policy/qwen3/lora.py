"""Low-rank adapters (LoRA, arXiv 2106.09685) on the projections of a Qwen3."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from policy.qwen3.model import Linear, Qwen3


class Adapter(nnx.Module):
    """(alpha / rank) x a b, per layer; zero until trained.

    Parameters: `a` [L, in, rank], `b` [L, rank, out], float32 `nnx.LoRAParam`.
    """

    def __init__(self, a: jax.Array, b: jax.Array, *, alpha: float):
        self.a = nnx.LoRAParam(a)
        self.b = nnx.LoRAParam(b)
        self.alpha = alpha

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.a.shape[-1]

    def __call__(self, x: jax.Array) -> jax.Array:
        low = x @ self.a[...].astype(x.dtype)
        return self.scale * (low @ self.b[...].astype(x.dtype))


def merge_adapters(model: Qwen3) -> Qwen3:
    """The same model with adapters added to the kernels; the model itself where it has none."""
    merged = nnx.merge(*nnx.split(model))
    for _, linear in adapted(merged):
        adapter = linear.adapter
        product = jnp.matmul(adapter.a[...], adapter.b[...], preferred_element_type=jnp.float32)
        kernel = linear.kernel[...]
        summed = kernel.astype(jnp.float32) + adapter.scale * product
        linear.kernel[...] = summed.astype(kernel.dtype)
        linear.adapter = None
    return merged


def adapted(model: Qwen3) -> list[tuple[str, Linear]]:
    """The projections that have an adapter, with their names."""
    return [
        (str(path[-1]), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and module.adapter is not None
    ]
