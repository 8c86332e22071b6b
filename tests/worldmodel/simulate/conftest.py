"""A small world model for rollouts."""

import jax
import pytest

from tests.toy import toy_episodes
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler

# The reference variant answers to treatment as it is initialised.
CONFIG = ModelConfig(variant="reference", hidden=8, layers=1, embed=4, head=4)


@pytest.fixture(scope="package")
def episodes():
    return toy_episodes(12, 14)


@pytest.fixture(scope="package")
def world(episodes):
    return init_world_model(jax.random.key(3), Scaler.fit(episodes, split=None), CONFIG)


@pytest.fixture(scope="package")
def ensemble(episodes):
    return init_world_model(jax.random.key(4), Scaler.fit(episodes, split=None), CONFIG, members=2)
