"""Branches of one member from the first treatment to the last row, and steps of histories.

`unroll_branches` is of every variant: `unroll` for models that read windows, and the loop over
`step_stay` for the recurrent one. What branches share is computed once there, too: before the first
treatment all leaves have the axes [P, 1, 1]. Environments and searches need single steps of
histories: `step_history`, `append_row`, `predict_next`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.models.world_model import Models, WorldModel
from worldmodel.resources import BFLOAT16
from worldmodel.simulate.history import History
from worldmodel.simulate.randomness import scan_some
from worldmodel.simulate.stay_kernel import (
    AUTOMATIC,
    LAYOUTS,
    Record,
    Scalars,
    block_size,
    play_stays,
)
from worldmodel.simulate.stays import (
    StayKernel,
    StayState,
    StayStep,
    continuation_at,
    encode_past,
    memory_of,
    pack_stays,
    start_state,
    step_stay,
)
from worldmodel.simulate.step import NextRow, StepOutputs, in_whole_steps, score_moved
from worldmodel.simulate.unroll import (
    RolloutResult,
    RolloutSpec,
    Shape,
    Step,
    StepState,
    Tree,
    append_step,
    mark_invalid,
    score_state,
    spread_state,
    stack_steps,
    start_branches,
    unroll,
)


class _ScanCarry(NamedTuple):
    stay: StayState
    now: StepState
    folded: Tree


def unroll_branches(world_model: WorldModel, start: History, spec: RolloutSpec) -> RolloutResult:
    """Simulates a block of branches in a world model of one member; works on traced values.

    Args:
      world_model: of ensemble size 1, of any variant.
      start: P patients, about to be treated.
      spec: of the rollout.

    Raises:
      InputError: the recurrent variant in reference mode, which is a protocol of windows, or a
        Pallas kernel that does not fit.
    """
    if not world_model.is_recurrent:
        if spec.config.kernel == "pallas":
            raise InputError("kernel: pallas simulates the recurrent variant; use auto or xla")
        return unroll(world_model, start, spec)
    if spec.config.mode == "reference":
        raise InputError("mode: the recurrent variant has no reference mode; use corrected")
    kernel = pack_stays(world_model, spec.config.precision)
    recorded = start_state(start, encode_past(kernel, memory_of(start)))
    platform = spec.platform or jax.default_backend()
    size = _block(world_model, spec, platform)
    if size is None:
        return _unroll_stepwise(world_model, start, spec, kernel, recorded)
    return _unroll_recorded(world_model, start, spec, kernel, recorded, size, platform)


def _block(world_model: WorldModel, spec: RolloutSpec, platform: str) -> int | None:
    """Branches of the Pallas kernel's blocks; None where XLA makes the kernels.

    Raises:
      InputError: the Pallas kernel is asked for where there is none, or does not fit.
    """
    kernel = spec.config.kernel
    # A policy reads the state of a step, which the Pallas kernel keeps to itself.
    if kernel == "xla" or spec.looks_back or spec.steps is not None:
        return None
    if kernel == "auto" and platform not in AUTOMATIC:
        return None
    if platform not in LAYOUTS:
        raise InputError(f"kernel: pallas is not compiled for {platform!r}; use auto or xla")
    precision = spec.config.precision or world_model.config.precision
    if platform in ("gpu", "cuda") and precision not in (BFLOAT16, "default"):
        # Without tensor cores Triton writes every multiplication out; it took minutes to compile.
        raise InputError(
            f"kernel: pallas multiplies in bfloat16 or default precision on GPUs, not {precision!r}"
        )
    columns = spec.shape[0] * spec.shape[2]
    size = block_size(columns, spec.config.horizon, world_model, LAYOUTS[platform])
    if size is None and kernel == "pallas":
        raise InputError(
            f"kernel: no block of pallas suits {columns} patients x samples over "
            f"{spec.config.horizon} steps; use auto or xla"
        )
    return size


def _unroll_stepwise(
    world_model: WorldModel,
    start: History,
    spec: RolloutSpec,
    kernel: StayKernel,
    recorded: StayState,
) -> RolloutResult:
    """Model, scores and summary step by step, by kernels that XLA makes."""
    static = start.static[:, None, None]
    first = start.step[:, None, None]

    def step(carry: _ScanCarry, h: jax.Array) -> tuple[_ScanCarry, Tree]:
        now = carry.now
        stay, found = step_stay(
            world_model,
            kernel,
            carry.stay,
            static,
            first + h,
            spec.treat(h, now),
            spec.noise(h),
            follow=spec.config.follow_clinician,
        )
        after, result = _scored(
            world_model,
            spec,
            now,
            found.row,
            stay.ventilated,
            first + h + 1,
            action=found.action,
            alive=stay.alive,
            death=carry.stay.alive * found.risks[..., 0],
            support=found.support,
        )
        if now.history is not None:
            observed = stay.measured[..., : schema.NUM_MASKED]
            after = after._replace(
                history=append_step(now.history, result, spec.shape, stay.ventilated, observed)
            )
        result = mark_invalid(result, spec)
        with jax.named_scope("output"):
            folded = spec.fold(carry.folded, result)
            return _ScanCarry(stay, after, folded), spec.collect(result)

    carry = _ScanCarry(
        jax.tree.map(lambda leaf: leaf[:, None, None], recorded),
        start_branches(world_model, start, spec),
        spec.folded,
    )
    carry, kept = step(carry, jnp.int32(0))
    parts = [jax.tree.map(lambda leaf: leaf[None], kept)]
    steps = spec.config.horizon if spec.steps is None else spec.steps
    if spec.config.horizon > 1:

        def later_step(carry: _ScanCarry, h: jax.Array) -> tuple[_ScanCarry, Tree]:
            carry, kept = step(carry, h)
            return _spread(carry, spec.shape), kept

        if spec.steps is None:
            carry, kept = jax.lax.scan(
                later_step, _spread(carry, spec.shape), jnp.arange(1, spec.config.horizon)
            )
        else:
            carry, kept = scan_some(
                later_step, _spread(carry, spec.shape), 1, steps, spec.config.horizon
            )
        parts.append(kept)
    mortality = later = None
    if spec.config.mortality:
        with jax.named_scope("outcome"):
            follows = continuation_at(kernel, carry.stay, static, first + steps)
            alive = carry.stay.alive
            mortality = carry.stay.dead + alive * jax.nn.sigmoid(follows.mortality_logit)
            mortality = jnp.broadcast_to(mortality, spec.shape)
            later = jnp.broadcast_to(alive * follows.reward, spec.shape)
    return RolloutResult(carry.folded, stack_steps(parts, spec.shape), mortality, later)


def _unroll_recorded(
    world_model: WorldModel,
    start: History,
    spec: RolloutSpec,
    kernel: StayKernel,
    recorded: StayState,
    size: int,
    platform: str,
) -> RolloutResult:
    """The model's steps by one Pallas kernel, then scores and summary of what it recorded."""
    now = start_branches(world_model, start, spec)
    steps = jnp.arange(spec.config.horizon)
    patients, plans, samples = spec.shape
    actions = jnp.broadcast_to(
        jax.vmap(lambda h: spec.treat(h, now)[..., 0])(steps), (len(steps), patients, plans)
    )
    record, ends = play_stays(
        world_model,
        kernel,
        recorded,
        start.static,
        start.step,
        actions,
        spec.noise,
        samples=samples,
        block=size,
        platform=platform,
    )

    def rows(leaf: jax.Array, count: int) -> jax.Array:
        """[..., K, ., N] to [..., P, K, S, count]."""
        leaf = leaf[..., :count, : patients * samples]
        leaf = leaf.reshape(*leaf.shape[:-1], patients, samples)
        return jnp.moveaxis(leaf, (-2, -1, -3), (-4, -2, -1))

    def ordered(record: Record) -> Record:
        obs = rows(record.obs, schema.NUM_FEATURES)
        return Record(obs, rows(record.scalars, len(Scalars._fields)))

    # A GPU's compiler puts all steps in order at once in any case, and with them what only fills
    # up; a TPU's needs no copy within the loop.
    at_once = LAYOUTS[platform].triton

    def step(
        carry: tuple[StepState, Tree], inputs: tuple[jax.Array, Record]
    ) -> tuple[tuple[StepState, Tree], Tree]:
        before, folded = carry
        h, one = inputs
        obs, scalars = one if at_once else ordered(one)
        found = Scalars(*jnp.moveaxis(scalars, -1, 0))
        row = NextRow(
            obs=obs,
            dynamic=in_whole_steps(world_model.scaler.denormalize(obs)),
            ventilation=found.ventilation,
            projected=found.projected.astype(jnp.int32),
        )
        after, result = _scored(
            world_model,
            spec,
            before,
            row,
            found.ventilated > 0,
            start.step[:, None, None] + h + 1,
            action=found.action.astype(jnp.int32),
            alive=found.alive,
            death=found.death,
            support=found.support,
        )
        with jax.named_scope("output"):
            return (after, spec.fold(folded, result)), spec.collect(result)

    inputs = (steps, ordered(record) if at_once else record)
    _, now = spread_state((), now, spec.shape)
    (_, folded), kept = jax.lax.scan(step, (now, spec.folded), inputs)
    mortality = later = None
    if spec.config.mortality:
        mortality, later = jnp.moveaxis(rows(ends, 2), -1, 0)
    return RolloutResult(folded, stack_steps([kept], spec.shape), mortality, later)


