"""Counterfactual rollouts: patients x plans x noise samples x horizon in one jitted call.

Branch noise comes from `fold_in(fold_in(fold_in(key, patient), step), sample)`, so a branch is
the same whatever the batch, and by default all plans use the same noise (common random
numbers), which removes noise from comparisons between plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from worldmodel import schema, struct
from worldmodel.clinical import reward
from worldmodel.errors import InputError
from worldmodel.models.world_model import Models, WorldModel
from worldmodel.observation import INVALID_ACTION, PolicyFn, as_pytree, refuse_invalid
from worldmodel.resources import being_traced, bucket, compiler_options, require_memory
from worldmodel.simulate.history import History
from worldmodel.simulate.randomness import drawn_noise, under_plans, under_policy
from worldmodel.simulate.stay_unroll import unroll_branches
from worldmodel.simulate.stays import FOLLOW_CLINICIAN
from worldmodel.simulate.step import MODES
from worldmodel.simulate.unroll import RolloutConfig, RolloutSpec, Step

CHART_FEATURES = ("meanbp", "lactate", "output_4hourly")
MAX_BRANCHES = 65_536  # simulated at a time on an accelerator
MAX_PROGRAMS = 32  # kept in memory, of one precision
_SHORTEST = 4  # steps of the shortest arrays for more than one
CACHED_BRANCHES = 1_024  # simulated at a time on a CPU: they fit its caches


_PER_STEP, _PER_BRANCH = 7, 4  # arrays of `Rollouts` beside the features
_COPIES = 3  # of the results at the same time, as they are put in order


def require_rollouts(
    samples: int,
    *,
    patients: int,
    plans: int,
    horizon: int,
    features: int,
    setting: str = "samples",
) -> None:
    """Refuses more futures than memory holds; called by `rollout` before it allocates any.

    Args:
      samples: futures per patient and plan.
      patients, plans, horizon, features: of the rollout, how many.
      setting: named in the error.

    Raises:
      InputError: they do not fit; the message gives the number that does.
    """
    numbers = horizon * (features + _PER_STEP) + _PER_BRANCH
    require_memory(
        setting, samples, 4.0 * _COPIES * patients * plans * numbers, free=_free_on_device()
    )


def _free_on_device() -> int | None:
    """Bytes that the default device can still hold; None where it is the machine's memory."""
    found = jax.local_devices()[0].memory_stats() or {}
    return found["bytes_limit"] - found.get("bytes_in_use", 0) if "bytes_limit" in found else None


@struct.dataclass
class Rollouts:
    """Simulated steps of P patients x K plans x S samples over H steps."""

    values: jax.Array  # [P, K, S, H, F] physical units of `features`
    sofa: jax.Array  # [P, K, S, H]
    ventilation: jax.Array  # [P, K, S, H] probability
    reward: jax.Array  # [P, K, S, H] shaping of each step; the terminal reward is apart
    action: jax.Array  # [P, K, S, H] int32 joint action taken
    mortality: jax.Array  # [P, K, S] probability of death within 90 days; NaN if not computed
    projected: jax.Array  # [P, K, S] int32 entries moved into their physiologic range
    features: tuple[str, ...] = struct.field(pytree_node=False)
    mode: str = struct.field(pytree_node=False)
    # Recurrent variant only:
    alive: jax.Array | None = None  # [P, K, S, H] probability that the stay has not ended
    death: jax.Array | None = None  # [P, K, S, H] probability that the stay ends so in the step
    support: jax.Array | None = None  # [P, K, S, H] probability of the action, clinician
    later_reward: jax.Array | None = None  # [P, K, S] rewards after the horizon, clinician

    @property
    def total_reward(self) -> Float[Array, "P K S"]:
        """[P, K, S] undiscounted: shaping plus the terminal reward.

        In the recurrent variant that of the whole stay: the clinician goes on after the horizon.

        The terminal reward is its expectation in corrected mode; in reference mode a
        mortality above 0.5 is death. NaN where the mortality was not computed: how the stay ends
        is not known then.
        """
        died = self.mortality
        if self.mode == "reference":
            died = jnp.where(jnp.isnan(died), jnp.nan, died > 0.5)
        total = self.reward.sum(-1) + reward.terminal_reward(died)
        return total if self.later_reward is None else total + self.later_reward

    def feature(self, name: str) -> Float[Array, "P K S H"]:
        """[P, K, S, H] one of the collected features, in physical units."""
        return self.values[..., self.features.index(name)]


