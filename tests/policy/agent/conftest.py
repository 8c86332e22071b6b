"""A small pool: synthetic patients, and a small untrained world model that answers."""

import jax
import numpy as np
import pytest

from policy.agent.env_pool import EnvPool, reset_batch
from policy.agent.forecast import ForecastConfig, Forecaster
from worldmodel.envs.env import SepsisEnv
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import published_scaler
from worldmodel.synthetic import Config, patient_keys

STEPS, PATIENTS = 4, 8


@pytest.fixture(scope="session")
def world_model():
    """Two members."""
    config = ModelConfig(variant="residual", hidden=8, layers=1, embed=4, head=4)
    return init_world_model(jax.random.key(1), published_scaler(), config, members=2)


@pytest.fixture(scope="session")
def env():
    return SepsisEnv.synthetic(config=Config(past=Forecaster.past), max_steps=STEPS)


@pytest.fixture(scope="session")
def forecaster(world_model):
    return Forecaster(world_model, jax.random.key(2), ForecastConfig(samples=8))


@pytest.fixture(scope="session")
def make_ward(env, forecaster):
    """`make_ward()`: the same eight patients in the same random numbers, in some order of slots."""

    def make(order=range(PATIENTS), *, capacity=4, simulator=True):
        patients = np.asarray(order, np.int32)
        assert len(patients) == PATIENTS  # other numbers need other programs
        keys = patient_keys(jax.random.key(3), patients)
        batch = reset_batch(env, keys, patients)
        return EnvPool(env, batch, forecaster if simulator else None, capacity=capacity)

    return make