def _scored(
    world_model: WorldModel,
    spec: RolloutSpec,
    now: StepState,
    row: NextRow,
    ventilated: jax.Array,
    number: jax.Array,
    *,
    action: jax.Array,
    alive: jax.Array,
    death: jax.Array,
    support: jax.Array,
) -> tuple[StepState, Step]:
    """The branches in a row of this number, and the result of the step that led there."""
    drawn = row._replace(ventilation=ventilated.astype(jnp.float32))
    after, earned = score_state(world_model, now, drawn, action, number, spec.config.mode)
    return after, Step(
        obs=row.obs,
        dynamic=row.dynamic,
        action=action,
        sofa=after.sofa,
        ventilation=row.ventilation,
        reward=alive * earned,
        projected=row.projected,
        alive=alive,
        death=death,
        support=support,
    )


def _spread(carry: _ScanCarry, shape: Shape) -> _ScanCarry:
    """Leaves with their full axes [P, K, S, ...], but for treatments, which samples may share."""
    stay, now = spread_state(carry.stay, carry.now, shape)
    stay = stay._replace(before=carry.stay.before, sums=carry.stay.sums)
    return _ScanCarry(stay, now, carry.folded)


def append_row(
    world_model: WorldModel, history: History, after: StayState, found: StayStep
) -> tuple[History, StepOutputs]:
    """Histories [B] with the row that a step drew, scored; the stays are taken to go on.

    Args:
      world_model: whose scaler and dose edges are used.
      history: before the step.
      after, found: results of `step_stay`.
    """
    row = found.row
    history = history.choose(found.action)
    moved = history.append(
        row.obs,
        row.dynamic[:, schema.URINE],
        after.ventilated,
        after.measured[:, : schema.NUM_MASKED],
    )
    memory = replace(
        memory_of(history),
        value=after.value,
        age=after.age,
        measured=after.measured,
        before=after.before,
        sums=after.sums,
    )
    drawn = row._replace(ventilation=after.ventilated.astype(jnp.float32))
    scored, outputs = score_moved(world_model, history, moved, drawn, mode="corrected")
    return replace(scored, memory=memory), outputs._replace(ventilation=row.ventilation)


