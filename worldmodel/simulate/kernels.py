"""Both models' parameters packed for the engine: what is multiplied together lies together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from worldmodel import schema
from worldmodel.compilation import BFLOAT16
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import PRECISIONS, ModelConfig, OutcomeModel, StateModel


@struct.dataclass
class Rows:
    """Weights from a row to everything that reads it: layer 1 and the autoregression."""

    obs: jax.Array  # [39, X]
    observed: jax.Array  # [38, X]
    static: jax.Array  # [3, X]
    action: jax.Array  # [10, X]
    bias: jax.Array  # [X]


@struct.dataclass
class Layer:
    """A GRU layer above its input projection."""

    weight_input: jax.Array | None  # [H, 3H]; None for layer 1, whose input is the row
    bias_input: jax.Array | None
    weight_hidden: jax.Array  # [H, 3H]
    bias_hidden: jax.Array  # [3H]


@struct.dataclass
class Trunk:
    """Row projection and GRU of one model."""

    rows: Rows
    layers: tuple[Layer, ...]
    precision: str = struct.field(pytree_node=False)

    @property
    def gates_width(self) -> int:
        return self.layers[0].bias_hidden.shape[-1]


@struct.dataclass
class StateKernel:
    """A State Model, packed."""

    trunk: Trunk
    hidden: jax.Array  # [H, head + H] ventilation head and transition, side by side
    hidden_bias: jax.Array
    vent_out: jax.Array  # [head]
    vent_bias: jax.Array  # []
    vent_into_pre: jax.Array  # [H] weight of the predicted ventilation
    heads: jax.Array  # [H, 78] mu and log sigma
    heads_bias: jax.Array
    log_sigma_offset: jax.Array | None  # [39], residual variant
    linear_rows: int = struct.field(pytree_node=False)  # 0 for the reference variant


@struct.dataclass
class OutcomeKernel:
    """An Outcome Model, packed."""

    trunk: Trunk
    hidden: jax.Array  # [H, head]
    hidden_bias: jax.Array
    out: jax.Array  # [head]
    out_bias: jax.Array  # []


def pack_state(model: StateModel, precision: str | None = None) -> StateKernel:
    """A State Model (no ensemble axis) for `begin` and `predict`.

    Args:
      model: one member's parameters.
      precision: of products: one of `clinical_model.PRECISIONS`, "bfloat16", or None for the
        model's own.

    Raises:
      InputError: there is no such precision.
    """
    config = model.config
    lags = config.linear_rows if config.variant == "residual" else 0
    linear = model.autoregression if lags else None
    head = model.vent_hidden.kernel.shape[-1]
    pre = model.trans_pre.kernel[...]
    return StateKernel(
        trunk=_pack_trunk(model, precision, linear, lags),
        hidden=jnp.concatenate([model.vent_hidden.kernel[...], pre[:-1]], axis=1),
        hidden_bias=jnp.concatenate([model.vent_hidden.bias[...], model.trans_pre.bias[...]]),
        vent_out=model.vent_out.kernel[...].reshape(head),
        vent_bias=model.vent_out.bias[0],
        vent_into_pre=pre[-1],
        heads=jnp.concatenate(
            [model.mu_head.kernel[...], model.log_sigma_head.kernel[...]], axis=1
        ),
        heads_bias=jnp.concatenate([model.mu_head.bias[...], model.log_sigma_head.bias[...]]),
        log_sigma_offset=model.log_sigma_offset[...] if lags else None,
        linear_rows=lags,
    )


def pack_outcome(model: OutcomeModel, precision: str | None = None) -> OutcomeKernel:
    """An Outcome Model (no ensemble axis) for `mortality_logit`; arguments as `pack_state`."""
    return OutcomeKernel(
        trunk=_pack_trunk(model, precision, None, 0),
        hidden=model.outcome_hidden.kernel[...],
        hidden_bias=model.outcome_hidden.bias[...],
        out=model.outcome_out.kernel[..., 0],
        out_bias=model.outcome_out.bias[0],
    )


def _pack_trunk(model: Any, precision: str | None, linear: Any, lags: int) -> Trunk:
    config: ModelConfig = model.config
    known = (*PRECISIONS, BFLOAT16)
    if precision is not None and precision not in known:
        raise InputError(f"precision: got {precision!r}, expected one of {known}")
    first, *above = model.gru.cells
    cuts = (schema.NUM_FEATURES, schema.NUM_FEATURES + schema.NUM_MASKED)
    obs, observed, embedded = jnp.split(first.weight_input[...], cuts)
    static, action = embedded[: config.embed], embedded[config.embed :]

    def fold(embedding: Any, weight: jax.Array) -> jax.Array:
        return jnp.matmul(embedding, weight, precision="highest")

    rows = Rows(
        obs=obs,
        observed=observed,
        static=fold(model.static_embed.kernel[...], static),
        action=fold(model.act_embed.kernel[...], action),
        bias=first.bias_input[...]
        + fold(model.static_embed.bias[...], static)
        + fold(model.act_embed.bias[...], action),
    )
    if linear is not None:
        rows = _beside(rows, _linear_terms(linear, lags))
    layers = [Layer(None, None, first.weight_hidden[...], first.bias_hidden[...])] + [
        Layer(
            cell.weight_input[...],
            cell.bias_input[...],
            cell.weight_hidden[...],
            cell.bias_hidden[...],
        )
        for cell in above
    ]
    return Trunk(rows, tuple(layers), precision or config.precision)


def _linear_terms(linear: Any, lags: int) -> Rows:
    """The autoregression's weights [.., 39 x lags], those of the newest row first."""
    kernel = linear.kernel[...]
    width = (kernel.shape[0] - schema.NUM_STATIC) // lags
    by_lag = [kernel[lag * width : (lag + 1) * width] for lag in reversed(range(lags))]
    cuts = (schema.NUM_FEATURES, schema.NUM_FEATURES + schema.NUM_MASKED)
    obs, observed, action = jnp.split(jnp.concatenate(by_lag, axis=1), cuts)
    # The static features and the bias count once, with the newest row.
    later = (lags - 1) * schema.NUM_FEATURES
    static = jnp.pad(kernel[-schema.NUM_STATIC :], ((0, 0), (0, later)))
    return Rows(obs, observed, static, action, jnp.pad(linear.bias[...], (0, later)))


def _beside(*parts: Rows) -> Rows:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *parts)
