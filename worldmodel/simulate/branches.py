"""How branches are treated and what noise they meet, by patient, step, plan and sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import History, view_of
from worldmodel.simulate.noise import branch_key, policy_key, state_noise
from worldmodel.simulate.play import Now, Shape
from worldmodel.view import Policy, draw_action

Treat = Callable[[jax.Array, Now], jax.Array]
Noise = Callable[[jax.Array], jax.Array]


def under_plans(plans: jax.Array) -> Treat:
    """Treatment by plans [P, K, H] of joint actions."""
    return lambda h, now: plans[:, :, h][..., None]


def under_policy(
    policy: Policy,
    world_model: WorldModel,
    key: jax.Array,
    start: History,
    samples: jax.Array,
    *,
    past: int,
) -> Treat:
    """Treatment drawn from a policy, with a key per patient, step and sample.

    Args:
      policy: `(key, view) -> [25]`.
      world_model: whose scaler the view needs.
      key: of the whole simulation.
      start: P patients.
      samples: [S] sample numbers.
      past: rows of `View.past` that the policy asks for.
    """
    shape = (start.step.shape[0], 1, samples.shape[0])

    @jax.named_scope("policy")
    def treat(h: jax.Array, now: Now) -> jax.Array:
        assert now.history is not None
        view = view_of(world_model, now.history, past=past)
        keys = _branch_keys(key, start, h, jnp.zeros(1, jnp.int32), samples).reshape(-1)
        action = jax.vmap(partial(draw_action, policy))(jax.vmap(policy_key)(keys), view)
        return action.reshape(shape)

    return treat


def drawn_noise(
    key: jax.Array,
    start: History,
    samples: jax.Array,
    shape: Shape,
    horizon: int,
    *,
    common: bool,
) -> Noise:
    """Standard normals [P, K, S, 39] of each step, [P, 1, S, 39] where all plans share them."""
    plan_ids = jnp.zeros(1, jnp.int32) if common else jnp.arange(shape[1])

    @jax.named_scope("sampling")
    def draw(h: jax.Array) -> jax.Array:
        keys = _branch_keys(key, start, h, plan_ids, samples)
        return jax.vmap(state_noise)(keys.reshape(-1)).reshape(*keys.shape, -1)

    # Drawn by a loop of their own, and one of at least two turns: otherwise XLA would draw them
    # again under every plan and for everything that reads them.
    drawn = jax.lax.map(draw, jnp.arange(max(horizon, 2)))
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
