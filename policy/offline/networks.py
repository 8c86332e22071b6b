"""Networks of offline reinforcement learning: small perceptrons on features of a state."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx


class Perceptron(nnx.Module):
    """Dense layers with layer normalisation and ReLU: [..., D] -> [..., O]."""

    def __init__(self, width: int, hidden: tuple[int, ...], out: int, *, rngs: nnx.Rngs):
        sizes = (width, *hidden)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairwise(sizes)])
        self.norms = nnx.List([nnx.LayerNorm(b, rngs=rngs) for b in hidden])
        self.out = nnx.Linear(
            sizes[-1], out, kernel_init=nnx.initializers.orthogonal(0.1), rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.relu(norm(layer(x)))
        return self.out(x)


class DuelingQ(nnx.Module):
    """Q = V + A - mean A (Wang et al. 2016): [..., D] -> [..., 25]."""

    def __init__(self, width: int, hidden: tuple[int, ...], actions: int, *, rngs: nnx.Rngs):
        self.trunk = Perceptron(width, hidden, 1 + actions, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        value, advantage = jnp.split(self.trunk(x), [1], axis=-1)
        return value + advantage - advantage.mean(-1, keepdims=True)
