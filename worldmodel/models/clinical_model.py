"""State Model and Outcome Model: the two halves of the Clinical World Model.

Architecture after SepsisAgent (arXiv 2605.14723): per row `x = [obs, measured, static
embedding, action embedding]`, a two-layer GRU, heads on its last hidden state. Variants of the
State Model:

- `reference`: exactly that; predicts the next state itself.
- `residual`: predicts the *change* from the last row: a linear autoregression on the newest
  rows (whose earlier treatments say what stopping and starting will do) plus the GRU's
  correction, with a bounded, calibrated sigma. Both parts start at zero, so that training starts
  from "the last value stays".

The third variant, `recurrent`, reads whole stays: `worldmodel.models.recurrent`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.errors import InputError
from worldmodel.models.gru import GRU

RECURRENT = "recurrent"
VARIANTS = ("reference", "residual", RECURRENT)
PRECISIONS = ("highest", "high", "default")
LOG_SIGMA_RANGE = (-4.0, 1.5)  # z-space, residual variant


_WIDEST = 16_384  # far beyond what records can teach


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a world model.

    Attributes:
      variant: "recurrent" (default), "residual" or "reference".
      hidden: GRU width.
      layers: GRU layers; the recurrent variant has one.
      embed: width of the static and the action embedding; the recurrent variant has none.
      head: width of the ventilation and mortality heads.
      linear_rows: rows that the residual variant's autoregression reads.
      dropout: rate while training; half of it in the recurrent variant's prediction of values.
      precision: matmul precision, "highest" (float32) or "default" (TF32 on recent GPUs).
    """

    variant: str = RECURRENT
    hidden: int = 128
    layers: int = 2
    embed: int = 32
    head: int = 64
    linear_rows: int = 3
    dropout: float = 0.2
    precision: str = "highest"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError(f"variant: got {self.variant!r}, expected one of {VARIANTS}")
        widths = ("hidden", "layers", "embed", "head")
        require(self, f"1 to {_WIDEST}", lambda width: 1 <= width <= _WIDEST, *widths)
        window = f"1 to {schema.STATE_WINDOW}, the rows of the State Model's window"
        require(self, window, lambda rows: 1 <= rows <= schema.STATE_WINDOW, "linear_rows")
        require(self, "at least 0 and below 1", lambda rate: 0 <= rate < 1, "dropout")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision: got {self.precision!r}, expected one of {PRECISIONS}")

    @property
    def row_width(self) -> int:
        """Width of the GRU's input rows."""
        return schema.NUM_FEATURES + schema.NUM_MASKED + 2 * self.embed


class Prediction(NamedTuple):
    """Prediction of the State Model for the next step, in z-space."""

    mu: jax.Array  # [B, 39]
    log_sigma: jax.Array  # [B, 39]
    vent_logit: jax.Array  # [B]


