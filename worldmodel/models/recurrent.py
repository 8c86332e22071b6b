"""The recurrent variant: one hidden state over the whole stay, hazards, and treatment effects.

Per row `x_t` (what is known before treatment t) a GRU moves its hidden state, `h_t = GRU(h_{t-1},
x_t)`. From `h_t`, `x_t` and the treatment `a_t`

- `RecurrentStateModel` predicts the next row: a Gaussian for each value, which values are
  measured, and ventilation; and what the clinician would give (the propensity e(a | h_t, x_t));
- `CompetingRisks` predicts how the stay goes on: death in the unit d, discharge r, death by day
  90 after discharge q, each given that the ones before did not happen; and, for rows from which
  the clinician goes on, death by day 90 and the rewards still to come.

Treatments enter as residuals phi(a_t) - E[phi(a) | h_t, x_t] (Robinson 1988; Nie & Wager,
Biometrika 108:299): what the history says about the choice of the treatment is removed from its
effect, so that confounding by what is recorded cancels. phi is a thermometer code of both levels.
Decayed sums of past doses are part of a row, so that long treatments are not an extrapolation.

Earlier treatments are a sign of how sick a patient was. What is learned of outcomes weighs each row
by how the treatments before it are explained by habit alone, against the whole history
(`recurrent_training.history_weights`); the habit is a head of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldmodel import schema
from worldmodel.models.gru import GRUCell

DECAYS = (0.5, 0.8, 0.95)  # per step, of past doses
_LEVELS = np.arange(schema.NUM_LEVELS)
_THERMOMETER = (_LEVELS[:, None] >= np.arange(1, schema.NUM_LEVELS)).astype(np.float32)  # [5, 4]
# [25, 8] thermometer codes of the joint actions: vasopressor, then fluid.
CODES = np.concatenate(
    [np.repeat(_THERMOMETER, schema.NUM_LEVELS, 0), np.tile(_THERMOMETER, (schema.NUM_LEVELS, 1))],
    axis=1,
)
CODE_WIDTH = CODES.shape[1]  # 8
DOSE_WIDTH = 2 + CODE_WIDTH  # both doses and the code
SUMS_WIDTH = len(DECAYS) * DOSE_WIDTH
DRAWN_WIDTH = 2 * schema.NUM_FEATURES + 1
ROW_WIDTH = DRAWN_WIDTH + 2 + schema.NUM_STATIC + CODE_WIDTH + SUMS_WIDTH
NOISE_WIDTH = 2 * schema.NUM_FEATURES + 2  # normals: values, measuring, ventilation, choice
LARGEST = 5.0  # z-scores beyond are clipped
TIME_UNIT = 10.0  # steps
_DOSE_UNITS = (0.3, 400.0)  # mcg/kg/min and mL per step
LOG_SIGMA_RANGE = (-4.0, 1.5)  # z-space
RISKS = ("death", "discharge", "later death")


class StayRow(NamedTuple):
    """What is known of a stay before a treatment; leading axes of any shape."""

    obs: jax.Array  # [..., 39] z-scores, gaps filled
    measured: jax.Array  # [..., 39] recorded in the row; urine where it is above 0 mL
    ventilated: jax.Array  # [...] bool
    step: jax.Array  # [...] int32, 0 at admission
    static: jax.Array  # [..., 3] scaled
    before: jax.Array  # [..., 8] code of the treatment before; 0 at admission
    sums: jax.Array  # [..., 30] decayed sums of all doses before


class RowPrediction(NamedTuple):
    """Prediction of the next row, in z-space."""

    mu: jax.Array  # [..., 39] of values that are measured
    log_sigma: jax.Array  # [..., 39]
    vent_logit: jax.Array  # [...]
    measured_logit: jax.Array  # [..., 39]


class StayReading(NamedTuple):
    """What the state model finds in whole stays; leaves [B, T, ...]."""

    hidden: jax.Array  # [B, T, H] after each row
    choice: jax.Array  # [B, T, 25] logits of the clinician's choice
    habit: jax.Array  # [B, T, 25] the same, knowing the treatment before and the step alone
    residual: jax.Array  # [B, T, 8] code of the treatment less its expectation
    prediction: RowPrediction  # of the row after each


class Continuation(NamedTuple):
    """What follows where the clinician goes on from a row."""

    mortality_logit: jax.Array  # [...] death within 90 days
    reward: jax.Array  # [...] sum of the rewards of the steps to come, without the terminal one


def code_of(action: jax.Array) -> jax.Array:
    """[..., 8] thermometer code of joint actions [...] 0-24."""
    return jnp.asarray(CODES)[action]


def doses_of(dose_edges: schema.DoseEdges) -> np.ndarray:
    """[25, 10] what is summed up of a joint action: both doses, in units of use, and its code."""
    vasopressor = np.asarray(schema.level_doses(dose_edges.vasopressor)) / _DOSE_UNITS[0]
    fluid = np.asarray(schema.level_doses(dose_edges.fluid)) / _DOSE_UNITS[1]
    both = [np.repeat(vasopressor, schema.NUM_LEVELS), np.tile(fluid, schema.NUM_LEVELS)]
    return np.concatenate([np.stack(both, 1), CODES], axis=1).astype(np.float32)


def add_doses(sums: jax.Array, doses: jax.Array) -> jax.Array:
    """Decayed sums [..., 30] after one more treatment with the doses [..., 10]."""
    parts = jnp.split(sums, len(DECAYS), axis=-1)
    moved = [
        decay * part + (1.0 - decay) * doses for decay, part in zip(DECAYS, parts, strict=True)
    ]
    return jnp.concatenate(jnp.broadcast_arrays(*moved), axis=-1)


def drawn_inputs(row: StayRow) -> jax.Array:
    """[..., 79] inputs of a row that differ between all simulated branches."""
    blocks = (
        jnp.clip(row.obs, -LARGEST, LARGEST),
        row.measured.astype(jnp.float32),
        row.ventilated.astype(jnp.float32)[..., None],
    )
    return _joined(blocks)


def known_inputs(row: StayRow) -> jax.Array:
    """[..., 43] inputs of a row that branches under the same treatments share."""
    step = jnp.asarray(row.step, jnp.float32)[..., None]
    first = (step == 0).astype(jnp.float32)
    return _joined((step / TIME_UNIT, first, row.static, row.before, row.sums))


def row_inputs(row: StayRow) -> jax.Array:
    """[..., F] all inputs of a row."""
    return _joined((drawn_inputs(row), known_inputs(row)))


def _joined(blocks: tuple[jax.Array, ...]) -> jax.Array:
    shape = jnp.broadcast_shapes(*(block.shape[:-1] for block in blocks))
    return jnp.concatenate(
        [jnp.broadcast_to(block, (*shape, block.shape[-1])) for block in blocks], axis=-1
    )


class Dense(nnx.Linear):
    """A linear layer whose bias, where it is read, is not None."""

    bias: nnx.Param[jax.Array]


def _layers(precision: str, rngs: nnx.Rngs) -> Callable[..., Dense]:
    def linear(inputs: int, outputs: int, *, use_bias: bool = True, zero: bool = False) -> Dense:
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        return Dense(
            inputs, outputs, use_bias=use_bias, kernel_init=init, precision=precision, rngs=rngs
        )

    return linear


class RecurrentStateModel(nnx.Module):
    """Next row, ventilation, what is measured, and the clinician's choice."""

    def __init__(self, hidden: int, head: int, dropout: float, precision: str, *, rngs: nnx.Rngs):
        features = schema.NUM_FEATURES

        linear = _layers(precision, rngs)
        self.cell = GRUCell(ROW_WIDTH, hidden, rngs=rngs, precision=precision)
        self.choice_hidden = linear(hidden + ROW_WIDTH, head)
        self.choice = linear(head, schema.NUM_ACTIONS)
        self.habit = linear(CODE_WIDTH + 2, schema.NUM_ACTIONS)
        self.trunk = linear(hidden, hidden)
        self.effect = linear(CODE_WIDTH, hidden, use_bias=False)
        self.mu_row = linear(ROW_WIDTH, features, zero=True)
        self.mu_effect = linear(CODE_WIDTH, features, use_bias=False, zero=True)
        self.mu = linear(hidden, features, zero=True)
        self.log_sigma = linear(hidden, features, zero=True)
        self.vent = linear(hidden, 1)
        self.measured_row = linear(ROW_WIDTH, features, zero=True)
        self.measured = linear(hidden, features)
        # Not trained by gradients: set before and after training.
        self.fill = nnx.Param(jnp.zeros(features))  # z-score that stands for a missing value
        self.noise_factor = nnx.Param(jnp.eye(features))  # Cholesky factor of the residuals
        self.dropout = nnx.Dropout(dropout)
        self.hidden = hidden

    def initial(self, shape: tuple[int, ...]) -> jax.Array:
        """[*shape, H] the hidden state before admission."""
        return jnp.zeros((*shape, self.hidden))

    def advance(self, h: jax.Array, inputs: jax.Array) -> jax.Array:
        """Hidden state [..., H] after a row with the inputs [..., F]."""
        return self.cell.step(self.cell.project_input(inputs), h)

    def encode(self, inputs: jax.Array) -> jax.Array:
        """Hidden states [B, T, H] after each of the rows [B, T, F], from admission on."""
        projected = self.cell.project_input(inputs)

        def step(h: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = self.cell.step(row, h)
            return h, h

        _, hidden = jax.lax.scan(
            step, self.initial(inputs.shape[:1]), jnp.moveaxis(projected, 1, 0)
        )
        return jnp.moveaxis(hidden, 0, 1)

    def propensity(self, h: jax.Array, inputs: jax.Array) -> jax.Array:
        """[..., 25] logits of the clinician's choice."""
        both = jnp.concatenate([h, inputs], axis=-1)
        result: jax.Array = self.choice(jax.nn.relu(self.choice_hidden(both)))
        return result

    def habitual(self, inputs: jax.Array) -> jax.Array:
        """[..., 25] logits of the choice by the step and the treatment before alone."""
        known = inputs[..., DRAWN_WIDTH:]
        start = 2 + schema.NUM_STATIC
        both = jnp.concatenate([known[..., :2], known[..., start : start + CODE_WIDTH]], axis=-1)
        result: jax.Array = self.habit(both)
        return result

    def read(
        self, inputs: jax.Array, obs: jax.Array, action: jax.Array, *, key: jax.Array | None = None
    ) -> StayReading:
        """Reads whole stays under the treatments that were given.

        Args:
          inputs: [B, T, F] of the rows.
          obs: [B, T, 39] values of the rows, z-scores.
          action: [B, T] joint action.
          key: dropout when given; the key is consumed.
        """
        hidden = self.encode(inputs)
        choice = self.propensity(hidden, inputs)
        residual = residual_code(choice, action)
        prediction = self.predict(hidden, inputs, obs, residual, key=key)
        return StayReading(hidden, choice, self.habitual(inputs), residual, prediction)

    def predict(
        self,
        h: jax.Array,
        inputs: jax.Array,
        obs: jax.Array,
        residual: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> RowPrediction:
        """The next row.

        Args:
          h: [..., H] hidden state after the row.
          inputs: [..., F] of the row.
          obs: [..., 39] values of the row, z-scores.
          residual: [..., 8] from `residual_code`.
          key: dropout when given; the key is consumed.
        """
        pre = jax.nn.relu(self.trunk(h) + self.effect(residual))
        if key is not None:
            pre = self.dropout(pre, deterministic=False, rngs=key)
        mu = obs + self.mu_row(inputs) + self.mu_effect(residual) + self.mu(pre)
        return RowPrediction(
            mu=mu,
            log_sigma=bounded(self.log_sigma(pre)),
            vent_logit=self.vent(pre)[..., 0],
            measured_logit=self.measured(pre) + self.measured_row(inputs),
        )


class CompetingRisks(nnx.Module):
    """How a stay goes on: hazards of its next step, and the clinician's continuation."""

    def __init__(self, hidden: int, head: int, dropout: float, precision: str, *, rngs: nnx.Rngs):
        risks = len(RISKS)

        linear = _layers(precision, rngs)
        self.risk_hidden = linear(hidden, head)
        self.risk_effect = linear(CODE_WIDTH, head, use_bias=False)
        self.risk = linear(head, risks)
        self.risk_row = linear(ROW_WIDTH, risks, use_bias=False, zero=True)
        self.risk_code = linear(CODE_WIDTH, risks, use_bias=False, zero=True)
        self.risk.bias[...] = jnp.array([-4.0, -2.0, -1.0])  # rare, rarer first
        self.later_hidden = linear(hidden, head)
        self.later = linear(head, len(Continuation._fields))
        self.later_row = linear(ROW_WIDTH, len(Continuation._fields), zero=True)
        self.dropout = nnx.Dropout(dropout)

    def risks(
        self, h: jax.Array, inputs: jax.Array, residual: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:
        """[..., 3] logits of the competing risks, in the order of `RISKS`; see `predict`."""
        pre = jax.nn.relu(self.risk_hidden(h) + self.risk_effect(residual))
        if key is not None:
            pre = self.dropout(pre, deterministic=False, rngs=key)
        result: jax.Array = self.risk(pre) + self.risk_row(inputs) + self.risk_code(residual)
        return result

    def continuation(
        self, h: jax.Array, inputs: jax.Array, *, key: jax.Array | None = None
    ) -> Continuation:
        """What follows if the clinician treats from this row on."""
        pre = jax.nn.relu(self.later_hidden(h))
        if key is not None:
            pre = self.dropout(pre, deterministic=False, rngs=key)
        both = self.later(pre) + self.later_row(inputs)
        return Continuation(both[..., 0], both[..., 1])


def residual_code(propensity: jax.Array, action: jax.Array) -> jax.Array:
    """[..., 8] code of an action less its expectation under the propensity.

    No gradient flows into the propensity: it is fitted to the clinician alone.

    Args:
      propensity: [..., 25] logits.
      action: [...] int32 joint action.
    """
    expected = jax.nn.softmax(jax.lax.stop_gradient(propensity)) @ jnp.asarray(CODES)
    return code_of(action) - expected


def bounded(log_sigma: jax.Array) -> jax.Array:
    """Any real number to the range that sigma may have."""
    low, high = LOG_SIGMA_RANGE
    return low + (high - low) * jax.nn.sigmoid(log_sigma)
