"""Observations, which are what policies see before a treatment, and features of them.

An `Observation` is the contract between environments and policies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from worldmodel import schema, struct
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.scaling import Scaler


@struct.dataclass
class ObservationHistory:
    """The last H rows, newest last; rows before admission are zero."""

    dynamic: jax.Array  # [H, 39] as in Observation
    measured: jax.Array  # [H, 38] bool
    vasopressor: jax.Array  # [H] int32, level given in the row; 0 in the newest, still open
    fluid: jax.Array  # [H] int32
    valid: jax.Array  # [H] bool


@struct.dataclass
class Observation:
    """One row of one patient, as in `Episodes`, with the treatment of the step before."""

    dynamic: jax.Array  # [39] physical units, gaps filled
    measured: jax.Array  # [38] bool
    static: jax.Array  # [3] age in years, 1 = male, Charlson index
    ventilated: jax.Array  # [] bool
    sofa: jax.Array  # [] float32
    urine_24h: jax.Array  # [] mL
    vasopressor: jax.Array  # [] int32 level given in the step before; 0 at admission
    fluid: jax.Array  # [] int32
    step: jax.Array  # [] int32 steps since admission
    past: ObservationHistory | None = None  # as many rows as the policy needs


PolicyFn = Callable[[jax.Array, Observation], jax.Array]
"""`(key, observation) -> [25]` probabilities for one patient; environments use `jax.vmap`."""


def as_pytree(policy: PolicyFn) -> jax.tree_util.Partial:
    """A policy whose arrays are leaves, so that new arrays need no new compilation.

    A plain function is static; a PyTree that can be called keeps its leaves.
    """
    if isinstance(policy, jax.tree_util.Partial):
        return policy
    if jax.tree_util.all_leaves([policy]):
        return jax.tree_util.Partial(policy)
    return jax.tree_util.Partial(_caller(type(policy)), policy)  # type: ignore[arg-type]


@cache
def _caller(kind: type) -> Callable[..., jax.Array]:
    """A function of its own for every class: JAX may confuse classes, but not functions."""
    del kind

    def call(policy: PolicyFn, key: jax.Array, observation: Observation) -> jax.Array:
        return policy(key, observation)

    return call


INVALID_ACTION = -2  # stands for the draw from what is no distribution over the actions
_SUM = 1e-3  # by which a sum of probabilities may differ from 1


def draw_action(
    policy: PolicyFn,
    key: jax.Array,
    observation: Observation,
    num_actions: int = schema.NUM_ACTIONS,
) -> Int[Array, ""]:
    """[] int32 action of one patient, drawn from a policy; the key is consumed.

    `INVALID_ACTION` where the policy gives no `num_actions` finite probabilities that sum to 1:
    compiled programs cannot raise an error, and `refuse_invalid` does once they have run.

    Raises:
      InputError: the policy gives an array of another shape.
    """
    own, draw = jax.random.split(key)
    probs = jnp.asarray(policy(own, observation))
    if probs.shape != (num_actions,):
        raise InputError(
            f"policy: gives an array of shape {probs.shape}, expected ({num_actions},), "
            "the probabilities of the actions"
        )
    fair = jnp.isfinite(probs).all() & (probs >= 0).all() & (jnp.abs(probs.sum() - 1) < _SUM)
    action = jax.random.categorical(draw, jnp.log(probs)).astype(jnp.int32)
    return jnp.where(fair, action, INVALID_ACTION)


def refuse_invalid(bad: np.ndarray | jax.Array, num_actions: int = schema.NUM_ACTIONS) -> None:
    """Raises an error where a policy gave no distribution.

    Args:
      bad: bool of any shape, for each draw whether it was invalid; not traced.
      num_actions: that the policy chooses from.

    Raises:
      InputError: one of them is true.
    """
    count = int(np.asarray(bad).sum())
    if count:
        raise InputError(
            f"policy: in {count} of {bad.size} cases it gives no {num_actions} finite "
            "probabilities that sum to 1 (NaN, infinite or negative ones, or another sum); no "
            "action can be drawn from them"
        )


def recent(observation: Observation, past: int) -> Observation:
    """The observation with only its newest `past` rows; leaves may have leading axes.

    Raises:
      InputError: the observation does not look back so far.
    """
    if not past:
        return replace(observation, past=None)
    rows = 0 if observation.past is None else observation.past.valid.shape[-1]
    if rows < past:
        raise InputError(
            f"a policy looks back on {past} rows, but sees {rows}; make the environment with "
            f"past={past}"
        )
    axis = observation.step.ndim
    newest = jax.tree.map(
        lambda leaf: jax.lax.slice_in_dim(leaf, rows - past, rows, axis=axis), observation.past
    )
    return replace(observation, past=newest)


def observation_at(
    episodes: Episodes, stay: Int[Array, "*#b"], step: Int[Array, "*#b"], *, past: int = 0
) -> Observation:
    """What was seen in recorded rows, leaves [..., ...]; undefined after the end of a stay.

    Args:
      episodes: the stays.
      stay, step: int32 indices that broadcast to [...].
      past: rows H of `Observation.past`; 0 leaves it out.
    """
    stay, step = jnp.broadcast_arrays(jnp.asarray(stay), jnp.asarray(step))

    def before(levels: jax.Array) -> jax.Array:
        return jnp.where(step > 0, levels[stay, jnp.maximum(step - 1, 0)], 0)

    return Observation(
        dynamic=episodes.dynamic[stay, step],
        measured=episodes.measured[stay, step],
        static=episodes.static[stay],
        ventilated=episodes.ventilated[stay, step],
        sofa=episodes.sofa[stay, step],
        urine_24h=episodes.urine_24h[stay, step],
        vasopressor=before(episodes.vasopressor),
        fluid=before(episodes.fluid),
        step=step,
        past=_observation_history_at(episodes, stay, step, past) if past else None,
    )


def observations(episodes: Episodes, *, past: int = 0) -> Observation:
    """What was seen in every row, leaves [N, T, ...]; undefined on padding."""
    stays, steps = jnp.arange(episodes.num_stays), jnp.arange(episodes.num_steps)
    return observation_at(episodes, stays[:, None], steps, past=past)


def _observation_history_at(
    episodes: Episodes, stay: jax.Array, step: jax.Array, rows: int
) -> ObservationHistory:
    index = step[..., None] + jnp.arange(1 - rows, 1)
    valid = index >= 0
    given = valid.at[..., -1].set(False)  # the treatment of the newest row is not known yet

    def look_back(leaf: jax.Array, kept: jax.Array) -> jax.Array:
        picked = leaf[stay[..., None], jnp.maximum(index, 0)]
        kept = kept.reshape(*kept.shape, *(1,) * (picked.ndim - kept.ndim))
        return jnp.where(kept, picked, jnp.zeros((), leaf.dtype))

    return ObservationHistory(
        dynamic=look_back(episodes.dynamic, valid),
        measured=look_back(episodes.measured, valid),
        vasopressor=look_back(episodes.vasopressor, given),
        fluid=look_back(episodes.fluid, given),
        valid=valid,
    )


_LARGEST = 5.0  # z-scores beyond are outliers that a small model should not chase
_STEPS = 20.0  # unit of time
_TOP_LEVEL = schema.NUM_LEVELS - 1
_EXTRA = 6
_LARGEST_SOFA = 24.0

NUM_STATE_FEATURES = 1 + schema.NUM_FEATURES + schema.NUM_STATIC + _EXTRA  # 49


def state_features(observation: Observation, scaler: Scaler) -> Float[Array, "*batch 49"]:
    """[..., 49] features of what is known before the treatment.

    A constant, z-scored measurements and static features, ventilation, SOFA, the levels of the
    step before, and time.

    Args:
      observation: leaves [..., ...].
      scaler: of measurements and static features.
    """
    time = observation.step / _STEPS
    extra = [
        observation.ventilated.astype(jnp.float32),
        observation.sofa / 10.0,
        observation.vasopressor / _TOP_LEVEL,
        observation.fluid / _TOP_LEVEL,
        time,
        time**2,
    ]
    blocks = [
        jnp.ones((*observation.step.shape, 1)),
        jnp.clip(scaler.normalize(observation.dynamic), -_LARGEST, _LARGEST),
        jnp.clip(scaler.normalize_static(observation.static), -_LARGEST, _LARGEST),
        jnp.stack(extra, -1),
    ]
    return jnp.concatenate(blocks, -1)


def state_feature_bounds(
    last_step: int,
) -> tuple[Float[np.ndarray, " 49"], Float[np.ndarray, " 49"]]:
    """Lower and upper bounds [49] of `state_features` in rows up to `last_step`."""
    time = last_step / _STEPS
    scores = schema.NUM_FEATURES + schema.NUM_STATIC
    low = [0.0, *[-_LARGEST] * scores, *[0.0] * _EXTRA]
    high = [1.0, *[_LARGEST] * scores, 1.0, _LARGEST_SOFA / 10.0, 1.0, 1.0, time, time**2]
    return np.asarray(low, np.float32), np.asarray(high, np.float32)
