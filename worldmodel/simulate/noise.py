"""Keys of simulated branches: by patient, step and sample, never by position in a batch."""

from __future__ import annotations

import jax

from worldmodel import schema

_NOISE_STREAM, _POLICY_STREAM, _OUTCOME_STREAM = 0, 1, 2


def branch_key(
    key: jax.Array,
    patient: jax.Array,
    step: jax.Array,
    sample: jax.Array,
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


def state_noise(key: jax.Array) -> jax.Array:
    """[39] standard normals of a branch's step."""
    return jax.random.normal(jax.random.fold_in(key, _NOISE_STREAM), (schema.NUM_FEATURES,))


def policy_key(key: jax.Array) -> jax.Array:
    """The key that a policy gets in a branch's step."""
    return jax.random.fold_in(key, _POLICY_STREAM)


def outcome_chance(key: jax.Array) -> jax.Array:
    """[] uniform in [0, 1), the luck of an outcome that is drawn."""
    return jax.random.uniform(jax.random.fold_in(key, _OUTCOME_STREAM))