def rollout(
    world_model: WorldModel,
    key: jax.Array,
    start: History,
    plans_or_policy: np.ndarray | jax.Array | PolicyFn,
    *,
    horizon: int | None = None,
    samples: int = 1,
    features: tuple[str, ...] = CHART_FEATURES,
    common_noise: bool = True,
    noise: Float[Array, "P S H W"] | None = None,
    mode: str = "corrected",
    mortality: bool = True,
    precision: str | None = None,
    max_branches: int | None = None,
) -> Rollouts:
    """Simulates patients under plans or a policy.

    There is one compiled program for each shape of the inputs, about 40 MB each. Horizons of the
    recurrent variant share one for 1, up to 4, 8, 16, ... steps, of which no more are simulated
    than asked for; those of the other variants, and those within a `jax.jit`, have one each. At
    `MAX_PROGRAMS` of one precision all of them are let go.

    Sample s is simulated by ensemble member `s mod E` throughout (trajectory sampling).

    Args:
      world_model: the model to simulate with.
      key: not consumed by position: branch noise is folded in from patient, step and sample.
      start: P patients, from `start_history`.
      plans_or_policy: joint actions 0-24, [K, H] for all patients or [P, K, H], with
        `FOLLOW_CLINICIAN` where a recurrent model's own clinician chooses; or a policy
        `(key, observation) -> [25]` traced into the rollout (K = 1), with a key per branch and
        step. Its attribute `past`, where it has one, is the number of rows of `Observation.past`.
      horizon: steps H; needed for a policy, otherwise the plans' length.
      samples: noise samples S per patient and plan; a multiple of the ensemble size.
      features: names to return.
      common_noise: the same noise under every plan; otherwise each plan draws its own.
      noise: [P, S, H, 39] standard normal values to use instead of drawing them, as
        `abduct_noise` returns them; `WorldModel.noise_width` of them for a recurrent model.
      mode: "corrected" (projection into physiologic ranges, standard SOFA, scaled urine) or
        "reference" (SepsisAgent's rules: neither).
      mortality: evaluate the Outcome Model at the end; otherwise `Rollouts.mortality` is NaN.
      precision: of matrix products, one of `clinical_model.PRECISIONS` or "bfloat16" (operands
        rounded, sums in float32); None for the model's own.
      max_branches: bound on the branches simulated at a time; None for what suits the device.

    Returns:
      The rollouts; arrays are on the device.

    Raises:
      InputError: an action outside 0-24, an unknown feature or mode, sizes that do not fit, more
        futures than memory holds, or a policy that gives no 25 finite probabilities that sum to 1.
    """
    least = FOLLOW_CLINICIAN if world_model.is_recurrent else 0
    plans, policy = _resolve(plans_or_policy, start, horizon, least)
    follow = plans is not None and bool((plans == FOLLOW_CLINICIAN).any())
    horizon = plans.shape[-1] if plans is not None else int(horizon or 0)
    check_mode(world_model, mode)
    unknown = [name for name in features if name not in schema.INDEX]
    if unknown:
        raise InputError(f"features: {unknown[0]!r} is unknown; see worldmodel.schema.FEATURES")
    members = world_model.num_members
    if samples < 1 or samples % members:
        raise InputError(f"samples: got {samples}, expected a multiple of {members} (members)")
    patients = start.step.shape[0]
    if noise is not None and noise.shape != (patients, samples, horizon, world_model.noise_width):
        raise InputError(
            f"noise: got shape {noise.shape}, expected "
            f"{(patients, samples, horizon, world_model.noise_width)}"
        )
    num_plans = 1 if plans is None else plans.shape[1]
    padded, steps = horizon, None
    if world_model.is_recurrent and not being_traced():
        # After a single step branches still share most of what the Outcome Model reads.
        padded = 1 if horizon == 1 else bucket(horizon, _SHORTEST)
        steps = jnp.asarray(horizon, jnp.int32)
    require_rollouts(
        samples, patients=patients, plans=num_plans, horizon=padded, features=len(features)
    )
    plans = None if plans is None else _padded(plans, padded)
    if noise is not None and padded > horizon:
        noise = jnp.asarray(_padded(np.asarray(noise), padded))
    if max_branches is None:
        max_branches = _suitable_branches(horizon, world_model)
    actions = None if plans is None else jnp.asarray(plans)
    inputs = (world_model, key, start, actions, policy and as_pytree(policy), noise, steps)
    past = getattr(policy, "past", 0)
    config = RolloutConfig(
        horizon=padded,
        features=tuple(features),
        common_noise=common_noise,
        mode=mode,
        mortality=mortality,
        precision=precision,
        follow_clinician=follow,
        kernel="xla",  # the other one simulates a horizon that is compiled into it
    )
    rows = _in_equal_parts(patients, max_branches // num_plans)
    ids = _in_equal_parts(samples // members, max_branches // (num_plans * rows.shape[1]))
    # Sample s belongs to member s mod E.
    blocks = _Blocks(rows, ids[None] * members + np.arange(members)[:, None, None])
    if being_traced():
        return _rollout(*inputs, blocks, samples, config, past)
    program = _jitted(precision)
    if program._cache_size() >= MAX_PROGRAMS:  # type: ignore[attr-defined]
        program.clear_cache()  # type: ignore[attr-defined]
    result: Rollouts = program(*inputs, blocks, samples, config, past)
    result = _cut(result, horizon)
    if policy is not None:
        refuse_invalid(np.asarray(result.action) == INVALID_ACTION)
    return result


def _padded(values: np.ndarray, steps: int) -> np.ndarray:
    """An array [P, ., H, ...] with zeros, which nobody reads, for the steps after H."""
    widths = [(0, 0)] * values.ndim
    widths[2] = (0, steps - values.shape[2])
    return np.pad(values, widths)


_BY_STEP = ("values", "sofa", "ventilation", "reward", "action", "alive", "death", "support")


def _cut(rollouts: Rollouts, horizon: int) -> Rollouts:
    """The steps that were simulated; on a CPU without a program for each horizon."""
    if rollouts.sofa.shape[-1] == horizon:
        return rollouts
    on_host = jax.default_backend() == "cpu"

    def cut(leaf: jax.Array) -> jax.Array:
        if not on_host:
            return leaf[:, :, :, :horizon]
        # Unlike `jnp.asarray`, this compiles nothing.
        put: jax.Array = jax.device_put(np.asarray(leaf)[:, :, :, :horizon])
        return put

    leaves = {name: getattr(rollouts, name) for name in _BY_STEP}
    kept = {name: cut(leaf) for name, leaf in leaves.items() if leaf is not None}
    return replace(rollouts, **kept)  # type: ignore[arg-type]


def check_mode(world_model: WorldModel, mode: str) -> None:
    """Makes sure that a model can be simulated in a mode.

    Raises:
      InputError: an unknown mode, or the recurrent variant in reference mode, which is a protocol
        of windows.
    """
    if mode not in MODES:
        raise InputError(f"mode: got {mode!r}, expected one of {MODES}")
    if world_model.is_recurrent and mode == "reference":
        raise InputError("mode: the recurrent variant has no reference mode; use corrected")


def _resolve(
    plans_or_policy: np.ndarray | jax.Array | PolicyFn,
    start: History,
    horizon: int | None,
    least: int,
) -> tuple[np.ndarray | None, PolicyFn | None]:
    if callable(plans_or_policy):
        if horizon is None or horizon < 1:
            raise InputError(f"horizon: got {horizon}, expected at least 1 step for a policy")
        return None, plans_or_policy
    plans = np.asarray(plans_or_policy)
    if plans.ndim not in (2, 3) or 0 in plans.shape:
        raise InputError(f"plans: got shape {plans.shape}, expected [K, H] or [P, K, H]")
    if not np.issubdtype(plans.dtype, np.integer):
        raise InputError(f"plans: got {plans.dtype} values, expected integers 0 to 24")
    bad = (plans < least) | (plans >= schema.NUM_ACTIONS)
    if bad.any():
        raise InputError(f"plans: joint action {plans[bad][0]} is outside 0 to 24")
    if horizon is not None and horizon != plans.shape[-1]:
        raise InputError(f"horizon: got {horizon}, but the plans have {plans.shape[-1]} steps")
    patients = start.step.shape[0]
    if plans.ndim == 3 and plans.shape[0] != patients:
        raise InputError(f"plans: for {plans.shape[0]} patients, but {patients} start")
    plans = np.broadcast_to(plans, (patients, *plans.shape[-2:]))
    return plans.astype(np.int32), None


class _Blocks(NamedTuple):
    """Blocks that are simulated one after the other; the last one may repeat its last entry."""

    patients: np.ndarray  # [blocks, p] int32
    samples: np.ndarray  # [E, blocks, c] int32


def _suitable_branches(horizon: int, world_model: WorldModel) -> int:
    if jax.default_backend() != "cpu":
        return MAX_BRANCHES
    if world_model.is_recurrent:  # carries more per branch, and no window
        return CACHED_BRANCHES * 4 if horizon == 1 else CACHED_BRANCHES // 2
    # The first step costs little per branch, so short horizons take more branches at a time.
    return CACHED_BRANCHES * max(8 // horizon, 1)


def _in_equal_parts(count: int, most: int) -> np.ndarray:
    """Indices [parts, size] of 0 to count - 1, with size at most `most`, the last repeated."""
    parts = -(-count // max(most, 1))
    size = -(-count // parts)
    return np.minimum(np.arange(parts * size), count - 1).reshape(parts, size).astype(np.int32)


@cache
def _jitted(precision: str | None) -> Callable[..., Rollouts]:
    return jax.jit(
        _rollout, static_argnums=(8, 9, 10), compiler_options=compiler_options(precision)
    )


def _rollout(
    world_model: WorldModel,
    key: jax.Array,
    start: History,
    plans: jax.Array | None,
    policy: PolicyFn | None,
    noise: jax.Array | None,
    steps: jax.Array | None,
    blocks: _Blocks,
    samples: int,
    config: RolloutConfig,
    past: int,
) -> Rollouts:
    """Patients block by block, in each the members, and in each their samples block by block."""

    def of_patients(rows: jax.Array) -> dict[str, jax.Array]:
        starts, own_plans, own_noise = jax.tree.map(lambda leaf: leaf[rows], (start, plans, noise))

        def of_member(inputs: tuple[Models, jax.Array]) -> dict[str, jax.Array]:
            models, sample_blocks = inputs
            simulate = partial(
                _simulate,
                world_model.with_models(models),
                key,
                starts,
                own_plans,
                policy,
                own_noise,
                steps,
                config=config,
                past=past,
            )
            result: dict[str, jax.Array] = jax.lax.map(simulate, sample_blocks)
            return result

        models = (world_model.state_model, world_model.outcome_model)
        result: dict[str, jax.Array] = jax.lax.map(of_member, (models, blocks.samples))
        return result

    results = jax.lax.map(of_patients, blocks.patients)  # leaves [blocks, E, blocks, p, K, c, ...]

    def merge(leaf: jax.Array) -> jax.Array:
        leaf = leaf.transpose(0, 3, 4, 2, 5, 1, *range(6, leaf.ndim))
        patients, plans, sets = leaf.shape[:2], leaf.shape[2], leaf.shape[3:6]
        leaf = leaf.reshape(math.prod(patients), plans, math.prod(sets), *leaf.shape[6:])
        return leaf[: start.step.shape[0], :, :samples]

    return Rollouts(**jax.tree.map(merge, results), features=config.features, mode=config.mode)


def _simulate(
    world_model: WorldModel,
    key: jax.Array,
    start: History,
    plans: jax.Array | None,
    policy: PolicyFn | None,
    noise: jax.Array | None,
    steps: jax.Array | None,
    samples: jax.Array,
    *,
    config: RolloutConfig,
    past: int,
) -> dict[str, jax.Array]:
    """One member's branches [P, K, C] for the samples [C]; `steps` as in `RolloutSpec`."""
    shape = (start.step.shape[0], 1 if plans is None else plans.shape[1], samples.shape[0])
    columns = np.array([schema.INDEX[name] for name in config.features], np.int32)
    if plans is not None:
        treat = under_plans(plans)
    else:
        assert policy is not None
        treat = under_policy(policy, world_model, key, start, samples, past=past)
    if noise is None:
        common = config.common_noise
        width = world_model.noise_width
        eps = drawn_noise(
            key, start, samples, shape, config.horizon, common=common, width=width, steps=steps
        )
    else:
        given = noise[:, None, samples]

        def eps(h: jax.Array) -> jax.Array:
            return given[:, :, :, h]

    def collect(step: Step) -> dict[str, jax.Array | None]:
        return {
            "values": step.dynamic[..., columns],
            "sofa": step.sofa,
            "ventilation": step.ventilation,
            "reward": step.reward,
            "action": step.action,
            "alive": step.alive,
            "death": step.death,
            "support": step.support,
        }

    result = unroll_branches(
        world_model,
        start,
        RolloutSpec(
            config=config,
            shape=shape,
            treat=treat,
            noise=eps,
            collect=collect,
            fold=lambda projected, step: projected + step.projected,
            folded=jnp.zeros(shape, jnp.int32),
            looks_back=plans is None,
            steps=steps,
        ),
    )
    mortality = jnp.full(shape, jnp.nan) if result.mortality is None else result.mortality
    return {
        **result.collected,
        "mortality": mortality,
        "later_reward": result.later_reward,
        "projected": result.folded,
    }
