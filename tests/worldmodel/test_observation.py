"""Observations of a patient are the same from records, world model and synthetic world."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toy import toy_episodes
from worldmodel import schema, struct
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.observation import as_pytree, observation_at, observations
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import observe, start_history

SMALL = ModelConfig(variant="residual", hidden=4, layers=1, embed=2, head=2)


def test_an_observation_by_hand():
    episodes = toy_episodes(5, 8)
    seen = observation_at(episodes, jnp.array([0]), jnp.array([3]), past=6)
    assert seen.vasopressor[0] == episodes.vasopressor[0, 2]
    assert seen.fluid[0] == episodes.fluid[0, 2]
    np.testing.assert_array_equal(seen.dynamic[0], episodes.dynamic[0, 3])
    assert seen.past.valid[0].tolist() == [False, False, True, True, True, True]
    np.testing.assert_array_equal(seen.past.dynamic[0, 2:], episodes.dynamic[0, :4])
    assert not np.asarray(seen.past.dynamic[0, :2]).any()
    # What the newest row is given is not known when it is chosen.
    assert seen.past.fluid[0, 2:].tolist() == [*episodes.fluid[0, :3].tolist(), 0]
    first = observation_at(episodes, jnp.array([0]), jnp.array([0]))
    assert (first.vasopressor[0], first.fluid[0], first.past) == (0, 0, None)


def test_observations_are_those_of_every_row():
    episodes = toy_episodes(5, 8)
    everywhere = observations(episodes, past=3)
    at = observation_at(episodes, jnp.array([4, 2]), jnp.array([1, 0]), past=3)
    for whole, part in zip(jax.tree.leaves(everywhere), jax.tree.leaves(at), strict=True):
        np.testing.assert_array_equal(np.asarray(whole)[[4, 2], [1, 0]], part)


@pytest.mark.parametrize("past", [0, 3, schema.OUTCOME_WINDOW])
def test_a_world_model_shows_recorded_rows_as_recorded(past):
    episodes = toy_episodes(6, 9)
    world = init_world_model(jax.random.key(0), Scaler.fit(episodes, split=None), SMALL)
    step = np.asarray(episodes.length) - 1
    found = observe(world, start_history(world, episodes, step, recorded_sofa=True), past=past)
    want = observation_at(episodes, jnp.arange(6), jnp.asarray(step), past=past)
    urine = want.dynamic[:, schema.URINE]
    np.testing.assert_allclose(found.dynamic[:, schema.URINE], urine, rtol=1e-3, atol=0.5)
    for name in ("measured", "static", "ventilated", "sofa", "vasopressor", "fluid", "step"):
        np.testing.assert_allclose(getattr(found, name), getattr(want, name), rtol=1e-4, atol=1e-3)
    if past:
        for name in ("measured", "vasopressor", "fluid", "valid"):
            np.testing.assert_array_equal(getattr(found.past, name), getattr(want.past, name))
        np.testing.assert_allclose(
            found.past.dynamic[..., : schema.URINE],
            want.past.dynamic[..., : schema.URINE],
            rtol=1e-3, atol=1e-2,
        )  # fmt: skip


def test_policies_as_pytrees():
    @struct.dataclass
    class Constant:
        probs: jax.Array

        def __call__(self, key, observation):
            return self.probs

    constant = as_pytree(Constant(jnp.ones(25)))
    assert len(jax.tree.leaves(constant)) == 1
    np.testing.assert_array_equal(constant(None, None), np.ones(25))
    assert as_pytree(constant) is constant
    plain = as_pytree(lambda key, observation: key)
    assert not jax.tree.leaves(plain) and plain(3, None) == 3
