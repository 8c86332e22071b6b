"""One member's branches of a block of patients, from the first treatment to the last row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from worldmodel import schema
from worldmodel.clinical import reward
from worldmodel.configuration import require
from worldmodel.models.windows import encode_action
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate import fused_gru
from worldmodel.simulate.fused_gru import pack_outcome, pack_state
from worldmodel.simulate.history import History, urine_per_day
from worldmodel.simulate.step import LACTATE, NextRow, next_row, score_row

Tree = Any  # a PyTree of arrays whose structure the caller chooses
TreeT = TypeVar("TreeT")
Shape = tuple[int, int, int]  # patients P, plans K, samples S
KERNELS = ("auto", "xla", "pallas")
_PREFIX = 2  # after two steps nothing is shared between branches any more


class Step(NamedTuple):
    """Results of one step; leading axes broadcast to [P, K, S]."""

    obs: jax.Array  # [..., 39] z-scores of the row after the treatment
    dynamic: jax.Array  # [..., 39] the same in physical units
    action: jax.Array  # [...] int32 joint action
    sofa: jax.Array  # [...]
    ventilation: jax.Array  # [...] probability
    reward: jax.Array  # [...] shaping
    projected: jax.Array  # [...] int32 entries moved into range
    # Recurrent variant only:
    alive: jax.Array | None = None  # [...] probability that the stay goes on in the new row
    death: jax.Array | None = None  # [...] probability that it ends in the step, with death
    support: jax.Array | None = None  # [...] probability of the action under the clinician


class StepState(NamedTuple):
    """State of the branches before a treatment; leading axes broadcast to [P, K, S]."""

    obs: jax.Array  # [..., 39] the newest row
    lactate: jax.Array  # [...] mmol/L
    sofa: jax.Array  # [...]
    urine: tuple[jax.Array, ...]  # mL per row of the last 24 h, oldest first
    history: History | None  # [P K S]; only for policies


class RolloutResult(NamedTuple):
    """Results of branches [P, K, S] after the last step."""

    folded: Tree
    collected: Tree  # leaves [P, K, S, H, ...]
    mortality: jax.Array | None  # [P, K, S] probability of death within 90 days
    later_reward: jax.Array | None = None  # [P, K, S] rewards after the horizon; recurrent only


@dataclass(frozen=True)
class RolloutConfig:
    """What is compiled into a rollout.

    Attributes:
      horizon: steps H.
      features: names whose values are returned.
      mode: "corrected" or "reference".
      common_noise: the same noise under every plan; otherwise each plan draws its own.
      mortality: evaluate the Outcome Model at the end.
      precision: of matrix products; None for the model's own.
      follow_clinician: plans may hold `FOLLOW_CLINICIAN`; recurrent variant only.
      kernel: of the recurrent variant under plans: "xla", "pallas" (all steps in one kernel, see
        `stay_kernel`) or "auto", which is "pallas" on a TPU where it fits. Policies have XLA's
        kernels whatever is said here; "pallas" is refused for the other variants.
    """

    horizon: int
    features: tuple[str, ...] = ("meanbp", "lactate")
    mode: str = "corrected"
    common_noise: bool = True
    mortality: bool = True
    precision: str | None = None
    follow_clinician: bool = False
    kernel: str = "auto"

    def __post_init__(self) -> None:
        require(self, f"one of {', '.join(KERNELS)}", KERNELS.__contains__, "kernel")


@dataclass(frozen=True)
class RolloutSpec:
    """A rollout of one block of branches: who is treated how, and what is kept.

    Attributes:
      config: horizon, mode, precision and whether the Outcome Model is evaluated.
      shape: branches P, K, S.
      treat: `(h, now) -> action`, joint actions that broadcast to [P, K, S].
      noise: `h -> eps`, standard normals that broadcast to [P, K, S, 39].
      collect: `step -> tree`, kept of every step; leaves broadcast to [P, K, S, ...].
      fold: `(folded, step) -> folded`, a running summary with leaves [P, K, S, ...].
      folded: initial value of the summary.
      looks_back: keep a `History` for a policy.
      steps: [] int32, simulate only so many of `config.horizon` steps and leave the rest of what is
        collected zero; None for all. Recurrent variant only.
      platform: that the program is compiled for; None for JAX's default.
    """

    config: RolloutConfig
    shape: Shape
    treat: Callable[[jax.Array, StepState], jax.Array]
    noise: Callable[[jax.Array], jax.Array]
    collect: Callable[[Step], Tree] = lambda step: ()
    fold: Callable[[Tree, Step], Tree] = lambda folded, step: folded
    folded: Tree = ()
    looks_back: bool = False
    steps: jax.Array | None = None
    platform: str | None = None


class _ScanCarry(NamedTuple):
    recurrent: fused_gru.Carry
    now: StepState
    folded: Tree


def unroll(world_model: WorldModel, start: History, spec: RolloutSpec) -> RolloutResult:
    """Simulates a block of branches in a world model of one member; works on traced values.

    Args:
      world_model: of ensemble size 1.
      start: P patients, about to be treated.
      spec: of the rollout.
    """
    member = jax.tree.map(lambda leaf: leaf[0], world_model.state_model)
    kernel = pack_state(member, spec.config.precision)
    past = _past_rows(start)
    constant = _constant_row(start)

    def step(carry: _ScanCarry, h: jax.Array, *, more: bool) -> tuple[_ScanCarry, Tree]:
        now = carry.now
        action = spec.treat(h, now)
        row = constant._replace(obs=now.obs, action=encode_action(action))
        recurrent, prediction = fused_gru.step(kernel, carry.recurrent, row, more=more)
        drawn = next_row(world_model, prediction, spec.noise(h), mode=spec.config.mode)
        after, earned = score_state(
            world_model, now, drawn, action, start.step[:, None, None] + h + 1, spec.config.mode
        )
        result = Step(
            obs=drawn.obs,
            dynamic=drawn.dynamic,
            action=action,
            sofa=after.sofa,
            ventilation=drawn.ventilation,
            reward=earned,
            projected=drawn.projected,
        )
        if now.history is not None:
            ventilated = drawn.ventilation > 0.5
            after = after._replace(history=append_step(now.history, result, spec.shape, ventilated))
        result = mark_invalid(result, spec)
        with jax.named_scope("output"):
            folded = spec.fold(carry.folded, result)
        moved = _ScanCarry(recurrent, after, folded)
        trail = (now.obs, action) if spec.config.mortality else ()
        with jax.named_scope("output"):
            return moved, (spec.collect(result), trail)

    carry = _ScanCarry(
        fused_gru.init_carry(kernel, past, horizon=spec.config.horizon),
        start_branches(world_model, start, spec),
        spec.folded,
    )
    parts: list[Tree] = []
    whole = schema.STATE_WINDOW - 1  # a window that starts now ends after so many more steps
    last_whole = spec.config.horizon - whole
    h = 0
    while h < spec.config.horizon:
        if h == _PREFIX and last_whole - h > 1:
            recurrent, now = spread_state(carry.recurrent, carry.now, spec.shape)
            carry, kept = jax.lax.scan(
                lambda c, i: step(c, i, more=True),
                carry._replace(recurrent=recurrent, now=now),
                jnp.arange(h, last_whole),
            )
            parts.append(kept)
            h = last_whole
        else:
            carry, kept = step(carry, jnp.int32(h), more=h < last_whole)
            parts.append(jax.tree.map(lambda leaf: leaf[None], kept))
            h += 1
    collected = stack_steps([kept for kept, _ in parts], spec.shape)
    mortality = None
    if spec.config.mortality:
        trail = [rows for _, rows in parts]
        mortality = _mortality(world_model, start, spec, trail, carry.now.obs)
    return RolloutResult(carry.folded, collected, mortality)


def _past_rows(start: History) -> fused_gru.Row:
    """[11, P, 1, 1, ...] the rows before the newest, oldest first."""

    def by_row(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf[:, :-1], 1, 0)[:, :, None, None]

    static = jnp.broadcast_to(start.static[:, None], (*start.obs.shape[:2], schema.NUM_STATIC))
    return fused_gru.Row(
        obs=by_row(start.obs),
        observed=by_row(start.observed),
        static=by_row(static),
        action=by_row(encode_action(start.action)),
    )


def _constant_row(start: History) -> fused_gru.Row:
    """[P, 1, 1, ...] inputs shared by all simulated rows: static features, measured or not."""
    nothing = jnp.zeros(0)
    return fused_gru.Row(
        obs=nothing,
        observed=start.observed[:, None, None, -1],
        static=start.static[:, None, None],
        action=nothing,
    )


def start_branches(world_model: WorldModel, start: History, spec: RolloutSpec) -> StepState:
    """The state of all branches at the recorded rows, leaves [P, 1, 1, ...]."""
    newest = start.obs[:, None, None, -1]
    history = None
    if spec.looks_back:
        history = jax.tree.map(
            lambda leaf: _flat(leaf[:, None, None], spec.shape),
            replace(start, memory=None),
        )
    return StepState(
        obs=newest,
        lactate=world_model.scaler.denormalize(newest)[..., LACTATE],
        sofa=start.sofa[:, None, None],
        urine=tuple(start.urine[:, None, None, i] for i in range(start.urine.shape[-1])),
        history=history,
    )


def score_state(
    world_model: WorldModel,
    now: StepState,
    row: NextRow,
    action: jax.Array,
    step: jax.Array,
    mode: str,
) -> tuple[StepState, jax.Array]:
    """The branches in a row that was drawn, with their history as it was, and the step's reward.

    Args:
      world_model: whose dose edges are used.
      now: before the step.
      row: the row.
      action: joint action that led to it.
      step: number of the row, 0 at admission.
      mode: "corrected" or "reference".
    """
    urine = (*now.urine[1:], row.dynamic[..., schema.URINE])
    sofa = score_row(
        world_model,
        row,
        action,
        urine_before=sum(now.urine[1:], now.urine[0]),
        urine_24h=urine_per_day(sum(urine[1:], urine[0]), step, len(urine)),
        mode=mode,
    )
    lactate = row.dynamic[..., LACTATE]
    with jax.named_scope("scoring"):
        earned = reward.step_reward(now.sofa, sofa, now.lactate, lactate)
    return StepState(row.obs, lactate, sofa, urine, now.history), earned


def mark_invalid(step: Step, spec: RolloutSpec) -> Step:
    """The step with a reward of NaN where a policy gave no distribution; plans are checked."""
    if not spec.looks_back:
        return step
    return step._replace(reward=jnp.where(step.action < 0, jnp.nan, step.reward))


def append_step(
    history: History,
    step: Step,
    shape: Shape,
    ventilated: jax.Array,
    observed: jax.Array | None = None,
) -> History:
    """Histories of branches [P K S] with the row of a step.

    Args:
      history: before the step.
      step: its results.
      shape: branches P, K, S.
      ventilated: bool, in the row.
      observed: [..., 38] which values are measured; None: those of the last row.
    """
    moved = history.choose(_flat(step.action, shape)).append(
        _flat(step.obs, shape),
        _flat(step.dynamic[..., schema.URINE], shape),
        _flat(ventilated, shape),
        None if observed is None else _flat(observed, shape),
    )
    return replace(moved, sofa=_flat(step.sofa, shape))


def _flat(leaf: jax.Array, shape: Shape) -> jax.Array:
    """[P or 1, K or 1, S or 1, ...] to branches [P K S, ...]."""
    return jnp.broadcast_to(leaf, (*shape, *leaf.shape[3:])).reshape(-1, *leaf.shape[3:])


def spread_state(tree: TreeT, now: StepState, shape: Shape) -> tuple[TreeT, StepState]:
    """Both with every leaf on its full axes [P, K, S, ...]; a history is flat and stays so."""

    def full(leaf: jax.Array) -> jax.Array:
        return jnp.broadcast_to(leaf, (*shape, *leaf.shape[3:]))

    tree, spread = jax.tree.map(full, (tree, now._replace(history=None)))
    return tree, spread._replace(history=now.history)


@jax.named_scope("output")
def stack_steps(parts: list[Tree], shape: Shape) -> Tree:
    """Collected leaves [n, P, K, S, ...] of consecutive steps to [P, K, S, H, ...]."""

    def join(*leaves: jax.Array) -> jax.Array:
        whole = jnp.concatenate(
            [jnp.broadcast_to(leaf, (leaf.shape[0], *shape, *leaf.shape[4:])) for leaf in leaves]
        )
        return jnp.moveaxis(whole, 0, 3)

    return jax.tree.map(join, *parts)


@jax.named_scope("outcome")
def _mortality(
    world_model: WorldModel,
    start: History,
    spec: RolloutSpec,
    trail: list[tuple[jax.Array, jax.Array]],
    newest: jax.Array,
) -> jax.Array:
    """[P, K, S] mortality at the last row, with the last treatment repeated in it.

    Args:
      world_model: of ensemble size 1.
      start: P patients.
      spec: of the rollout.
      trail: rows [n, ...] that were treated, and their actions; the first part is the start.
      newest: [..., 39] the row after the last treatment.
    """
    model = jax.tree.map(lambda leaf: leaf[0], world_model.outcome_model)
    kernel = pack_outcome(model, spec.config.precision)
    _, last_action = trail[-1]
    simulated = [*trail[1:], (newest[None], last_action[-1:])]
    simulated_rows = min(spec.config.horizon, schema.OUTCOME_WINDOW)

    def spread(leaf: jax.Array, full: tuple[int, ...]) -> jax.Array:
        return jnp.broadcast_to(leaf, (leaf.shape[0], *full, *leaf.shape[4:]))

    # Actions keep their own, perhaps narrower shape.
    narrow = last_action.shape[1:]
    obs = jnp.concatenate([spread(rows, spec.shape) for rows, _ in simulated])[-simulated_rows:]
    action = jnp.concatenate([spread(acts, narrow) for _, acts in simulated])[-simulated_rows:]
    constant = _constant_row(start)

    def rows_of(obs: jax.Array, action: jax.Array) -> fused_gru.Row:
        def repeat(leaf: jax.Array) -> jax.Array:
            return jnp.broadcast_to(leaf, (obs.shape[0], *leaf.shape))

        return fused_gru.Row(
            obs, repeat(constant.observed), repeat(constant.static), encode_action(action)
        )

    groups = [rows_of(obs, action)]
    missing = schema.OUTCOME_WINDOW - simulated_rows
    if missing:
        groups.insert(0, rows_of(*trail[0]))
    if missing > 1:
        past = _past_rows(start)
        groups.insert(0, jax.tree.map(lambda leaf: leaf[1 - missing :], past))
    logit = fused_gru.mortality_logit(kernel, groups)
    return jnp.broadcast_to(jax.nn.sigmoid(logit), spec.shape)
