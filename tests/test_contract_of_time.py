"""One contract of time, which records, synthetic world, simulator and environment keep.

Row t is what is known before treatment t begins: no treatment from t on changes it, and its SOFA
scores its own values and the vasopressor of the step before.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepsis_jax.cohort import CohortOptions, build_cohort
from tests.sepsis_jax.cohort.tiny import NOREPINEPHRINE, Tiny
from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.clinical import sofa
from worldmodel.envs import FollowActions, SepsisEnv, unroll
from worldmodel.episode_files import load_episodes
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import rollout
from worldmodel.synthetic import generate
from worldmodel.synthetic.truth import counterfactual

STEPS = 6
FIRST = np.array([0, 2, 0, 1, 4, 0])  # levels of the vasopressor in the steps of a stay
DOSES = np.asarray(schema.level_doses(schema.DEFAULT_DOSE_EDGES.vasopressor))


class Rows(NamedTuple):
    """Rows of one stay, and the vasopressor doses given from each to the next."""

    dynamic: np.ndarray  # [T, 39]
    ventilated: np.ndarray  # [T]
    sofa: np.ndarray  # [T]
    dose: np.ndarray  # [T] mcg/kg/min


def of_episodes(episodes):
    return Rows(
        *(
            np.asarray(getattr(episodes, name))[0, :STEPS]
            for name in ("dynamic", "ventilated", "sofa", "vasopressor_dose")
        )
    )


def records(levels, folder):
    """The cohort of a hospital in which infusions follow the plan."""
    tiny = Tiny()
    stay = tiny.septic_stay(1)
    for step, level in enumerate(levels):
        tiny.output(stay, 4 * step + 1, 150.0)
        if level:
            tiny.pressor(stay, 4 * step + 1, 4 * step + 3, NOREPINEPHRINE, DOSES[level])
    number = len(list(folder.iterdir()))
    data = tiny.write(folder / f"data{number}")
    options = CohortOptions(split=(1.0, 0.0, 0.0), threads=1, memory_limit="1GB")
    return of_episodes(
        load_episodes(build_cohort(data, folder / f"episodes{number}", options).path)
    )


def synthetic_world(levels, folder):
    del folder
    episodes, truth = generate(jax.random.key(5), 64, keep_latent=False)
    stay = int(np.argmax(np.asarray(episodes.length)))
    plans = np.full((64, truth.config.horizon), -1)
    plans[:, :STEPS] = levels * schema.NUM_LEVELS
    futures, _ = counterfactual(truth, plans)
    return of_episodes(futures.select(np.array([stay])))


def small_model(variant):
    episodes = toy_episodes(4, STEPS + 2)
    config = ModelConfig(variant=variant, hidden=8, head=4)
    world = init_world_model(jax.random.key(3), Scaler.fit(episodes, split=None), config)
    if variant == "recurrent":
        # Certain, so that the probability of ventilation that a rollout returns is what was drawn.
        world.state_model.vent.bias[...] = world.state_model.vent.bias[...] + 50.0
    return world, episodes.select(np.array([0]))


def simulator(levels, folder, variant="recurrent"):
    """A rollout from row 0, which is scored as simulated rows are."""
    del folder
    world, episodes = small_model(variant)
    start = start_history(world, episodes, 0)
    plans = levels[None, :-1] * schema.NUM_LEVELS
    found = rollout(
        world, jax.random.key(0), start, plans, samples=1, features=schema.FEATURE_NAMES
    )
    values = np.concatenate([episodes.dynamic[:, 0], found.values[0, 0, 0]])
    ventilated = np.concatenate([episodes.ventilated[:, 0], found.ventilation[0, 0, 0] > 0.5])
    score = np.concatenate([start.sofa, found.sofa[0, 0, 0]])
    return Rows(values, ventilated, score, DOSES[levels])


def environment(levels, folder, make):
    del folder
    env = make()

    @jax.jit
    def play(actions):
        return unroll(env, FollowActions(actions), jax.random.key(2), num_steps=STEPS - 1)[1]

    played = play(jnp.asarray(levels[:-1] * schema.NUM_LEVELS))
    seen = jax.tree.map(
        lambda first, later: np.concatenate([np.asarray(first)[None], later]),
        played.first.observation,
        played.timesteps.observation,
    )
    return Rows(seen.dynamic, seen.ventilated, seen.sofa, DOSES[levels])


def learned():
    return SepsisEnv.learned(*small_model("residual"))


SOURCES = {
    "records": records,
    "synthetic world": synthetic_world,
    "simulator, recurrent": simulator,
    "simulator, windows": partial(simulator, variant="residual"),
    "environment, synthetic": partial(environment, make=SepsisEnv.synthetic),
    "environment, learned": partial(environment, make=learned),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_row_knows_nothing_of_its_treatment(name, tmp_path):
    plan = SOURCES[name](FIRST, tmp_path)
    urine = sofa.urine_24h(jnp.asarray(plan.dynamic[:, schema.URINE]))
    score = sofa.standard(
        plan.dynamic,
        ventilated=plan.ventilated,
        vasopressor_dose=np.concatenate([[0.0], plan.dose[:-1]]),
        urine_24h=urine,
    )
    np.testing.assert_array_equal(plan.sofa, score.total)
    assert (plan.dose > 0).tolist() == (FIRST > 0).tolist()

    changed = 3
    other = SOURCES[name](np.where(np.arange(STEPS) < changed, FIRST, 4 - FIRST), tmp_path)
    for field in ("dynamic", "ventilated", "sofa"):
        one, two = getattr(plan, field)[: changed + 1], getattr(other, field)[: changed + 1]
        np.testing.assert_array_equal(one, two, err_msg=field)
    assert (plan.sofa[changed + 1 :] != other.sofa[changed + 1 :]).any()
