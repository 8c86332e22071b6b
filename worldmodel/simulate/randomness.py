"""Randomness of simulated branches: keys, noise, drawn actions, and abduction of noise.

Keys depend on patient, step and sample, never on the position in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from worldmodel import keys, schema
from worldmodel.errors import InputError
from worldmodel.models.world_model import WorldModel
from worldmodel.observation import PolicyFn, draw_action
from worldmodel.simulate.history import History, observe
from worldmodel.simulate.unroll import Shape, StepState


def branch_key(
    key: jax.Array,
    patient: Int[Array, ""],
    step: Int[Array, ""],
    sample: Int[Array, ""],
    plan: jax.Array | int = 0,
) -> jax.Array:
    """The key of one step of one branch.

    Args:
      key: of the whole simulation.
      patient: [] int32 identity.
      step: [] int32 row that is about to be treated, 0 at admission.
      sample: [] int32.
      plan: [] int32; 0 for all plans that share their noise.
    """
    folded = jax.random.fold_in(jax.random.fold_in(key, patient), step)
    return jax.random.fold_in(jax.random.fold_in(folded, sample), plan)


def state_noise(key: jax.Array, width: int = schema.NUM_FEATURES) -> Float[Array, " width"]:
    """[width] standard normals of a branch's step; see `WorldModel.noise_width`."""
    return jax.random.normal(jax.random.fold_in(key, keys.NOISE), (width,))


def policy_key(key: jax.Array) -> jax.Array:
    """The key that a policy gets in a branch's step."""
    return jax.random.fold_in(key, keys.POLICY_CHOICE)


def outcome_chance(key: jax.Array) -> Float[Array, ""]:
    """[] uniform in [0, 1) that decides an outcome that is drawn."""
    return jax.random.uniform(jax.random.fold_in(key, keys.OUTCOME))


def outcome_chances(key: jax.Array, count: int) -> jax.Array:
    """[count] uniforms in [0, 1) that decide how a step of a stay ends."""
    return jax.random.uniform(jax.random.fold_in(key, keys.OUTCOME), (count,))


Treat = Callable[[jax.Array, StepState], jax.Array]
Noise = Callable[[jax.Array], jax.Array]


def under_plans(plans: Int[Array, "P K H"]) -> Treat:
    """Treatment by plans [P, K, H] of joint actions."""
    return lambda h, now: plans[:, :, h][..., None]


def under_policy(
    policy: PolicyFn,
    world_model: WorldModel,
    key: jax.Array,
    start: History,
    samples: Int[Array, " S"],
    *,
    past: int,
) -> Treat:
    """Treatment drawn from a policy, with a key per patient, step and sample.

    Args:
      policy: `(key, observation) -> [25]`.
      world_model: whose scaler the observation needs.
      key: of the whole simulation.
      start: P patients.
      samples: [S] sample numbers.
      past: rows of `Observation.past` that the policy is given.
    """
    shape = (start.step.shape[0], 1, samples.shape[0])

    @jax.named_scope("policy")
    def treat(h: jax.Array, now: StepState) -> jax.Array:
        assert now.history is not None
        observation = observe(world_model, now.history, past=past)
        own_keys = _branch_keys(key, start, h, jnp.zeros(1, jnp.int32), samples).reshape(-1)
        action = jax.vmap(partial(draw_action, policy))(jax.vmap(policy_key)(own_keys), observation)
        return action.reshape(shape)

    return treat


CarryT = TypeVar("CarryT")
KeptT = TypeVar("KeptT")


def scan_some(
    step: Callable[[CarryT, jax.Array], tuple[CarryT, KeptT]],
    carry: CarryT,
    first: int,
    end: jax.Array | int,
    most: int,
) -> tuple[CarryT, KeptT]:
    """`jax.lax.scan` over `first`, ..., `end` - 1, where the end may be traced.

    Args:
      step: `(carry, h) -> (carry, kept)`.
      carry: before the first step.
      first: number of the first step.
      end: [] int32 number after the last one.
      most: bound on the end.

    Returns:
      The carry after the last step, and what was kept, leaves [most - first, ...]; zero from the
      end on.
    """
    _, like = jax.eval_shape(step, carry, jnp.int32(first))
    empty = jax.tree.map(lambda leaf: jnp.zeros((most - first, *leaf.shape), leaf.dtype), like)

    def body(h: jax.Array, state: tuple[CarryT, KeptT]) -> tuple[CarryT, KeptT]:
        carry, kept = step(state[0], h)
        written = jax.tree.map(
            lambda whole, one: jax.lax.dynamic_update_index_in_dim(whole, one, h - first, 0),
            state[1],
            kept,
        )
        return carry, written

    result: tuple[CarryT, KeptT] = jax.lax.fori_loop(first, end, body, (carry, empty))
    return result


