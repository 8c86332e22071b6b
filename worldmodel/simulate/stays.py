"""The recurrent variant in closed loops: one hidden state per branch, stays that end.

`step_stay` is one step of a branch, `step_history` one of a patient in searches and environments.
A simulated row is made as a recorded one is: values that are measured next are drawn, the others
are held for their hold time and then filled (`worldmodel.imputation`).

Branches do not draw whether the stay ends: they carry the probability `alive` that it still goes
on, which has less variance. Values in a row are those of a patient who is still there.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import schema, struct
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import PRECISIONS
from worldmodel.models.gru import gates
from worldmodel.models.recurrent import (
    CODES,
    DRAWN_WIDTH,
    CompetingRisks,
    Continuation,
    RecurrentStateModel,
    RowPrediction,
    StayRow,
    add_doses,
    bounded,
    code_of,
    doses_of,
    drawn_inputs,
    known_inputs,
)
from worldmodel.models.recurrent_training import held_rows
from worldmodel.models.world_model import WorldModel
from worldmodel.resources import BFLOAT16
from worldmodel.simulate.history import History, StayMemory
from worldmodel.simulate.step import (
    WHOLE,
    NextRow,
    draw_whole,
    in_whole_steps,
    logit_of_normal,
    mean_before_projection,
    project,
)

FOLLOW_CLINICIAN = -1  # in a plan: what the clinician would give, as the model knows them
_FEATURES = schema.NUM_FEATURES


class StayState(NamedTuple):
    """State of branches before a treatment; leading axes of any shape."""

    hidden: jax.Array  # [..., H] after the rows before the newest
    obs: jax.Array  # [..., 39] the newest row, z-scores
    value: jax.Array  # [..., 39]
    age: jax.Array  # [..., 39]
    measured: jax.Array  # [..., 39] bool
    ventilated: jax.Array  # [...] bool
    before: jax.Array  # [..., 8]
    sums: jax.Array  # [..., 30]
    alive: jax.Array  # [...] probability that the stay has not ended
    dead: jax.Array  # [...] probability that it has ended in death within 90 days


class StayStep(NamedTuple):
    """Result of a step; leading axes of any shape."""

    row: NextRow
    action: jax.Array  # [...] int32, with the clinician's choice filled in
    support: jax.Array  # [...] probability of the action under the clinician
    risks: jax.Array  # [..., 3] death, discharge, later death; each given no earlier one
    prediction: RowPrediction


@struct.dataclass
class StayKernel:
    """Parameters of one member, arranged so that products with one left operand are one product.

    Columns of `row`: gates, then the hidden layer of the choice, then what is linear in the row;
    of `hidden`: choice, trunk, risks. The continuation is read at the end alone.
    """

    row: jax.Array  # [F, ...]
    row_bias: jax.Array
    recurrent: jax.Array  # [H, 3 H]
    recurrent_bias: jax.Array
    hidden: jax.Array  # [H, ...]
    hidden_bias: jax.Array
    code: jax.Array  # [8, ...] trunk, risks' hidden layer, mu, risks
    heads: jax.Array  # [H, 118] mu, log sigma, measured, ventilation
    heads_bias: jax.Array
    choice: jax.Array  # [C, 25]
    choice_bias: jax.Array
    risk: jax.Array  # [C, 3]
    risk_bias: jax.Array
    later_row: jax.Array  # [F, 2] what is linear in the row
    later_hidden: jax.Array  # [H, C]
    later_hidden_bias: jax.Array
    later: jax.Array  # [C, 2]
    later_bias: jax.Array
    fill: jax.Array  # [39]
    noise: jax.Array  # [39, 39] transposed Cholesky factor
    precision: str = struct.field(pytree_node=False)

    @property
    def width(self) -> int:
        """Hidden width H."""
        result: int = self.recurrent.shape[0]
        return result

    @property
    def head(self) -> int:
        """Width C of the small hidden layers."""
        result: int = self.risk.shape[0]
        return result


def pack_stays(world_model: WorldModel, precision: str | None = None) -> StayKernel:
    """The kernel of a world model of one member.

    Args:
      world_model: recurrent, of ensemble size 1.
      precision: of products; None for the model's own.

    Raises:
      InputError: an unknown precision.
    """
    precision = precision or world_model.config.precision
    if precision not in (*PRECISIONS, BFLOAT16):
        raise InputError(f"precision: got {precision!r}, expected one of {(*PRECISIONS, BFLOAT16)}")
    state: RecurrentStateModel
    risks: CompetingRisks
    state, risks = jax.tree.map(lambda leaf: leaf[0], world_model.stay_models())
    width = state.hidden

    choice = state.choice_hidden
    row = [state.cell.weight_input[...], choice.kernel[...][width:]]
    row += [layer.kernel[...] for layer in (state.mu_row, state.measured_row, risks.risk_row)]
    bias = [state.cell.bias_input[...], choice.bias[...]]
    bias += [state.mu_row.bias[...], state.measured_row.bias[...], jnp.zeros(3)]
    hidden = [choice.kernel[...][:width], state.trunk.kernel[...], risks.risk_hidden.kernel[...]]
    hidden_bias = [jnp.zeros(risks.risk_hidden.bias.shape), state.trunk.bias[...]]
    hidden_bias += [risks.risk_hidden.bias[...]]
    heads = (state.mu, state.log_sigma, state.measured, state.vent)
    code = (state.effect, risks.risk_effect, state.mu_effect, risks.risk_code)
    return StayKernel(
        row=jnp.concatenate(row, axis=1),
        row_bias=jnp.concatenate(bias),
        recurrent=state.cell.weight_hidden[...],
        recurrent_bias=state.cell.bias_hidden[...],
        hidden=jnp.concatenate(hidden, axis=1),
        hidden_bias=jnp.concatenate(hidden_bias),
        code=jnp.concatenate([layer.kernel[...] for layer in code], axis=1),
        heads=jnp.concatenate([layer.kernel[...] for layer in heads], axis=1),
        heads_bias=jnp.concatenate([layer.bias[...] for layer in heads]),
        choice=state.choice.kernel[...],
        choice_bias=state.choice.bias[...],
        risk=risks.risk.kernel[...],
        risk_bias=risks.risk.bias[...],
        later_row=risks.later_row.kernel[...],
        later_hidden=risks.later_hidden.kernel[...],
        later_hidden_bias=risks.later_hidden.bias[...],
        later=risks.later.kernel[...],
        later_bias=risks.later.bias[...] + risks.later_row.bias[...],
        fill=state.fill[...],
        noise=state.noise_factor[...].T,
        precision=precision,
    )


def _dot(kernel: StayKernel, x: jax.Array, weight: jax.Array) -> jax.Array:
    if kernel.precision == BFLOAT16:
        return jnp.matmul(
            x.astype(jnp.bfloat16),
            weight.astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )
    return jnp.matmul(x, weight, precision=kernel.precision)


class _Read(NamedTuple):
    """What is computed of a row before its treatment is known."""

    hidden: jax.Array  # [..., H] after the row
    trunk: jax.Array  # [..., H]
    choice: jax.Array  # [..., C]
    risk: jax.Array  # [..., C]
    mu_row: jax.Array  # [..., 39]
    measured_row: jax.Array  # [..., 39]
    risk_row: jax.Array  # [..., 3]


@jax.named_scope("recurrence")
def _read(kernel: StayKernel, before: jax.Array, row: StayRow) -> _Read:
    """Reads a row [...] after the hidden state `before` [..., H]."""
    width, small = kernel.width, kernel.head
    read = _read_row(kernel, row, kernel.row, kernel.row_bias)
    hidden = _advance(kernel, before, read[..., : 3 * width])
    both = _dot(kernel, hidden, kernel.hidden) + kernel.hidden_bias
    choice, trunk, risk = jnp.split(both, np.cumsum([small, width]), axis=-1)
    by_row, *linear = jnp.split(
        read[..., 3 * width :], np.cumsum([small, _FEATURES, _FEATURES]), axis=-1
    )
    return _Read(hidden, trunk, choice + by_row, risk, *linear)


def _read_row(kernel: StayKernel, row: StayRow, weights: jax.Array, bias: jax.Array) -> jax.Array:
    """[..., X] linear functions of a row: weights [F, X] and bias [X]."""
    # Branches under one plan share what is known of their treatments: a product of fewer rows.
    known = _dot(kernel, known_inputs(row), weights[DRAWN_WIDTH:]) + bias
    return _dot(kernel, drawn_inputs(row), weights[:DRAWN_WIDTH]) + known


def _advance(kernel: StayKernel, before: jax.Array, read: jax.Array) -> jax.Array:
    """[..., H] hidden state after a row, of which [..., 3 H] was read for the gates."""
    recurrent = _dot(kernel, before, kernel.recurrent) + kernel.recurrent_bias
    with jax.named_scope("gates"):
        return gates(read, recurrent, before)


def _propensity(kernel: StayKernel, read: _Read) -> jax.Array:
    """[..., 25] probabilities of the clinician's choice."""
    logits = _dot(kernel, jax.nn.relu(read.choice), kernel.choice) + kernel.choice_bias
    return jax.nn.softmax(logits)


