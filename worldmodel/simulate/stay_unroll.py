"""Branches of one member from the first treatment to the last row, for every variant.

`unroll_branches` is `unroll` for models that read windows, and the loop over `step_stay` for the
recurrent variant. What branches share is computed once there, too: before the first treatment
all leaves have the axes [P, 1, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import History
from worldmodel.simulate.randomness import scan_some
from worldmodel.simulate.stays import (
    StayState,
    continuation_at,
    encode_past,
    memory_of,
    pack_stays,
    start_state,
    step_stay,
)
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
      InputError: the recurrent variant in reference mode, which is a protocol of windows.
    """
    if not world_model.is_recurrent:
        return unroll(world_model, start, spec)
    if spec.config.mode == "reference":
        raise InputError("mode: the recurrent variant has no reference mode; use corrected")
    kernel = pack_stays(world_model, spec.config.precision)
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
        row = found.row._replace(ventilation=stay.ventilated.astype(jnp.float32))
        after, earned = score_state(
            world_model, now, row, found.action, first + h + 1, spec.config.mode
        )
        result = Step(
            obs=row.obs,
            dynamic=row.dynamic,
            action=found.action,
            sofa=after.sofa,
            ventilation=found.row.ventilation,
            reward=stay.alive * earned,
            projected=row.projected,
            alive=stay.alive,
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

    recorded = start_state(start, encode_past(kernel, memory_of(start)))
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


def _spread(carry: _ScanCarry, shape: Shape) -> _ScanCarry:
    """Leaves with their full axes [P, K, S, ...], but for treatments, which samples may share."""
    stay, now = spread_state(carry.stay, carry.now, shape)
    stay = stay._replace(before=carry.stay.before, sums=carry.stay.sums)
    return _ScanCarry(stay, now, carry.folded)