def step_history(
    world_model: WorldModel,
    kernel: StayKernel,
    history: History,
    hidden: jax.Array,
    noise: jax.Array,
) -> tuple[StayState, StayStep]:
    """`step_stay` of histories [B] whose treatment is chosen.

    Args:
      world_model: of ensemble size 1.
      kernel: its parameters, packed.
      history: with its memory.
      hidden: [B, H] from `encode_past`, or from the step before.
      noise: [B, 80] as `step_stay` takes it.
    """
    return step_stay(
        world_model,
        kernel,
        start_state(history, hidden),
        history.static,
        history.step,
        history.action[:, -1],
        noise,
        follow=False,
    )


def predict_next(world_model: WorldModel, history: History) -> jax.Array:
    """[E, B, 39] every member's mean of the next row, z-scores; treatments are chosen.

    Of any variant; for the recurrent one it is that of values which are measured.
    """
    if not world_model.is_recurrent:
        return world_model.transitions(*history.window(schema.STATE_WINDOW)).mu
    quiet = jnp.zeros((history.step.shape[0], world_model.noise_width))

    def of_member(models: Models) -> jax.Array:
        member = world_model.with_models(models)
        kernel = pack_stays(member)
        hidden = encode_past(kernel, memory_of(history))
        _, found = step_history(member, kernel, history, hidden, quiet)
        return found.prediction.mu

    result: jax.Array = jax.lax.map(of_member, (world_model.state_model, world_model.outcome_model))
    return result
