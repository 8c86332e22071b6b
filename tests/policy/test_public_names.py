"""The package's public names: every one resolves, and a session needs no deeper import."""

import subprocess
import sys

import numpy as np

import policy
from tests.toy import toy_episodes
from worldmodel.scaling import published_scaler


def test_every_public_name_is_there():
    assert sorted(policy._HOMES) == policy.__all__
    for name in policy.__all__:
        assert getattr(policy, name) is not None


def test_importing_the_package_imports_no_jax():
    code = "import policy, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_save_load_and_act(tmp_path):
    episodes, scaler = toy_episodes(num_stays=20, num_steps=6), published_scaler()
    config = policy.OfflineConfig(hidden=(8,), updates=20, batch_size=16, seeds=1)
    recorded = policy.transitions(episodes, scaler, past=config.past)
    learned = policy.train_offline(recorded, scaler, config).policy
    folder = policy.save_policy(learned, tmp_path / "iql")
    for name in (str(folder), "guideline"):
        _, found = policy.find(name)
        probs = np.asarray(found.action_probs(episodes))
        np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-5)
