"""Fused gated recurrent unit with torch's conventions.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
    h' = (1 - z) * n + z * h

(Cho et al. 2014, with the reset gate after the product as in cuDNN.) The three gates share one
product per input; the hidden side has a bias of its own, which `flax.nnx.GRUCell` lacks for the
candidate gate, so that torch weights fit exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class GRUCell(nnx.Module):
    """One layer's parameters; gate order r, z, n along the last axis."""

    def __init__(self, in_features: int, hidden: int, *, rngs: nnx.Rngs, precision: str):
        bound = hidden**-0.5

        def uniform(*shape: int) -> nnx.Param[jax.Array]:
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.weight_input = uniform(in_features, 3 * hidden)
        self.weight_hidden = uniform(hidden, 3 * hidden)
        self.bias_input = uniform(3 * hidden)
        self.bias_hidden = uniform(3 * hidden)
        self.hidden = hidden
        self.precision = precision

    def project_input(self, x: Float[Array, "*b F"]) -> Float[Array, "*b G"]:
        """Input side of the gates: [..., F] -> [..., 3H]."""
        return (
            jnp.matmul(x, self.weight_input[...], precision=self.precision) + self.bias_input[...]
        )

    def step(
        self, projected: Float[Array, "*b G"], h: Float[Array, "*b H"]
    ) -> Float[Array, "*b H"]:
        """Next hidden state [..., H] from projected input [..., 3H] and hidden state [..., H]."""
        recurrent = jnp.matmul(h, self.weight_hidden[...], precision=self.precision)
        return gates(projected, recurrent + self.bias_hidden[...], h)


def gates(
    projected: Float[Array, "*#b G"], recurrent: Float[Array, "*#b G"], h: Float[Array, "*#b H"]
) -> Float[Array, "*#b H"]:
    """The elementwise half of a GRU step: two [..., 3H] sides and h [..., H] to h' [..., H]."""
    return gated(jnp.split(projected, 3, axis=-1), jnp.split(recurrent, 3, axis=-1), h)


def gated(
    projected: Sequence[jax.Array], recurrent: Sequence[jax.Array], h: jax.Array
) -> jax.Array:
    """`gates` of arrays of any one shape, each side as its parts r, z and n."""
    input_r, input_z, input_n = projected
    hidden_r, hidden_z, hidden_n = recurrent
    r = _sigmoid(input_r + hidden_r)
    z = _sigmoid(input_z + hidden_z)
    n = jnp.tanh(input_n + r * hidden_n)
    return n + z * (h - n)


def _sigmoid(x: jax.Array) -> jax.Array:
    # Gates are half of a rollout's time on a CPU, where tanh costs less than exp and a division.
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


class GRU(nnx.Module):
    """Stacked GRU over a short window, started from zeros; returns the last hidden state."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        layers: int,
        *,
        dropout: float,
        rngs: nnx.Rngs,
        precision: str,
    ):
        widths = [in_features] + [hidden] * (layers - 1)
        self.cells = nnx.List(
            [GRUCell(width, hidden, rngs=rngs, precision=precision) for width in widths]
        )
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Runs the window.

        Args:
          x: [B, W, F].
          key: dropout between layers when given; the key is consumed.

        Returns:
          [B, H] the top layer's last hidden state.
        """
        # The window is short: a Python loop unrolls it, which XLA fuses better than a scan.
        sequence = x
        for layer, cell in enumerate(self.cells):
            if layer and key is not None:
                key, key_layer = jax.random.split(key)
                sequence = self.dropout(sequence, deterministic=False, rngs=key_layer)
            projected = cell.project_input(sequence)
            # From h = 0 the hidden side of the first step is its bias alone.
            zeros = jnp.zeros((*x.shape[:-2], cell.hidden), x.dtype)
            h = gates(
                projected[..., 0, :],
                jnp.broadcast_to(cell.bias_hidden[...], projected[..., 0, :].shape),
                zeros,
            )
            rows = [h]
            for t in range(1, x.shape[-2]):
                h = cell.step(projected[..., t, :], h)
                rows.append(h)
            sequence = jnp.stack(rows, axis=-2)
        return sequence[..., -1, :]