def drawn_noise(
    key: jax.Array,
    start: History,
    samples: Int[Array, " S"],
    shape: Shape,
    horizon: int,
    *,
    common: bool,
    width: int = schema.NUM_FEATURES,
    steps: jax.Array | None = None,
) -> Noise:
    """Standard normals [P, K, S, width] of each step, [P, 1, S, width] where plans share them.

    With `steps` [] int32, only those of so many of the `horizon` steps are drawn.
    """
    plan_ids = jnp.zeros(1, jnp.int32) if common else jnp.arange(shape[1])

    @jax.named_scope("sampling")
    def draw(h: jax.Array) -> jax.Array:
        own_keys = _branch_keys(key, start, h, plan_ids, samples)
        return jax.vmap(partial(state_noise, width=width))(own_keys.reshape(-1)).reshape(
            *own_keys.shape, -1
        )

    # Drawn in a separate loop of at least two iterations: otherwise XLA would draw them again for
    # every plan and every use.
    if steps is None:
        drawn = jax.lax.map(draw, jnp.arange(max(horizon, 2)))
    else:
        _, drawn = scan_some(lambda none, h: (none, draw(h)), None, 0, steps, horizon)
    return lambda h: drawn[h]


def _branch_keys(
    key: jax.Array, start: History, h: jax.Array, plan_ids: jax.Array, samples: jax.Array
) -> jax.Array:
    """Keys [P, K or 1, S] by patient, step, sample and (if not common) plan."""

    def of(patient: jax.Array, step: jax.Array, plan: jax.Array, sample: jax.Array) -> jax.Array:
        return branch_key(key, patient, step + h, sample, plan)

    over_samples = jax.vmap(of, in_axes=(None, None, None, 0))
    over_plans = jax.vmap(over_samples, in_axes=(None, None, 0, None))
    return jax.vmap(over_plans, in_axes=(0, 0, None, None))(
        start.patient, start.step, plan_ids, samples
    )


def abduct_noise(
    world_model: WorldModel,
    start: History,
    plan: Int[Array, "P H"],
    recorded: Float[Array, "P H 39"],
) -> Float[Array, "P 1 H 39"]:
    """The noise that explains what was recorded: eps = (x' - mu) / sigma (Pearl's abduction).

    Replayed under the factual plan it gives back the factual rows; under another plan it gives
    the counterfactual ones.

    Args:
      world_model: of ensemble size 1.
      start: P patients.
      plan: [P, H] the treatments really given, joint actions.
      recorded: [P, H, 39] the rows that followed, z-scores.

    Returns:
      [P, 1, H, 39], for `rollout(..., samples=1, noise=...)`.

    Raises:
      InputError: the world model is an ensemble, or recurrent: which values would have been
        measured under another treatment is not in the record.
    """
    if world_model.is_recurrent:
        raise InputError("noise is abducted in models that read windows, not in the recurrent one")
    if world_model.num_members != 1:
        raise InputError("noise is abducted in one model; pick one with .member(i)")

    def step(history: History, inputs: tuple[jax.Array, jax.Array]) -> tuple[History, jax.Array]:
        action, obs = inputs
        history = history.choose(action)
        mu, log_sigma, _ = world_model.transition(*history.window(schema.STATE_WINDOW))
        urine = world_model.scaler.denormalize(obs)[:, schema.URINE]
        return history.append(obs, urine, history.ventilated), (obs - mu) * jnp.exp(-log_sigma)

    inputs = (jnp.moveaxis(jnp.asarray(plan), 1, 0), jnp.moveaxis(jnp.asarray(recorded), 1, 0))
    _, eps = jax.lax.scan(step, start, inputs)
    return jnp.moveaxis(eps, 0, 1)[:, None]
