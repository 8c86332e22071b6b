"""Counterfactual rollouts: patients x plans x noise samples x horizon in one jitted call.

Branch noise comes from `fold_in(fold_in(fold_in(key, patient), step), sample)`, so a branch is
the same whatever the batch, and by default the same noise meets every plan (common random
numbers), which removes noise from comparisons between plans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from worldmodel import schema
from worldmodel.clinical import reward
from worldmodel.errors import InputError
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import History, view_of
from worldmodel.simulate.noise import branch_key, policy_key, state_noise
from worldmodel.simulate.play import Job, Now, Step, play
from worldmodel.simulate.step import MODES
from worldmodel.view import Policy, as_pytree, draw_action

CHART_FEATURES = ("meanbp", "lactate", "output_4hourly")
MAX_BRANCHES = 65_536  # simulated at a time; bounds memory, changes no number


@struct.dataclass
class Rollouts:
    """What happened on P patients x K plans x S samples over H steps."""

    values: jax.Array  # [P, K, S, H, F] physical units of the features asked for
    sofa: jax.Array  # [P, K, S, H]
    ventilation: jax.Array  # [P, K, S, H] probability
    reward: jax.Array  # [P, K, S, H] shaping of each step; the terminal reward is apart
    action: jax.Array  # [P, K, S, H] int32 joint action taken
    mortality: jax.Array  # [P, K, S] probability of death within 90 days, asked at the end
    projected: jax.Array  # [P, K, S] int32 entries moved into their physiologic range
    features: tuple[str, ...] = struct.field(pytree_node=False)
    mode: str = struct.field(pytree_node=False)

    @property
    def total_reward(self) -> jax.Array:
        """[P, K, S] undiscounted: shaping plus the terminal reward.

        The terminal reward is its expectation in corrected mode; in reference mode a
        mortality above 0.5 is death.
        """
        died = self.mortality if self.mode == "corrected" else self.mortality > 0.5
        return self.reward.sum(-1) + reward.terminal_reward(died)

    def feature(self, name: str) -> jax.Array:
        """[P, K, S, H] one of the collected features, in physical units."""
        return self.values[..., self.features.index(name)]


@dataclass(frozen=True)
class _Settings:
    """What is compiled into a rollout."""

    past: int  # rows that the policy looks back on
    horizon: int
    features: tuple[str, ...]
    common_noise: bool
    mode: str


def rollout(
    world_model: WorldModel,
    key: jax.Array,
    start: History,
    plans_or_policy: np.ndarray | jax.Array | Policy,
    *,
    horizon: int | None = None,
    samples: int = 1,
    features: tuple[str, ...] = CHART_FEATURES,
    common_noise: bool = True,
    noise: jax.Array | None = None,
    mode: str = "corrected",
    max_branches: int = MAX_BRANCHES,
) -> Rollouts:
    """Plays patients forward under plans or a policy.

    Sample s is simulated by ensemble member `s mod E` throughout (trajectory sampling).

    Args:
      world_model: the model to play in.
      key: not consumed by position: branch noise is folded in from patient, step and sample.
      start: P patients, from `start_history`.
      plans_or_policy: joint actions 0-24, [K, H] for all patients or [P, K, H]; or a policy
        `(key, view) -> [25]` traced into the rollout (K = 1), with a key per branch and step. Its
        attribute `past`, where it has one, asks for so many rows of `View.past`.
      horizon: steps H; needed for a policy, otherwise the plans' length.
      samples: noise samples S per patient and plan; a multiple of the ensemble size.
      features: names to return.
      common_noise: the same noise under every plan; otherwise each plan draws its own.
      noise: [P, S, H, 39] standard normal values to use instead of drawing them, as
        `abduct_noise` returns them.
      mode: "corrected" (projection into physiologic ranges, standard SOFA, scaled urine) or
        "reference" (SepsisAgent's rules: neither).
      max_branches: bound on the branches simulated at a time.

    Returns:
      The rollouts; arrays are on the device.

    Raises:
      InputError: an action outside 0-24, an unknown feature or mode, or sizes that do not fit.
    """
    plans, policy = _resolve(plans_or_policy, start, horizon)
    horizon = plans.shape[-1] if plans is not None else int(horizon or 0)
    if mode not in MODES:
        raise InputError(f"mode: got {mode!r}, expected one of {MODES}")
    unknown = [name for name in features if name not in schema.INDEX]
    if unknown:
        raise InputError(f"features: {unknown[0]!r} is unknown; see worldmodel.schema.FEATURES")
    members = world_model.num_members
    if samples < 1 or samples % members:
        raise InputError(f"samples: got {samples}, expected a multiple of {members} (members)")
    patients = start.step.shape[0]
    if noise is not None and noise.shape != (patients, samples, horizon, schema.NUM_FEATURES):
        raise InputError(
            f"noise: got shape {noise.shape}, expected {(patients, samples, horizon, 39)}"
        )
    num_plans = 1 if plans is None else plans.shape[1]
    per_member = samples // members
    chunk = _chunk(per_member, max(max_branches // (patients * num_plans), 1))
    # Sample s belongs to member s mod E.
    sample_ids = jnp.arange(samples).reshape(per_member // chunk, chunk, members)
    return _rollout(
        world_model,
        key,
        start,
        plans,
        None if policy is None else as_pytree(policy),
        noise,
        sample_ids,
        settings=_Settings(
            getattr(policy, "past", 0), horizon, tuple(features), common_noise, mode
        ),
    )


def _resolve(
    plans_or_policy: Any, start: History, horizon: int | None
) -> tuple[jax.Array | None, Policy | None]:
    if callable(plans_or_policy):
        if horizon is None or horizon < 1:
            raise InputError(f"horizon: got {horizon}, expected at least 1 step for a policy")
        return None, plans_or_policy
    plans = np.asarray(plans_or_policy)
    if plans.ndim not in (2, 3) or 0 in plans.shape:
        raise InputError(f"plans: got shape {plans.shape}, expected [K, H] or [P, K, H]")
    if not np.issubdtype(plans.dtype, np.integer):
        raise InputError(f"plans: got {plans.dtype} values, expected integers 0 to 24")
    bad = (plans < 0) | (plans >= schema.NUM_ACTIONS)
    if bad.any():
        raise InputError(f"plans: joint action {plans[bad][0]} is outside 0 to 24")
    if horizon is not None and horizon != plans.shape[-1]:
        raise InputError(f"horizon: got {horizon}, but the plans have {plans.shape[-1]} steps")
    patients = start.step.shape[0]
    if plans.ndim == 3 and plans.shape[0] != patients:
        raise InputError(f"plans: for {plans.shape[0]} patients, but {patients} start")
    plans = np.broadcast_to(plans, (patients, *plans.shape[-2:]))
    return jnp.asarray(plans, jnp.int32), None


def _chunk(count: int, most: int) -> int:
    """The largest divisor of `count` that is at most `most`."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)


@partial(jax.jit, static_argnames="settings")
def _rollout(
    world_model: WorldModel,
    key: jax.Array,
    start: History,
    plans: jax.Array | None,
    policy: Any,
    noise: jax.Array | None,
    sample_ids: jax.Array,
    *,
    settings: _Settings,
) -> Rollouts:
    """Members one by one, and each one's samples [chunks, C] chunk by chunk."""

    def of_member(inputs: tuple[Any, Any, jax.Array]) -> dict[str, jax.Array]:
        state_model, outcome_model, chunks = inputs
        add_axis = partial(jax.tree.map, lambda leaf: leaf[None])
        member = replace(
            world_model, state_model=add_axis(state_model), outcome_model=add_axis(outcome_model)
        )
        simulate = partial(_simulate, member, key, start, plans, policy, noise, settings=settings)
        return jax.lax.map(simulate, chunks)

    models = (world_model.state_model, world_model.outcome_model, jnp.moveaxis(sample_ids, -1, 0))
    results = jax.lax.map(of_member, models)  # leaves [E, chunks, P, K, C, ...]

    def merge_samples(leaf: jax.Array) -> jax.Array:
        leaf = leaf.transpose(2, 3, 1, 4, 0, *range(5, leaf.ndim))
        return leaf.reshape(*leaf.shape[:2], sample_ids.size, *leaf.shape[5:])

    return Rollouts(
        **jax.tree.map(merge_samples, results), features=settings.features, mode=settings.mode
    )


def _simulate(
    world_model: WorldModel,
    key: jax.Array,
    start: History,
    plans: jax.Array | None,
    policy: Any,
    noise: jax.Array | None,
    samples: jax.Array,
    *,
    settings: _Settings,
) -> dict[str, jax.Array]:
    """One member's branches [P, K, C] for the samples [C]."""
    shape = (start.step.shape[0], 1 if plans is None else plans.shape[1], samples.shape[0])
    columns = np.array([schema.INDEX[name] for name in settings.features], np.int32)
    # Under common noise all plans share one draw per patient and sample.
    plan_ids = jnp.zeros(1, jnp.int32) if settings.common_noise else jnp.arange(shape[1])

    def draw_noise(h: jax.Array) -> jax.Array:
        if noise is not None:
            return noise[:, None, samples, h]
        keys = _branch_keys(key, start, h, plan_ids, samples)
        return jax.vmap(state_noise)(keys.reshape(-1)).reshape(*keys.shape, -1)

    def treat(h: jax.Array, now: Now) -> jax.Array:
        if plans is not None:
            return plans[:, :, h][..., None]
        assert now.history is not None
        view = view_of(world_model, now.history, past=settings.past)
        keys = _branch_keys(key, start, h, plan_ids, samples).reshape(-1)
        action = jax.vmap(partial(draw_action, policy))(jax.vmap(policy_key)(keys), view)
        return action.reshape(shape)

    def collect(step: Step) -> dict[str, jax.Array]:
        return {
            "values": step.dynamic[..., columns],
            "sofa": step.sofa,
            "ventilation": step.ventilation,
            "reward": step.reward,
            "action": step.action,
        }

    played = play(
        world_model,
        start,
        Job(
            shape=shape,
            horizon=settings.horizon,
            treat=treat,
            noise=draw_noise,
            collect=collect,
            fold=lambda projected, step: projected + step.projected,
            folded=jnp.zeros(shape, jnp.int32),
            mode=settings.mode,
            looks_back=plans is None,
        ),
    )
    return {**played.collected, "mortality": played.mortality, "projected": played.folded}


def _branch_keys(
    key: jax.Array, start: History, h: jax.Array, plan_ids: jax.Array, samples: jax.Array
) -> jax.Array:
    """Keys [P, K or 1, C] by patient, step, sample and (if not common) plan."""

    def of(patient: jax.Array, step: jax.Array, plan: jax.Array, sample: jax.Array) -> jax.Array:
        return branch_key(key, patient, step + h, sample, plan)

    over_samples = jax.vmap(of, in_axes=(None, None, None, 0))
    over_plans = jax.vmap(over_samples, in_axes=(None, None, 0, None))
    return jax.vmap(over_plans, in_axes=(0, 0, None, None))(
        start.patient, start.step, plan_ids, samples
    )