@jax.named_scope("heads")
def _predict(
    kernel: StayKernel, read: _Read, obs: jax.Array, residual: jax.Array
) -> tuple[RowPrediction, jax.Array]:
    """The next row and the logits [..., 3] of the risks under a treatment's residual code."""
    width, small = kernel.width, kernel.head
    by_code = _dot(kernel, residual, kernel.code)
    effect, risk_effect, mu_effect, risk_code = jnp.split(
        by_code, np.cumsum([width, small, _FEATURES]), axis=-1
    )
    pre = jax.nn.relu(read.trunk + effect)
    out = _dot(kernel, pre, kernel.heads) + kernel.heads_bias
    mu, log_sigma, measured, vent = jnp.split(out, _FEATURES * np.arange(1, 4), axis=-1)
    prediction = RowPrediction(
        mu=obs + read.mu_row + mu_effect + mu,
        log_sigma=bounded(log_sigma),
        vent_logit=vent[..., 0],
        measured_logit=measured + read.measured_row,
    )
    hidden = jax.nn.relu(read.risk + risk_effect)
    risks = _dot(kernel, hidden, kernel.risk) + kernel.risk_bias + read.risk_row + risk_code
    return prediction, risks


def encode_past(kernel: StayKernel, memory: StayMemory) -> jax.Array:
    """[B, H] the hidden state after the rows before the newest."""
    width = 3 * kernel.width

    @jax.named_scope("recurrence")
    def step(h: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        inputs, valid = row
        read = _dot(kernel, inputs, kernel.row[:, :width]) + kernel.row_bias[:width]
        return jnp.where(valid[:, None], _advance(kernel, h, read), h), None

    start = jnp.zeros((memory.inputs.shape[0], kernel.width))
    rows = (jnp.moveaxis(memory.inputs, 1, 0), memory.valid.T)
    hidden, _ = jax.lax.scan(step, start, rows)
    return hidden


def start_state(history: History, hidden: jax.Array) -> StayState:
    """The state of B stays that are about to be treated.

    Args:
      history: of a recurrent world model.
      hidden: [B, H] from `encode_past`, or from the step before.

    Raises:
      InputError: the history was made for another world model.
    """
    memory = memory_of(history)
    one = jnp.ones(history.step.shape)
    return StayState(
        hidden=hidden,
        obs=history.obs[:, -1],
        value=memory.value,
        age=memory.age,
        measured=memory.measured,
        ventilated=history.ventilated,
        before=memory.before,
        sums=memory.sums,
        alive=one,
        dead=0.0 * one,
    )


def memory_of(history: History) -> StayMemory:
    """The memory of a history.

    Raises:
      InputError: it has none, as it was made for a model that reads windows.
    """
    if history.memory is None:
        raise InputError("history: made for another world model; make it with start_history")
    return history.memory


def step_stay(
    world_model: WorldModel,
    kernel: StayKernel,
    state: StayState,
    static: jax.Array,
    step: jax.Array,
    action: jax.Array,
    noise: jax.Array,
    *,
    follow: bool = True,
) -> tuple[StayState, StayStep]:
    """One step of branches; leading axes broadcast.

    Args:
      world_model: of ensemble size 1.
      kernel: its parameters, packed.
      state: of the branches.
      static: [..., 3] scaled.
      step: [...] int32, the row that is treated.
      action: [...] joint action 0-24, or `FOLLOW_CLINICIAN`.
      noise: [..., 80] standard normals: values, measuring, ventilation, choice.
      follow: whether an action may be `FOLLOW_CLINICIAN`.
    """
    read = _read(kernel, state.hidden, _row(state, static, step))
    propensity = _propensity(kernel, read)
    if follow:
        action = _choose(propensity, action, noise[..., -1])
    chosen = jax.nn.one_hot(action, schema.NUM_ACTIONS)
    support = (propensity * chosen).sum(-1)
    code, scaler = code_of(action), world_model.scaler
    residual = code - jnp.matmul(propensity, jnp.asarray(CODES), precision="highest")
    prediction, risk_logits = _predict(kernel, read, state.obs, residual)
    with jax.named_scope("sampling"):
        values = _correlated(kernel, noise[..., :_FEATURES])
        sigma = jnp.exp(prediction.log_sigma)
        mean = mean_before_projection(prediction.mu, sigma, scaler)
        whole = draw_whole(prediction.mu, mean, sigma, values, scaler)
        drawn = (mean + sigma * values).at[..., WHOLE].set(whole)
        drawn, moved = project(drawn, scaler)
        # A uniform number is below sigmoid(logit) where its own logit is below `logit`.
        chance = logit_of_normal(noise[..., _FEATURES:-1])
        measured = chance[..., :_FEATURES] < prediction.measured_logit
        ventilated = chance[..., _FEATURES] < prediction.vent_logit
        value = jnp.where(measured, drawn, state.value)
        age = jnp.where(measured, 0.0, state.age + 1.0)
        held = age <= jnp.asarray(held_rows(world_model.step_hours))
        obs = jnp.where(held, value, kernel.fill)
    risks = jax.nn.sigmoid(risk_logits)
    if world_model.stay_steps:
        ends = (step >= world_model.stay_steps - 1)[..., None] & (np.arange(3) == 1)
        risks = jnp.where(ends, 1.0, risks)
    alive, dead = outlive(state.alive, state.dead, risks[..., 0], risks[..., 1], risks[..., 2])
    after = StayState(
        hidden=read.hidden,
        obs=obs,
        value=value,
        age=age,
        measured=measured,
        ventilated=ventilated,
        before=code,
        sums=add_doses(state.sums, jnp.asarray(doses_of(world_model.dose_edges))[action]),
        alive=alive,
        dead=dead,
    )
    next_row = NextRow(
        obs=obs,
        dynamic=in_whole_steps(scaler.denormalize(obs)),
        ventilation=jax.nn.sigmoid(prediction.vent_logit),
        projected=moved,
    )
    return after, StayStep(next_row, action, support, risks, prediction)


def outlive(
    alive: jax.Array, dead: jax.Array, death: jax.Array, discharge: jax.Array, later: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`StayState.alive` and `dead` after a step with these risks; arrays of any one shape."""
    leaves = (1.0 - death) * discharge
    return (
        alive * (1.0 - death) * (1.0 - discharge),
        dead + alive * (death + leaves * later),
    )


def continuation_at(
    kernel: StayKernel, state: StayState, static: jax.Array, step: jax.Array
) -> Continuation:
    """What follows if the clinician treats from the newest row on; arguments as `step_stay`."""
    row, width = _row(state, static, step), 3 * kernel.width
    with jax.named_scope("recurrence"):
        read = _read_row(kernel, row, kernel.row[:, :width], kernel.row_bias[:width])
        hidden = _advance(kernel, state.hidden, read)
    linear = _read_row(kernel, row, kernel.later_row, kernel.later_bias)
    pre = jax.nn.relu(_dot(kernel, hidden, kernel.later_hidden) + kernel.later_hidden_bias)
    both = _dot(kernel, pre, kernel.later) + linear
    return Continuation(both[..., 0], both[..., 1])


def _row(state: StayState, static: jax.Array, step: jax.Array) -> StayRow:
    """The row that branches are in."""
    return StayRow(
        obs=state.obs,
        measured=state.measured,
        ventilated=state.ventilated,
        step=step,
        static=static,
        before=state.before,
        sums=state.sums,
    )


def _choose(propensity: jax.Array, action: jax.Array, normal: jax.Array) -> jax.Array:
    """The actions, with the clinician's choice where they are `FOLLOW_CLINICIAN`."""
    below = (jnp.cumsum(propensity, axis=-1) < jax.scipy.special.ndtr(normal)[..., None]).sum(-1)
    drawn = jnp.minimum(below, schema.NUM_ACTIONS - 1)
    return jnp.where(action == FOLLOW_CLINICIAN, drawn, action).astype(jnp.int32)


def _correlated(kernel: StayKernel, normal: jax.Array) -> jax.Array:
    return jnp.matmul(normal, kernel.noise, precision="highest")
