"""The State Model and the Outcome Model reformulated for closed loops: the same numbers, sooner.

Both models look at a window and start every look from h = 0 on its oldest row. Playing forward,
consecutive windows share all rows but one, so instead of running whole windows

- every window that a row belongs to is kept in flight as a chain of hidden states, and a new row
  moves each chain on by one step: its projection is made once and serves all of them;
- the first step of a chain needs no recurrent product, as h = 0;
- chains that would end after the horizon are not started;
- what branches have in common is computed once: hidden states before the first treatment have
  the shape [P, 1, 1, H] of their patients, after it [P, K, 1, H] of their plans, and broadcast
  to [P, K, S, H] where the futures part;
- products with the same left side are one product; embeddings are folded into the projection.

All functions take leading axes of any shape that broadcast against each other. Tested equal to
`WorldModel.transition` and `mortality_logit` step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldmodel import schema
from worldmodel.compilation import BFLOAT16
from worldmodel.models.clinical_model import LOG_SIGMA_RANGE, Prediction
from worldmodel.models.gru import gates
from worldmodel.simulate.kernels import OutcomeKernel, StateKernel, Trunk

Hidden = tuple[jax.Array, ...]  # a chain: one [..., H] per layer


class Row(NamedTuple):
    """What the models read of one step."""

    obs: jax.Array  # [..., 39] z-scores
    observed: jax.Array  # [..., 38] float32
    static: jax.Array  # [..., 3] scaled
    action: jax.Array  # [..., 10] one-hot pairs


class Flow(NamedTuple):
    """Branches in flight between two steps of the State Model."""

    chains: tuple[Hidden, ...]  # windows that have begun, the one that ends next first
    ahead: tuple[jax.Array, ...]  # [..., 39] what past rows add to the next changes, nearest first


def begin(kernel: StateKernel, past: Row, *, horizon: int) -> Flow:
    """Chains of the windows that have begun before the newest row.

    Args:
      kernel: packed State Model.
      past: [R, ...] the rows before the newest, oldest first; the last five are read.
      horizon: steps that will be played; no more chains than that are kept.
    """
    count = schema.STATE_WINDOW - 1
    projected, terms = _project(kernel, jax.tree.map(lambda leaf: leaf[-count:], past))
    kept = min(horizon, count)
    ids = jnp.arange(kept).reshape(kept, *(1,) * (projected.ndim - 1))

    def step(chains: Hidden, row: tuple[jax.Array, jax.Array]) -> tuple[Hidden, None]:
        index, read = row
        # Chain i starts with row i; until then its h stays 0.
        moved = _advance(kernel.trunk, chains, read[None])
        return tuple(jnp.where(ids <= index, h, 0.0) for h in moved), None

    width = kernel.trunk.gates_width // 3
    zeros = jnp.zeros((kept, *projected.shape[1:-1], width), projected.dtype)
    chains, _ = jax.lax.scan(
        step, (zeros,) * len(kernel.trunk.layers), (jnp.arange(count), projected)
    )
    lags = kernel.linear_rows
    ahead = tuple(
        sum((terms[lag][due - lag] for lag in range(due + 2, lags)), terms[due + 1][-1])
        for due in range(lags - 1)
    )
    return Flow(tuple(tuple(h[i] for h in chains) for i in range(kept)), ahead)


def predict(
    kernel: StateKernel, flow: Flow, row: Row, *, more: bool = True
) -> tuple[Flow, Prediction]:
    """Moves every window on by the newest row, whose treatment is chosen.

    Args:
      kernel: packed State Model.
      flow: from `begin` or the step before.
      row: the newest row.
      more: whether a window that starts with this row will be asked for; it ends in five steps.

    Returns:
      The flow after the row, and the prediction of the window that ends with it.
    """
    projected, terms = _project(kernel, row)
    started = (None,) if more else ()
    done, *going = (_advance(kernel.trunk, chain, projected) for chain in (*flow.chains, *started))
    change, ahead = _pass_on(terms, flow.ahead)
    return Flow(tuple(going), ahead), _heads(kernel, done[-1], row.obs, change)


def mortality_logit(kernel: OutcomeKernel, groups: Sequence[Row]) -> jax.Array:
    """Logit [...] of death within 90 days from the newest 12 rows.

    Args:
      kernel: packed Outcome Model.
      groups: [n, ...] the rows, oldest first, in groups of consecutive rows whose leading axes
        are alike; those of a later group may be wider.
    """

    def step(chain: Hidden | None, row: Row) -> tuple[Hidden, None]:
        return _advance(kernel.trunk, chain, _read(kernel.trunk, row)), None

    chain: Hidden | None = None
    for rows in groups:
        chain, _ = step(chain, jax.tree.map(lambda leaf: leaf[0], rows))
        if rows.obs.shape[0] > 1:
            chain, _ = jax.lax.scan(step, chain, jax.tree.map(lambda leaf: leaf[1:], rows))
    assert chain is not None
    dot = _dot_of(kernel.trunk.precision)
    with jax.named_scope("heads"):
        hidden = jax.nn.relu(dot(chain[-1], kernel.hidden) + kernel.hidden_bias)
        return (hidden * kernel.out).sum(-1) + kernel.out_bias


def _dot_of(precision: str) -> Any:
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
    """[..., X] everything that is linear in a row."""
    dot = _dot_of(trunk.precision)
    weights = trunk.rows
    # Measured before the sum: these parts vary by patient or plan only.
    known = dot(row.observed, weights.observed) + dot(row.static, weights.static)
    return dot(row.obs, weights.obs) + (dot(row.action, weights.action) + (known + weights.bias))


def _project(kernel: StateKernel, row: Row) -> tuple[jax.Array, list[jax.Array]]:
    read = _read(kernel.trunk, row)
    width, features = kernel.trunk.gates_width, schema.NUM_FEATURES
    terms = [
        read[..., width + lag * features : width + (lag + 1) * features]
        for lag in range(kernel.linear_rows)
    ]
    return read[..., :width], terms


def _pass_on(
    terms: list[jax.Array], ahead: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
    """The linear change due now, and what the rows so far add to later ones."""
    if not terms:
        return None, ()
    *due, last = terms
    now, *later = *(term + earlier for term, earlier in zip(due, ahead, strict=True)), last
    return now, tuple(later)


@jax.named_scope("recurrence")
def _advance(trunk: Trunk, chain: Hidden | None, projected: jax.Array) -> Hidden:
    """One row further in every layer; a chain of None starts here, from h = 0."""
    dot = _dot_of(trunk.precision)
    moved: list[jax.Array] = []
    for index, layer in enumerate(trunk.layers):
        if layer.weight_input is not None and layer.bias_input is not None:
            projected = dot(moved[-1], layer.weight_input) + layer.bias_input
        if chain is None:
            h = jnp.zeros((*projected.shape[:-1], trunk.gates_width // 3), projected.dtype)
            recurrent = jnp.broadcast_to(layer.bias_hidden, projected.shape)
        else:
            h = chain[index]
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
