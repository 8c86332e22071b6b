"""Weights & Biases of the trainers that keep their courses in files of their own."""

import sys
import time

import pytest

from policy.offline.algorithms import OfflineConfig
from sepsis_jax.pipelines.policy_comparison import compare_policies
from sepsis_jax.pipelines.policy_training import PPOOptions, train_policy
from sepsis_jax.pipelines.world_model import train
from tests.toy import toy_episodes
from worldmodel.configuration import from_mapping
from worldmodel.episode_files import save_episodes
from worldmodel.errors import InputError
from worldmodel.models.training import TrainConfig


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return save_episodes(toy_episodes(60, 6), tmp_path_factory.mktemp("runs") / "cohort")


def settings(cls, **values):
    return from_mapping(cls, values, source="test")


TINY = {
    "model": {"variant": "reference", "hidden": 4, "layers": 1, "embed": 4, "head": 4},
    "state": {"epochs": 1, "batch_size": 64},
    "outcome": {"epochs": 1},
}
PPO = {"hidden": [4], "iterations": 1, "patients": 4, "steps": 2, "minibatches": 1, "batch_size": 4}


@pytest.fixture
def sent(tmp_path, monkeypatch):
    """Whether a run was sent that has some figures; nothing leaves the machine."""
    monkeypatch.setenv("WANDB_PROJECT", "sepsis")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    def found(*figures):
        end = time.monotonic() + 60  # W&B writes in a process of its own
        while time.monotonic() < end:
            runs = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
            texts = [path.read_bytes() for path in runs]
            if any(all(figure.encode() in text for figure in figures) for text in texts):
                return True
            time.sleep(0.1)
        return False

    return found


def test_the_courses_of_a_world_model_and_of_a_policy_are_sent(cohort, tmp_path, sent):
    train(cohort, tmp_path / "model", settings(TrainConfig, **TINY))
    assert sent("state/validation_loss", "outcome/train_loss")
    offline = settings(OfflineConfig, updates=4, seeds=1, hidden=[4], batch_size=8)
    train_policy(cohort, tmp_path / "iql", "iql", offline)
    assert sent("iql/seed 0", "iql/update")


@pytest.mark.slow
def test_the_course_of_ppo_is_sent(cohort, tmp_path, sent):
    train(cohort, tmp_path / "model", settings(TrainConfig, **TINY))
    config = settings(PPOOptions, ppo=PPO)
    train_policy(cohort, tmp_path / "ppo", "ppo", config, model=tmp_path / "model")
    assert sent("ppo/update")


@pytest.mark.parametrize("trained", ["world model", "policy", "comparison"])
def test_what_cannot_be_sent_is_refused_before_training(trained, cohort, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "sepsis")
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="wandb is not installed"):
        if trained == "world model":
            train(cohort, out, TrainConfig())
        elif trained == "policy":
            train_policy(cohort, out, "iql", OfflineConfig())
        else:
            compare_policies(cohort, tmp_path / "model", out)
