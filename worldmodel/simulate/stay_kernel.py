"""The recurrent variant's rollout under plans as one Pallas kernel: all steps of some branches.

XLA makes kernels of every step's products and of what lies between them, and state and gates go
through the device's memory from one to the next. Here a block of branches is simulated over the
whole horizon by one kernel; its state, gates and hidden layers stay on the chip. Read from memory
are the weights, the noise and the treatments, written is what scores and summaries need of a step.

Branches lie along the last axis, features along the one before: 39 features fill 40 rows of a
register instead of 39 of 128 columns, and parts of a row are cut out at multiples of eight. Columns
are patients x samples; the grid's inner axis is that of the plans, which share noise, so that a
block of noise is read once for all of them.

Arithmetic is that of `worldmodel.simulate.stays.step_stay`; tested equal to it. Nothing here is
differentiable: summaries of rollouts have no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pl_tpu
from jax.experimental.pallas import triton as pl_triton

from worldmodel import schema
from worldmodel.models.gru import gated
from worldmodel.models.recurrent import (
    CODE_WIDTH,
    CODES,
    DECAYS,
    LARGEST,
    SUMS_WIDTH,
    TIME_UNIT,
    bounded,
    doses_of,
)
from worldmodel.models.recurrent_training import held_rows
from worldmodel.models.world_model import WorldModel
from worldmodel.resources import BFLOAT16
from worldmodel.simulate.stays import FOLLOW_CLINICIAN, StayKernel, StayState, outlive
from worldmodel.simulate.step import (
    WHOLE,
    logit_of_normal,
    mean_before_clipping,
    move_into_range,
    physiologic_range,
    whole_steps,
)

AUTOMATIC = ("tpu",)  # platforms where "auto" is "pallas"
_ON_CHIP = 12 * 2**20  # bytes of a TPU's vector memory for a block; the compiler needs some of 16
_FILLED = 1.1  # of columns in blocks, by those that are asked for: a block may do with so much
_FEATURES, _ACTIONS, _STATIC = schema.NUM_FEATURES, schema.NUM_ACTIONS, schema.NUM_STATIC
_FAR = 1e30  # of what is never reached: in rows that only fill up

# Parts of a row's inputs; of the third, ventilation, time and whether it is the first come first.
_INPUTS = (_FEATURES, _FEATURES, 3 + _STATIC, CODE_WIDTH, SUMS_WIDTH)
# Parts of the noise: values, measuring, and both ventilation and choice, the latter uniform.
_NOISE = (_FEATURES, _FEATURES, 2)


class Layout(NamedTuple):
    """How rows lie on a platform.

    Attributes:
      least: rows of the smallest part.
      triton: parts are powers of two, cannot be cut out of each other or joined, and have a product
        each; arrays of a block stay in the device's memory until they are read.
      blocks: branches of a block, largest first.
    """

    least: int
    triton: bool
    blocks: tuple[int, ...]

    def filled(self, size: int) -> int:
        """Rows that a part takes."""
        if self.triton:
            return max(1 << (size - 1).bit_length(), self.least)
        return -(-size // self.least) * self.least

    def parts(self, array: jax.Array, sizes: Sequence[int], axis: int) -> jax.Array:
        """An array whose parts along an axis are filled up, one by one."""
        cuts = np.cumsum(sizes)[:-1]
        found = [
            _fill(part, axis, self.filled(part.shape[axis]))
            for part in jnp.split(array, cuts, axis)
        ]
        return jnp.concatenate(found, axis)

    def pick(self, rows: jax.Array, index: int) -> jax.Array:
        """[1, B] a row of [., B]."""
        if not self.triton:
            return rows[index : index + 1]
        return jnp.where(_numbers(rows) == index, rows, 0.0).sum(0, keepdims=True)


# Registers of a TPU hold 8 rows of 128 branches; products of a GPU's tensor cores take 16.
LAYOUTS = {"tpu": Layout(8, False, (512, 256, 128)), "gpu": Layout(16, True, (32,))}
LAYOUTS |= {"cuda": LAYOUTS["gpu"], "cpu": LAYOUTS["tpu"]}


class Record(NamedTuple):
    """What a kernel writes of every step; leaves [H, K, ., N], columns are patients x samples."""

    obs: jax.Array  # 39 rows and some that fill up, z-scores
    scalars: jax.Array  # the rows of `Scalars`, and some that fill up


class Scalars(NamedTuple):
    """Results of a step of a branch, all float32."""

    ventilation: jax.Array  # probability
    ventilated: jax.Array
    projected: jax.Array  # entries moved into range
    action: jax.Array  # joint, with the clinician's choice filled in
    support: jax.Array  # probability of the action under the clinician
    death: jax.Array  # probability that the stay ends so in the step
    alive: jax.Array  # probability that it goes on


class _Weights(NamedTuple):
    """Matrices [outputs, inputs] and columns [outputs, 1], every part filled up."""

    row: jax.Array
    row_bias: jax.Array
    recurrent: jax.Array
    recurrent_bias: jax.Array
    hidden: jax.Array
    hidden_bias: jax.Array
    code: jax.Array
    heads: jax.Array
    heads_bias: jax.Array
    choice: jax.Array
    choice_bias: jax.Array
    risk: jax.Array
    risk_bias: jax.Array
    later_row: jax.Array
    later_hidden: jax.Array
    later_hidden_bias: jax.Array
    later: jax.Array
    later_bias: jax.Array
    noise: jax.Array
    given: jax.Array  # by action: its code, and what it adds to the sums of doses
    expected: jax.Array  # by action: its code
    up_to: jax.Array  # by action: 1 for those that are not after it
    decay: jax.Array  # of the sums
    fill: jax.Array
    low: jax.Array
    high: jax.Array
    mean: jax.Array
    std: jax.Array
    held: jax.Array


class _Start(NamedTuple):
    """State of the columns before the first step, [., N]."""

    hidden: jax.Array
    obs: jax.Array
    value: jax.Array
    age: jax.Array
    measured: jax.Array
    rest: jax.Array  # ventilated, step, 0, static features
    before: jax.Array
    sums: jax.Array


class _State(NamedTuple):
    """State of a block of branches between two steps, [., B]."""

    hidden: jax.Array
    obs: jax.Array
    value: jax.Array
    age: jax.Array
    measured: jax.Array  # float32
    ventilated: jax.Array  # float32
    before: jax.Array
    sums: jax.Array
    alive: jax.Array
    dead: jax.Array


def _fill(array: jax.Array, axis: int, size: int, value: float = 0.0) -> jax.Array:
    """An array whose axis is filled up to a size."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths, constant_values=value)


