"""Policies on disk: every kind comes back prescribing the same."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from policy.base import feature_width
from policy.checkpoint import MARKER, load_policy, save_policy
from policy.clinician_models import GRU, MLP, Clusters, Logistic, uncalibrated
from policy.offline.algorithms import NAMES, OfflineConfig, Perceptron
from policy.offline.data import transitions
from policy.offline.training import train_offline
from policy.planner import Planner, PlannerConfig
from policy.planner_advantage import untrained_advantage
from policy.ppo import OnlinePolicy, PPOConfig
from policy.simple import Constant, GuidelineRules, RandomPolicy
from tests.toy import toy_episodes
from worldmodel.errors import InputError
from worldmodel.files import read_json, write_json
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler

EPISODES = toy_episodes(20, 8)
SCALER = Scaler.fit(EPISODES, split=None)
KEY = jax.random.key(0)


def offline(name):
    config = OfflineConfig(algorithm=name, hidden=(8,), updates=20, batch_size=16, seeds=2, past=3)
    return train_offline(transitions(EPISODES, SCALER, past=3), SCALER, config).policy


def online():
    config = PPOConfig(hidden=(8, 4), past=2)
    actor = Perceptron(feature_width(2), (8, 4), 25, rngs=nnx.Rngs(3))
    return OnlinePolicy(actor, SCALER, config, temperature=0.7)


def clusters():
    centers = jax.random.normal(KEY, (4, 59))
    return Clusters(SCALER, uncalibrated(), centers, jax.nn.log_softmax(centers[:, :25]))


def planner():
    world = init_world_model(
        KEY, SCALER, ModelConfig(variant="reference", hidden=8, layers=1, embed=4, head=4)
    )
    advantage = untrained_advantage(SCALER)
    advantage = replace(advantage, effects=jnp.arange(8.0), doses=advantage.doses + 0.3)
    clinician = MLP.initial(KEY, SCALER, 5)
    return Planner(world, advantage, clinician, PlannerConfig(temperature=0.5))


POLICIES = {
    "random": RandomPolicy,
    "constant": lambda: Constant(7),
    "guideline": lambda: GuidelineRules(later_fluid=3),
    "logistic": lambda: Logistic.initial(KEY, SCALER, 0),
    "mlp": lambda: MLP.initial(KEY, SCALER, 6),
    "gru": lambda: GRU.initial(KEY, SCALER, 6),
    "clusters": clusters,
    "online": online,
    "planner": planner,
    **{name: (lambda name=name: offline(name)) for name in NAMES},
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_comes_back_as_it_was(tmp_path, name):
    policy = POLICIES[name]()
    folder = save_policy(policy, tmp_path / "policy", manifest={"made_by": "a test"})
    loaded = load_policy(folder)
    assert type(loaded) is type(policy) and loaded.past == policy.past
    want = policy.action_probs(EPISODES)
    np.testing.assert_allclose(loaded.action_probs(EPISODES), want, atol=1e-6)
    prescriptions = np.unique(want[np.asarray(EPISODES.valid)], axis=0)
    assert len(prescriptions) > 1 or name in ("random", "constant")
    assert read_json(folder / MARKER)["made_by"] == "a test"


def test_damage_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_policy(tmp_path / "nowhere")
    folder = save_policy(offline("cql"), tmp_path / "policy")
    with pytest.raises(InputError, match="not a policy"):
        write_json(tmp_path / "other" / MARKER, {"kind": "else"})
        load_policy(tmp_path / "other")
    manifest = read_json(folder / MARKER)
    for change, message in (
        ({"class": "Oracle"}, "'Oracle' are unknown"),
        ({"schema_version": -1}, "train the policy again"),
        ({"settings": {}}, "field missing"),
    ):
        write_json(folder / MARKER, {**manifest, **change})
        with pytest.raises(InputError, match=message):
            load_policy(folder)
    smaller = {**manifest["settings"]["config"], "hidden": [4]}
    write_json(
        folder / MARKER, {**manifest, "settings": {**manifest["settings"], "config": smaller}}
    )
    with pytest.raises(InputError, match="another model configuration"):
        load_policy(folder)


def test_strangers_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be saved"):
        save_policy(lambda key, observation: None, tmp_path / "policy")
