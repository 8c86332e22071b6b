"""The State Model and the Outcome Model reformulated for closed loops: faster, same numbers.

Both models run a GRU over a window, from h = 0 on its oldest row. In a rollout, consecutive
windows share all rows but one, so instead of running whole windows

- every unfinished window keeps its own hidden state, and a new row advances all of them by one
  step: the projection of the row is computed once for all windows;
- the first step of a window needs no recurrent product, as h = 0;
- windows that would end after the horizon are not started;
- what branches have in common is computed once: hidden states have the shape [P, 1, 1, H]
  before the first treatment and [P, K, 1, H] after it, and are broadcast to [P, K, S, H] only
  where the samples begin to differ;
- products with the same left operand are one product; embeddings are folded into the
  projection.

All functions take leading axes of any shape that broadcast against each other. Tested equal to
`WorldModel.transition` and `mortality_logit` step by step.

`pack_state` and `pack_outcome` arrange the parameters of both models for this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from worldmodel import schema, struct
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import (
    LOG_SIGMA_RANGE,
    PRECISIONS,
    ModelConfig,
    OutcomeModel,
    Prediction,
    StateModel,
)
from worldmodel.models.gru import gates
from worldmodel.resources import BFLOAT16

Hidden = tuple[jax.Array, ...]  # one hidden state [..., H] per layer


class Row(NamedTuple):
    """Inputs of the models from one step."""

    obs: jax.Array  # [..., 39] z-scores
    observed: jax.Array  # [..., 38] float32
    static: jax.Array  # [..., 3] scaled
    action: jax.Array  # [..., 10] one-hot pairs


class Carry(NamedTuple):
    """State of the recurrence between two steps of the State Model."""

    hidden_states: tuple[Hidden, ...]  # of unfinished windows, the one that ends next first
    # [..., 39] contributions of past rows to the next changes, nearest first
    lag_terms: tuple[jax.Array, ...]


def init_carry(kernel: StateKernel, past: Row, *, horizon: int) -> Carry:
    """Hidden states of the windows that begin before the newest row.

    Args:
      kernel: packed State Model.
      past: [R, ...] the rows before the newest, oldest first; the last five are read.
      horizon: steps H of the rollout; at most so many hidden states are kept.
    """
    count = schema.STATE_WINDOW - 1
    projected, terms = _project(kernel, jax.tree.map(lambda leaf: leaf[-count:], past))
    kept = min(horizon, count)
    ids = jnp.arange(kept).reshape(kept, *(1,) * (projected.ndim - 1))

    def step(hidden_states: Hidden, row: tuple[jax.Array, jax.Array]) -> tuple[Hidden, None]:
        index, read = row
        # Window i starts with row i; until then its h stays 0.
        moved = _advance(kernel.trunk, hidden_states, read[None])
        return tuple(jnp.where(ids <= index, h, 0.0) for h in moved), None

    width = kernel.trunk.gates_width // 3
    zeros = jnp.zeros((kept, *projected.shape[1:-1], width), projected.dtype)
    hidden_states, _ = jax.lax.scan(
        step, (zeros,) * len(kernel.trunk.layers), (jnp.arange(count), projected)
    )
    lags = kernel.linear_rows
    lag_terms = tuple(
        sum((terms[lag][due - lag] for lag in range(due + 2, lags)), terms[due + 1][-1])
        for due in range(lags - 1)
    )
    return Carry(tuple(tuple(h[i] for h in hidden_states) for i in range(kept)), lag_terms)


def step(
    kernel: StateKernel, carry: Carry, row: Row, *, more: bool = True
) -> tuple[Carry, Prediction]:
    """Advances every window by the newest row, whose treatment is chosen.

    Args:
      kernel: packed State Model.
      carry: from `init_carry` or the step before.
      row: the newest row.
      more: whether a window starts with this row; it ends five steps later.

    Returns:
      The carry after the row, and the prediction of the window that ends with it.
    """
    projected, terms = _project(kernel, row)
    started = (None,) if more else ()
    done, *going = (
        _advance(kernel.trunk, hidden_state, projected)
        for hidden_state in (*carry.hidden_states, *started)
    )
    change, lag_terms = _pass_on(terms, carry.lag_terms)
    return Carry(tuple(going), lag_terms), _heads(kernel, done[-1], row.obs, change)


def mortality_logit(kernel: OutcomeKernel, groups: Sequence[Row]) -> jax.Array:
    """Logit [...] of death within 90 days from the newest 12 rows.

    Args:
      kernel: packed Outcome Model.
      groups: [n, ...] the rows, oldest first, in groups of consecutive rows with equal leading
        axes; those of a later group may be larger.
    """

    def step(hidden_state: Hidden | None, row: Row) -> tuple[Hidden, None]:
        return _advance(kernel.trunk, hidden_state, _read(kernel.trunk, row)), None

    hidden_state: Hidden | None = None
    for rows in groups:
        hidden_state, _ = step(hidden_state, jax.tree.map(lambda leaf: leaf[0], rows))
        if rows.obs.shape[0] > 1:
            hidden_state, _ = jax.lax.scan(
                step, hidden_state, jax.tree.map(lambda leaf: leaf[1:], rows)
            )
    assert hidden_state is not None
    dot = _dot_of(kernel.trunk.precision)
    with jax.named_scope("heads"):
        hidden = jax.nn.relu(dot(hidden_state[-1], kernel.hidden) + kernel.hidden_bias)
        return (hidden * kernel.out).sum(-1) + kernel.out_bias


def _dot_of(precision: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    if precision != BFLOAT16:
        return lambda x, weight: jnp.matmul(x, weight, precision=precision)

    def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.matmul(
            x.astype(jnp.bfloat16),
            weight.astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )

    return dot


@jax.named_scope("projection")
def _read(trunk: Trunk, row: Row) -> jax.Array:
    """[..., X] all linear functions of a row."""
    dot = _dot_of(trunk.precision)
    weights = trunk.rows
    # Measured before the sum: these parts vary by patient or plan only.
    known = dot(row.observed, weights.observed) + dot(row.static, weights.static)
    result: jax.Array = dot(row.obs, weights.obs) + (
        dot(row.action, weights.action) + (known + weights.bias)
    )
    return result


def _project(kernel: StateKernel, row: Row) -> tuple[jax.Array, list[jax.Array]]:
    read = _read(kernel.trunk, row)
    width, features = kernel.trunk.gates_width, schema.NUM_FEATURES
    terms = [
        read[..., width + lag * features : width + (lag + 1) * features]
        for lag in range(kernel.linear_rows)
    ]
    return read[..., :width], terms


def _pass_on(
    terms: list[jax.Array], lag_terms: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
    """The linear change of this step, and the contributions of the rows so far to later steps."""
    if not terms:
        return None, ()
    *due, last = terms
    now, *later = *(term + earlier for term, earlier in zip(due, lag_terms, strict=True)), last
    return now, tuple(later)


@jax.named_scope("recurrence")
def _advance(trunk: Trunk, hidden_state: Hidden | None, projected: jax.Array) -> Hidden:
    """The hidden state after one more row; None starts a window, from h = 0."""
    dot = _dot_of(trunk.precision)
    moved: list[jax.Array] = []
    for index, layer in enumerate(trunk.layers):
        if layer.weight_input is not None and layer.bias_input is not None:
            projected = dot(moved[-1], layer.weight_input) + layer.bias_input
        if hidden_state is None:
            h = jnp.zeros((*projected.shape[:-1], trunk.gates_width // 3), projected.dtype)
            recurrent = jnp.broadcast_to(layer.bias_hidden, projected.shape)
        else:
            h = hidden_state[index]
            recurrent = dot(h, layer.weight_hidden) + layer.bias_hidden
        with jax.named_scope("gates"):
            moved.append(gates(projected, recurrent, h))
    return tuple(moved)


@jax.named_scope("heads")
def _heads(
    kernel: StateKernel, h: jax.Array, obs: jax.Array, change: jax.Array | None
) -> Prediction:
    dot = _dot_of(kernel.trunk.precision)
    both = dot(h, kernel.hidden) + kernel.hidden_bias
    width = kernel.vent_out.shape[0]
    vent_logit = (jax.nn.relu(both[..., :width]) * kernel.vent_out).sum(-1) + kernel.vent_bias
    ventilation = jax.nn.sigmoid(vent_logit)[..., None]
    pre = jax.nn.relu(both[..., width:] + ventilation * kernel.vent_into_pre)
    out = dot(pre, kernel.heads) + kernel.heads_bias
    mu, log_sigma = out[..., : schema.NUM_FEATURES], out[..., schema.NUM_FEATURES :]
    if change is not None and kernel.log_sigma_offset is not None:
        mu = obs + change + mu
        low, high = LOG_SIGMA_RANGE
        log_sigma = low + (high - low) * jax.nn.sigmoid(log_sigma) + kernel.log_sigma_offset
    return Prediction(mu, log_sigma, vent_logit)


@struct.dataclass
class Rows:
    """Weights of a row's inputs in layer 1 and in the autoregression."""

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
        """3H, the width of all gates together."""
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
    """A State Model (no ensemble axis) for `init_carry` and `step`.

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


def _pack_trunk(
    model: StateModel | OutcomeModel, precision: str | None, linear: nnx.Linear | None, lags: int
) -> Trunk:
    config: ModelConfig = model.config
    known = (*PRECISIONS, BFLOAT16)
    if precision is not None and precision not in known:
        raise InputError(f"precision: got {precision!r}, expected one of {known}")
    first, *above = model.gru.cells
    cuts = (schema.NUM_FEATURES, schema.NUM_FEATURES + schema.NUM_MASKED)
    obs, observed, embedded = jnp.split(first.weight_input[...], cuts)
    static, action = embedded[: config.embed], embedded[config.embed :]

    def fold(embedding: jax.Array, weight: jax.Array) -> jax.Array:
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


def _linear_terms(linear: nnx.Linear, lags: int) -> Rows:
    """The autoregression's weights [.., 39 x lags], those of the newest row first."""
    kernel = linear.kernel[...]
    width = (kernel.shape[0] - schema.NUM_STATIC) // lags
    by_lag = [kernel[lag * width : (lag + 1) * width] for lag in reversed(range(lags))]
    cuts = (schema.NUM_FEATURES, schema.NUM_FEATURES + schema.NUM_MASKED)
    obs, observed, action = jnp.split(jnp.concatenate(by_lag, axis=1), cuts)
    # The static features and the bias count once, with the newest row.
    later, bias = (lags - 1) * schema.NUM_FEATURES, linear.bias
    assert bias is not None
    static = jnp.pad(kernel[-schema.NUM_STATIC :], ((0, 0), (0, later)))
    return Rows(obs, observed, static, action, jnp.pad(bias[...], (0, later)))


def _beside(*parts: Rows) -> Rows:
    result: Rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *parts)
    return result