class _Trunk(nnx.Module):
    """Row encoder and GRU, shared by both models."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        linear = _linear(config, rngs)
        self.static_embed = linear(schema.NUM_STATIC, config.embed)
        self.act_embed = linear(schema.ACTION_WIDTH, config.embed)
        self.gru = GRU(
            config.row_width,
            config.hidden,
            config.layers,
            dropout=config.dropout,
            rngs=rngs,
            precision=config.precision,
        )
        self.config = config

    def encode(
        self,
        obs: jax.Array,
        observed: jax.Array,
        static: jax.Array,
        action: jax.Array,
        key: jax.Array | None,
    ) -> jax.Array:
        dtype = obs.dtype
        embedded = self.static_embed(static)[..., None, :]
        rows = [
            obs,
            observed.astype(dtype),
            jnp.broadcast_to(embedded, (*obs.shape[:-1], embedded.shape[-1])),
            self.act_embed(action.astype(dtype)),
        ]
        return self.gru(jnp.concatenate(rows, axis=-1), key=key)


class StateModel(_Trunk):
    """Predicts the state and the ventilation four hours later."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        linear = _linear(config, rngs)
        features = schema.NUM_FEATURES
        self.vent_hidden = linear(config.hidden, config.head)
        self.vent_out = linear(config.head, 1)
        self.trans_pre = linear(config.hidden + 1, config.hidden)
        self.mu_head = linear(config.hidden, features)
        self.log_sigma_head = linear(config.hidden, features)
        self.dropout = nnx.Dropout(config.dropout)
        if config.variant == "residual":
            row = features + schema.NUM_MASKED + schema.ACTION_WIDTH
            self.autoregression = nnx.Linear(
                config.linear_rows * row + schema.NUM_STATIC,
                features,
                kernel_init=nnx.initializers.zeros,
                rngs=rngs,
                precision=config.precision,
            )
            for head in (self.mu_head, self.log_sigma_head):
                head.kernel[...] = jnp.zeros_like(head.kernel[...])
                head.bias[...] = jnp.zeros_like(head.bias[...])
            self.log_sigma_offset = nnx.Param(jnp.zeros(features))

    def __call__(
        self,
        obs: Float[Array, "B W 39"],
        observed: Float[Array, "B W 38"],
        static: Float[Array, "B 3"],
        action: Float[Array, "B W 10"],
        *,
        key: jax.Array | None = None,
    ) -> Prediction:
        """Predicts the step after the window.

        Args:
          obs: [B, W, 39] z-scores, left-padded with zero rows.
          observed: [B, W, 38] measured in the step.
          static: [B, 3] scaled.
          action: [B, W, 10] one-hot pairs; the last row holds the treatment in question.
          key: dropout when given; the key is consumed.
        """
        key_gru, key_pre = (None, None) if key is None else jax.random.split(key)
        h = self.encode(obs, observed, static, action, key_gru)
        vent_logit = self.vent_out(jax.nn.relu(self.vent_hidden(h)))
        h_plus = jnp.concatenate([h, jax.nn.sigmoid(vent_logit)], axis=-1)
        pre = jax.nn.relu(self.trans_pre(h_plus))
        if key_pre is not None:
            pre = self.dropout(pre, deterministic=False, rngs=key_pre)
        mu, log_sigma = self.mu_head(pre), self.log_sigma_head(pre)
        if self.config.variant == "residual":
            mu = obs[..., -1, :] + self._linear_change(obs, observed, static, action) + mu
            low, high = LOG_SIGMA_RANGE
            log_sigma = low + (high - low) * jax.nn.sigmoid(log_sigma)
            log_sigma = log_sigma + jax.lax.stop_gradient(self.log_sigma_offset[...])
        return Prediction(mu, log_sigma, vent_logit[..., 0])

    def _linear_change(
        self, obs: jax.Array, observed: jax.Array, static: jax.Array, action: jax.Array
    ) -> jax.Array:
        newest = jnp.concatenate(
            [obs, observed.astype(obs.dtype), action.astype(obs.dtype)], axis=-1
        )[..., -self.config.linear_rows :, :]
        flat = newest.reshape(*newest.shape[:-2], -1)
        return self.autoregression(jnp.concatenate([flat, static], axis=-1))


class OutcomeModel(_Trunk):
    """Predicts 90-day mortality from the last rows of a trajectory."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        linear = _linear(config, rngs)
        self.outcome_hidden = linear(config.hidden, config.head)
        self.outcome_out = linear(config.head, 1)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        obs: Float[Array, "B W 39"],
        observed: Float[Array, "B W 38"],
        static: Float[Array, "B 3"],
        action: Float[Array, "B W 10"],
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, " B"]:
        """Mortality logit [B]; arguments as for the State Model, window 12."""
        key_gru, key_head = (None, None) if key is None else jax.random.split(key)
        h = jax.nn.relu(self.outcome_hidden(self.encode(obs, observed, static, action, key_gru)))
        if key_head is not None:
            h = self.dropout(h, deterministic=False, rngs=key_head)
        result: jax.Array = self.outcome_out(h)[..., 0]
        return result


# `nnx.Linear` declares its bias optional, but these layers always have one.
def _linear(config: ModelConfig, rngs: nnx.Rngs) -> Callable[[int, int], Any]:
    def make(in_features: int, out_features: int) -> nnx.Linear:
        return nnx.Linear(in_features, out_features, rngs=rngs, precision=config.precision)

    return make
