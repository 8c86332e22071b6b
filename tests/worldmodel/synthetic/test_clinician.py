"""The clinician: known probabilities, full support, sensible reactions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from tests.worldmodel.synthetic.conftest import WORLD
from worldmodel import schema
from worldmodel.observation import Observation
from worldmodel.synthetic import Params, generate
from worldmodel.synthetic.clinician import ClinicianParams, probabilities


def observation(meanbp=75.0, lactate=1.5, vasopressor=0, step=3):
    fill = jnp.asarray(Params().observation.fill)
    fill = fill.at[schema.INDEX["meanbp"]].set(meanbp).at[schema.INDEX["lactate"]].set(lactate)
    return Observation(
        dynamic=fill,
        measured=jnp.ones(schema.NUM_MASKED, bool),
        static=jnp.array([64.0, 1.0, 5.0]),
        ventilated=jnp.bool_(False),
        sofa=jnp.float32(6),
        urine_24h=jnp.float32(1500),
        vasopressor=jnp.int32(vasopressor),
        fluid=jnp.int32(1),
        step=jnp.int32(step),
    )


def mean_levels(seen):
    joint = np.asarray(probabilities(seen, jnp.float32(0), ClinicianParams())).reshape(5, 5)
    return joint.sum(1) @ np.arange(5), joint.sum(0) @ np.arange(5)


def test_probabilities_are_a_distribution_with_full_support(world):
    episodes, truth = world
    probs = np.asarray(truth.probabilities)[np.asarray(episodes.valid)]
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)
    assert probs.min() >= 0.002 * (1 - 1e-5)
    chosen = np.take_along_axis(
        probs, np.asarray(episodes.action)[np.asarray(episodes.valid)][:, None], 1
    )[:, 0]
    np.testing.assert_array_equal(
        chosen, np.asarray(episodes.behavior_prob)[np.asarray(episodes.valid)]
    )


def test_frequencies_match_the_stated_probabilities(world):
    """Counts of each action against the sum of its probabilities, and by decile of them."""
    episodes, truth = world
    valid = np.asarray(episodes.valid)
    probs = np.asarray(truth.probabilities, np.float64)[valid]
    taken = np.eye(25)[np.asarray(episodes.action)[valid]]
    spread = np.sqrt((probs * (1 - probs)).sum(0))
    assert np.abs((taken.sum(0) - probs.sum(0)) / spread).max() < 4
    edges = np.quantile(probs, np.linspace(0, 1, 11)[1:-1])
    decile = np.searchsorted(edges, probs)
    for i in range(10):
        here = decile == i
        spread = np.sqrt((probs[here] * (1 - probs[here])).sum())
        assert abs(taken[here].sum() - probs[here].sum()) < 4 * spread


def test_reactions_are_sensible():
    assert mean_levels(observation(meanbp=52))[0] > mean_levels(observation(meanbp=75))[0] + 0.5
    assert mean_levels(observation(lactate=4))[1] > mean_levels(observation(lactate=1))[1]
    assert mean_levels(observation(step=0))[1] > mean_levels(observation(step=12))[1]
    weaned = mean_levels(observation(meanbp=85, vasopressor=3))[0]
    assert 2.0 < weaned < 2.9


def test_confounding_changes_the_records_not_the_truth():
    """A clinician who sees frailty treats the frail more: treatment then looks harmful."""
    plain, dialled = Params(), Params(clinician=replace(ClinicianParams(), confounding=0.8))
    (episodes, truth), (confounded, _) = (
        generate(WORLD, 3000, params=params) for params in (plain, dialled)
    )

    def contrast(recorded):
        first = np.asarray(recorded.fluid)[:, 0]
        died = np.asarray(recorded.died_90d)
        return died[first >= 3].mean() - died[first <= 1].mean()

    assert contrast(confounded) > contrast(episodes) + 0.08
    # Random numbers and traits of every patient are as before: the first row is the same.
    np.testing.assert_array_equal(episodes.dynamic[:, 0], confounded.dynamic[:, 0])
    _, hidden = generate(WORLD, 64, params=dialled)
    assert not np.allclose(hidden.probabilities[:, 0], truth.probabilities[:64, 0])
    assert jax.tree.structure(plain) == jax.tree.structure(dialled)
