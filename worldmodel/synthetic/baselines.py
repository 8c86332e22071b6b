"""Simple in-graph policies that bracket the clinician: for checks, not for patients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from worldmodel import schema
from worldmodel.view import View

_AT = schema.INDEX


def random_policy(key: jax.Array, view: View) -> jax.Array:
    """All 25 actions alike."""
    del key, view
    return jnp.full(schema.NUM_ACTIONS, 1.0 / schema.NUM_ACTIONS)


def no_treatment(key: jax.Array, view: View) -> jax.Array:
    """Neither drug, ever."""
    del key, view
    return jax.nn.one_hot(0, schema.NUM_ACTIONS)


def maximum_treatment(key: jax.Array, view: View) -> jax.Array:
    """The highest level of both drugs, always."""
    del key, view
    return jax.nn.one_hot(schema.NUM_ACTIONS - 1, schema.NUM_ACTIONS)


def titration(key: jax.Array, view: View) -> jax.Array:
    """Early fluid, then vasopressor titrated to a MAP of 65 to 78 mmHg and weaned at once."""
    del key
    pressure, lactate = view.dynamic[_AT["meanbp"]], view.dynamic[_AT["lactate"]]
    urine = view.dynamic[_AT["output_4hourly"]]
    change = (
        (pressure < 68).astype(jnp.int32)
        + (pressure < 58)
        - (pressure > 80)
        - (pressure > 92)
    )  # fmt: skip
    vasopressor = jnp.clip(view.vasopressor + change, 0, 3)
    needs = (pressure < 65) | (lactate > 2.2) | (urine < 100)
    dry = view.dynamic[_AT["heart_rate"]] > 88
    early = jnp.where(needs, 4, 3)
    late = jnp.where(needs & dry, 2, 1)
    fluid = jnp.where(view.step < 2, early, jnp.where(view.step < 4, jnp.where(needs, 3, 2), late))
    return jax.nn.one_hot(schema.action_index(vasopressor, fluid), schema.NUM_ACTIONS)