def block_size(columns: int, horizon: int, world_model: WorldModel, layout: Layout) -> int | None:
    """Branches of a kernel's block; None where none fits the chip or too few would fill one.

    Args:
      columns: patients x samples.
      horizon: steps H.
      world_model: whose widths are used.
      layout: of the platform.
    """
    config = world_model.config
    hidden, head = layout.filled(config.hidden), layout.filled(config.head)
    inputs = sum(map(layout.filled, _INPUTS))
    streamed = sum(map(layout.filled, (*_NOISE, _FEATURES, len(Scalars._fields)))) + 1
    # Gates and products of a step, and the state before and after it.
    held = 10 * hidden + 5 * head + 2 * inputs + 16 * layout.filled(_FEATURES)
    weights = (3 * hidden + head) * inputs + hidden * (5 * hidden + 3 * head + inputs)
    fitting = [
        size
        for size in layout.blocks
        if columns > size // 2
        and (
            layout.triton
            or 4 * (2 * horizon * streamed * size + held * size + 2 * weights) <= _ON_CHIP
        )
    ]
    full = (size for size in fitting if -(-columns // size) * size <= _FILLED * columns)
    return next(full, fitting[-1] if fitting else None)


def play_stays(
    world_model: WorldModel,
    kernel: StayKernel,
    start: StayState,
    static: jax.Array,
    step: jax.Array,
    actions: jax.Array,
    noise: Callable[[jax.Array], jax.Array],
    *,
    samples: int,
    block: int,
    platform: str,
) -> tuple[Record, jax.Array]:
    """Simulates P patients x K plans x S samples; columns are patients x samples, N = P S.

    Args:
      world_model: of ensemble size 1.
      kernel: its parameters, packed.
      start: state of the patients, leaves [P, ...].
      static: [P, 3] scaled.
      step: [P] int32, the row that is treated first.
      actions: [H, P, K] joint actions 0-24 or `FOLLOW_CLINICIAN`.
      noise: `h -> [P, K or 1, S, 80]` standard normals, as `step_stay` takes them.
      samples: S.
      block: from `block_size`.
      platform: one of `LAYOUTS`; on a CPU the kernel is interpreted, slowly.

    Returns:
      The record of every step, and [K, 2, N] the probability of death within 90 days and the
      rewards after the horizon where the clinician goes on.
    """
    layout, interpret = LAYOUTS[platform], platform == "cpu"
    horizon, patients, plans = actions.shape
    columns = patients * samples
    blocks = -(-columns // block)
    whole = blocks * block

    def spread(leaf: jax.Array) -> jax.Array:
        """[P, n] to [n, N], filled up."""
        leaf = layout.parts(jnp.asarray(leaf, jnp.float32), (leaf.shape[-1],), -1)
        return _fill(jnp.repeat(leaf, samples, axis=0).T, -1, whole)

    nothing = jnp.zeros(step.shape)
    rest = jnp.stack([jnp.asarray(start.ventilated, jnp.float32), step, nothing], axis=-1)
    begin = _Start(
        hidden=spread(start.hidden),
        obs=spread(start.obs),
        value=spread(start.value),
        age=spread(start.age),
        measured=spread(start.measured),
        rest=spread(jnp.concatenate([rest, static], axis=-1)),
        before=spread(start.before),
        sums=spread(start.sums),
    )

    @jax.named_scope("sampling")
    def drawn(h: jax.Array) -> jax.Array:
        normal = noise(h)
        normal = normal.at[..., -1].set(jax.scipy.special.ndtr(normal[..., -1]))
        normal = layout.parts(normal, _NOISE, -1)  # [P, K or 1, S, n]
        normal = normal.transpose(1, 3, 0, 2).reshape(normal.shape[1], -1, columns)
        return _fill(normal, -1, whole)

    given = jnp.repeat(actions.transpose(2, 0, 1), samples, axis=-1)  # [K, H, N]
    normals = jax.lax.map(drawn, jnp.arange(horizon))  # [H, K or 1, n, N]
    own = normals.shape[1] > 1
    weights = _pack(world_model, kernel, layout)

    def constant(leaf: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(leaf.shape, lambda n, k: (0,) * leaf.ndim)

    def streamed(rows: int, by_plan: bool) -> pl.BlockSpec:
        return pl.BlockSpec(
            (horizon, None, rows, block), lambda n, k: (0, k if by_plan else 0, 0, n)
        )

    cost = _cost(weights, horizon * plans * whole, layout)
    recorded = (layout.filled(_FEATURES), layout.filled(len(Scalars._fields)))
    record, ends = pl.pallas_call(
        partial(_kernel, layout, world_model.stay_steps, kernel.precision, horizon, interpret),
        grid=(blocks, plans),
        in_specs=[
            jax.tree.map(constant, weights),
            jax.tree.map(lambda leaf: pl.BlockSpec((leaf.shape[0], block), lambda n, k: (0, n)),
                         begin),
            pl.BlockSpec((None, horizon, block), lambda n, k: (k, 0, n)),
            streamed(normals.shape[2], own),
        ],
        out_specs=[
            [streamed(rows, True) for rows in recorded],
            pl.BlockSpec((None, layout.filled(2), block), lambda n, k: (k, 0, n)),
        ],
        out_shape=[
            [jax.ShapeDtypeStruct((horizon, plans, rows, whole), jnp.float32) for rows in recorded],
            jax.ShapeDtypeStruct((plans, layout.filled(2), whole), jnp.float32),
        ],
        cost_estimate=cost,
        # Triton's kernels do not keep their estimate.
        metadata={"flops": str(cost.flops)} if layout.triton else None,
        compiler_params=_compiler_params(layout),
        interpret=interpret,
        name="stays",
    )(weights, begin, _fill(given, -1, whole), normals)  # fmt: skip
    return Record(*record), ends[:, :2, :columns]


def _compiler_params(layout: Layout) -> pl_triton.CompilerParams | pl_tpu.CompilerParams:
    if layout.triton:
        # Eight warps have all registers of a multiprocessor.
        return pl_triton.CompilerParams(num_warps=8, num_stages=1)
    return pl_tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))


def _cost(weights: _Weights, steps: int, layout: Layout) -> pl.CostEstimate:
    """What so many branch-steps take, those that fill up a block among them."""
    once = (weights.later_row, weights.later_hidden, weights.later)  # per branch, not per step
    matrices = [leaf for leaf in weights if leaf.shape[1] > 1]
    multiplied = sum(leaf.size for leaf in matrices) - sum(leaf.size for leaf in once)
    hidden, features = weights.recurrent.shape[1], layout.filled(_FEATURES)
    return pl.CostEstimate(
        flops=2 * multiplied * steps,
        transcendentals=(3 * hidden + 3 * features + layout.filled(_ACTIONS)) * steps,
        bytes_accessed=4 * steps * sum(map(layout.filled, (_FEATURES, len(Scalars._fields)))),
    )


def _pack(world_model: WorldModel, kernel: StayKernel, layout: Layout) -> _Weights:
    """The weights as the kernel reads them."""
    width, small = kernel.width, kernel.head
    gates, linear = (width,) * 3, (_FEATURES, _FEATURES, 3)
    operand = jnp.bfloat16 if kernel.precision == BFLOAT16 else jnp.float32

    def matrix(weight: jax.Array, inputs: Sequence[int], outputs: Sequence[int]) -> jax.Array:
        return layout.parts(layout.parts(weight, inputs, 0), outputs, 1).T.astype(operand)

    def exact(weight: jax.Array, outputs: Sequence[int]) -> jax.Array:
        """A matrix that is not rounded."""
        return layout.parts(layout.parts(weight, weight.shape[:1], 0), outputs, 1).T

    def column(values: jax.Array, sizes: Sequence[int]) -> jax.Array:
        return layout.parts(values, sizes, 0)[:, None]

    def feature(values: jax.Array, filling: float = 0.0) -> jax.Array:
        return _fill(values, 0, layout.filled(_FEATURES), filling)[:, None]

    low, high = physiologic_range(world_model.scaler)
    doses, decays = doses_of(world_model.dose_edges), jnp.array(DECAYS, jnp.float32)
    added = jnp.concatenate([(1.0 - decay) * doses for decay in DECAYS], axis=1)
    # Choices that only fill up are never taken.
    choices = _fill(kernel.choice_bias, 0, layout.filled(_ACTIONS), -_FAR)
    return _Weights(
        row=matrix(kernel.row, _INPUTS, (*gates, small, *linear)),
        row_bias=column(kernel.row_bias, (*gates, small, *linear)),
        recurrent=matrix(kernel.recurrent, (width,), gates),
        recurrent_bias=column(kernel.recurrent_bias, gates),
        hidden=matrix(kernel.hidden, (width,), (small, width, small)),
        hidden_bias=column(kernel.hidden_bias, (small, width, small)),
        code=matrix(kernel.code, (CODE_WIDTH,), (width, small, _FEATURES, 3)),
        heads=matrix(kernel.heads, (width,), (*(_FEATURES,) * 3, 1)),
        heads_bias=column(kernel.heads_bias, (*(_FEATURES,) * 3, 1)),
        choice=matrix(kernel.choice, (small,), (_ACTIONS,)),
        choice_bias=choices[:, None],
        risk=matrix(kernel.risk, (small,), (3,)),
        risk_bias=column(kernel.risk_bias, (3,)),
        later_row=matrix(kernel.later_row, _INPUTS, (2,)),
        later_hidden=matrix(kernel.later_hidden, (width,), (small,)),
        later_hidden_bias=column(kernel.later_hidden_bias, (small,)),
        later=matrix(kernel.later, (small,), (2,)),
        later_bias=column(kernel.later_bias, (2,)),
        noise=exact(kernel.noise, (_FEATURES,)),
        given=exact(jnp.concatenate([jnp.asarray(CODES), added], axis=1), (CODE_WIDTH, SUMS_WIDTH)),
        expected=exact(jnp.asarray(CODES), (CODE_WIDTH,)),
        up_to=jnp.tril(jnp.ones((layout.filled(_ACTIONS),) * 2)),
        decay=column(jnp.repeat(decays, SUMS_WIDTH // len(DECAYS)), (SUMS_WIDTH,)),
        fill=feature(kernel.fill),
        low=feature(low, -_FAR),
        high=feature(high, _FAR),
        mean=feature(world_model.scaler.mean),
        std=feature(world_model.scaler.std, 1.0),
        held=feature(jnp.asarray(held_rows(world_model.step_hours))),
    )


def _kernel(
    layout: Layout,
    stay_steps: int,
    precision: str,
    horizon: int,
    interpret: bool,
    weights: _Weights,
    begin: _Start,
    actions: jax.Ref,
    noise: jax.Ref,
    record: Sequence[jax.Ref],
    ends: jax.Ref,
) -> None:
    """All steps of a block; weights and what comes after them are references."""
    obs, scalars = record
    first = jax.tree.map(lambda ref: ref[...], begin)
    ventilated, started = layout.pick(first.rest, 0), layout.pick(first.rest, 1)
    one = jnp.ones_like(started)
    state = _State(
        hidden=first.hidden,
        obs=first.obs,
        value=first.value,
        age=first.age,
        measured=first.measured,
        ventilated=ventilated,
        before=first.before,
        sums=first.sums,
        alive=one,
        dead=0.0 * one,
    )
    model = _Model(layout, weights, stay_steps, precision, interpret)

    def step(h: jax.Array, state: _State) -> _State:
        inputs = model.inputs(state, first.rest, started + h)
        after, found = model.step(
            state, inputs, started + h, actions[pl.ds(h, 1), :], lambda rows: noise[h, rows, :]
        )
        obs[h] = after.obs
        scalars[h] = _stacked(found, scalars.shape[1])
        return after

    state = jax.lax.fori_loop(0, horizon, step, state)
    follows = model.continuation(state, model.inputs(state, first.rest, started + horizon))
    mortality = state.dead + state.alive * jax.nn.sigmoid(follows[0])
    ends[...] = _stacked((mortality, state.alive * follows[1]), ends.shape[0])


class _Model(NamedTuple):
    """A step of a block of branches, as `worldmodel.simulate.stays` has it for rows of features."""

    layout: Layout
    weights: _Weights  # references
    stay_steps: int
    precision: str
    interpret: bool

    def product(
        self, name: str, inputs: Sequence[jax.Array], sizes: Sequence[int], *, exact: bool = False
    ) -> list[jax.Array]:
        """Weights times an input in parts, with the bias where there is one.

        Args:
          name: of the weights.
          inputs: [., B] in the order of the columns.
          sizes: rows of the parts of the result.
          exact: nothing is rounded.
        """
        weight = getattr(self.weights, name)
        bias = getattr(self.weights, f"{name}_bias", None)

        def times(weight: jax.Array, operand: jax.Array) -> jax.Array:
            operand = operand.astype(weight.dtype)
            if exact:
                return jnp.dot(weight, operand, precision="highest")
            # Mosaic knows no "high", which is rounded less here.
            precision = "default" if self.precision in (BFLOAT16, "default") else "highest"
            if self.interpret:  # of rounded operands; CPUs lack such products of some shapes
                weight, operand = weight.astype(jnp.float32), operand.astype(jnp.float32)
            return jnp.dot(weight, operand, precision=precision, preferred_element_type=jnp.float32)

        rows = _places(sizes)
        if not self.layout.triton:
            whole = times(weight[...], inputs[0] if len(inputs) == 1 else jnp.concatenate(inputs))
            if bias is not None:
                whole += bias[...]
            return [whole[place] for place in rows]
        columns = _places([part.shape[0] for part in inputs])

        def whole_part(row: slice) -> jax.Array:
            products = [
                times(weight[row, at], part) for at, part in zip(columns, inputs, strict=True)
            ]
            total = sum(products[1:], products[0])
            return total if bias is None else total + bias[row, :]

        return [whole_part(row) for row in rows]

    def inputs(self, state: _State, rest: jax.Array, step: jax.Array) -> tuple[jax.Array, ...]:
        """The parts of the inputs of the row that branches are in."""
        rows = _numbers(rest)
        rest = jnp.where(rows == 0, state.ventilated, rest)
        rest = jnp.where(rows == 1, step / TIME_UNIT, rest)
        rest = jnp.where(rows == 2, (step == 0).astype(jnp.float32), rest)
        obs = jnp.clip(state.obs, -LARGEST, LARGEST)
        return obs, state.measured, rest, state.before, state.sums

    def advance(
        self, state: _State, inputs: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The hidden state after a row, and what else is linear in it."""
        gates, small = (state.hidden.shape[0],) * 3, self.weights.choice.shape[1]
        features = (state.obs.shape[0],) * 2
        read = self.product("row", inputs, (*gates, small, *features, self.layout.filled(3)))
        recurrent = self.product("recurrent", (state.hidden,), gates)
        return gated(read[:3], recurrent, state.hidden), read[3:]

    def step(
        self,
        state: _State,
        inputs: tuple[jax.Array, ...],
        step: jax.Array,
        action: jax.Array,
        noise: Callable[[slice], jax.Array],
    ) -> tuple[_State, Scalars]:
        """The branches after a step, and its results; `noise` reads rows."""
        weights, filled, pick = self.weights, self.layout.filled, self.layout.pick
        features, one, three = filled(_FEATURES), filled(1), filled(3)
        hidden, (by_row, mu_row, measured_row, risk_row) = self.advance(state, inputs)
        small, width = by_row.shape[0], hidden.shape[0]
        choice, trunk, risk = self.product("hidden", (hidden,), (small, width, small))

        actions = (filled(_ACTIONS),)
        (logits,) = self.product("choice", (jax.nn.relu(choice + by_row),), actions)
        propensity = jax.nn.softmax(logits, axis=0)
        chances = noise(slice(2 * features, 2 * features + filled(2)))
        (up_to,) = self.product("up_to", (propensity,), actions, exact=True)
        below = (up_to < pick(chances, 1)).astype(jnp.int32).sum(0, keepdims=True)
        drawn_action = jnp.minimum(below, _ACTIONS - 1)
        action = jnp.where(action == FOLLOW_CLINICIAN, drawn_action, action)
        chosen = (_numbers(propensity) == action).astype(jnp.float32)
        support = (propensity * chosen).sum(0, keepdims=True)
        codes, sums = filled(CODE_WIDTH), filled(SUMS_WIDTH)
        code, added = self.product("given", (chosen,), (codes, sums), exact=True)
        (expected,) = self.product("expected", (propensity,), (codes,), exact=True)

        effect, risk_effect, mu_effect, risk_code = self.product(
            "code", (code - expected,), (width, small, features, three)
        )
        mu, log_sigma, measured_logit, vent_logit = self.product(
            "heads", (jax.nn.relu(trunk + effect),), (features, features, features, one)
        )
        mu = state.obs + mu_row + mu_effect + mu
        measured_logit, vent_logit = measured_logit + measured_row, pick(vent_logit, 0)
        (risks,) = self.product("risk", (jax.nn.relu(risk + risk_effect),), (three,))
        risks += risk_row + risk_code

        low, high, mean, std = (
            leaf[...] for leaf in (weights.low, weights.high, weights.mean, weights.std)
        )
        (values,) = self.product("noise", (noise(slice(0, features)),), (features,), exact=True)
        sigma = jnp.exp(bounded(log_sigma))
        middle = mean_before_clipping(mu, sigma, low, high)
        number = _numbers(mu)
        whole = whole_steps(mu, middle, sigma, values, std, mean)
        is_whole = (number >= WHOLE.start) & (number < WHOLE.stop)
        drawn = jnp.where(is_whole, whole, middle + sigma * values)
        row = move_into_range(drawn, low, high, mean, std, number, pick)
        moved = (row != drawn).astype(jnp.float32).sum(0, keepdims=True)
        measured = logit_of_normal(noise(slice(features, 2 * features))) < measured_logit
        ventilated = (logit_of_normal(pick(chances, 0)) < vent_logit).astype(jnp.float32)
        value = jnp.where(measured, row, state.value)
        age = jnp.where(measured, 0.0, state.age + 1.0)

        death, discharge, later = (jax.nn.sigmoid(pick(risks, index)) for index in range(3))
        if self.stay_steps:
            discharge = jnp.where(step >= self.stay_steps - 1, 1.0, discharge)
        alive, dead = outlive(state.alive, state.dead, death, discharge, later)
        after = _State(
            hidden=hidden,
            obs=jnp.where(age <= weights.held[...], value, weights.fill[...]),
            value=value,
            age=age,
            measured=measured.astype(jnp.float32),
            ventilated=ventilated,
            before=code,
            sums=weights.decay[...] * state.sums + added,
            alive=alive,
            dead=dead,
        )
        return after, Scalars(
            ventilation=jax.nn.sigmoid(vent_logit),
            ventilated=ventilated,
            projected=moved,
            action=action.astype(jnp.float32),
            support=support,
            death=state.alive * death,
            alive=alive,
        )

    def continuation(
        self, state: _State, inputs: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Logit of death within 90 days and later rewards, if the clinician goes on."""
        hidden, _ = self.advance(state, inputs)
        small, two = self.weights.choice.shape[1], self.layout.filled(2)
        (pre,) = self.product("later_hidden", (hidden,), (small,))
        (both,) = self.product("later", (jax.nn.relu(pre),), (two,))
        (linear,) = self.product("later_row", inputs, (two,))
        return self.layout.pick(both + linear, 0), self.layout.pick(both + linear, 1)


def _places(sizes: Sequence[int]) -> list[slice]:
    """Where parts of these sizes lie."""
    return [
        slice(int(end) - size, int(end)) for end, size in zip(np.cumsum(sizes), sizes, strict=True)
    ]


def _numbers(rows: jax.Array) -> jax.Array:
    """Number of each row, of the shape of `rows`."""
    return jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)


def _stacked(rows: Sequence[jax.Array], count: int) -> jax.Array:
    """[count, B] rows [1, B] below each other, the last one repeated."""
    found = jnp.broadcast_to(rows[-1], (count, rows[-1].shape[1]))
    number = _numbers(found)
    for index, row in enumerate(rows[:-1]):
        found = jnp.where(number == index, row, found)
    return found
