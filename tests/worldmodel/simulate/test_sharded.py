"""Tasks over devices: the numbers of rollouts for any devices, order and task shape."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldmodel import schema
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.observation import Observation
from worldmodel.simulate import sharded
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import rollout
from worldmodel.simulate.sharded import (
    BRANCHES_PER_DEVICE,
    ShardedRollout,
    branch_mesh,
    branches_per_device,
    bytes_per_branch,
    rollout_block,
    task_shape,
)
from worldmodel.simulate.unroll import RolloutConfig

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
KEY = jax.random.key(5)
FEATURES = ("meanbp", "lactate", "creatinine")
PLANS = np.array([[0, 7, 24, 3], [12, 12, 3, 0], [24, 24, 24, 24]])


@pytest.fixture(scope="module")
def start(ensemble, episodes):
    long = np.flatnonzero(np.asarray(episodes.length) >= 9)[:4]
    return start_history(ensemble, episodes.select(long), np.arange(len(long)) % 3 + 1)


@pytest.fixture(scope="module")
def plans(start):
    return jnp.asarray(np.broadcast_to(PLANS, (len(start.step), *PLANS.shape)), jnp.int32)


def block(world, start, plans, *, branches, samples=6, settings=None, policy=None):
    settings = settings or RolloutConfig(horizon=4, features=FEATURES)
    num_plans = 1 if plans is None else plans.shape[1]
    shape = task_shape(len(start.step), num_plans, samples, world.num_members, branches=branches)
    sharded_rollout = ShardedRollout(world, branch_mesh(), shape, settings, policy)
    return rollout_block(sharded_rollout, KEY, start, plans, samples)


@pytest.fixture(scope="module")
def whole(ensemble, start, plans):
    return block(ensemble, start, plans, branches=1000)


def test_a_block_is_a_rollout_summed_up(ensemble, start, whole):
    want = rollout(ensemble, KEY, start, PLANS, samples=6, features=FEATURES)
    close = {"rtol": 1e-5, "atol": 1e-5}
    meanbp = np.asarray(want.feature("meanbp"))
    np.testing.assert_allclose(whole.final, want.values[..., -1, :], **close)
    np.testing.assert_allclose(whole.lowest_map, meanbp.min(-1), **close)
    np.testing.assert_allclose(whole.below_target, (meanbp < 65).mean(-1), **close)
    np.testing.assert_allclose(whole.shaping, want.reward.sum(-1), **close)
    np.testing.assert_allclose(whole.ventilation, want.ventilation.mean(-1), **close)
    np.testing.assert_allclose(whole.mortality, want.mortality, **close)
    np.testing.assert_allclose(whole.total_reward, want.total_reward, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(whole.sofa, want.sofa[..., -1])
    np.testing.assert_array_equal(whole.projected, want.projected)
    np.testing.assert_array_equal(whole.first_action, want.action[..., 0])
    vasopressor, fluid = schema.action_levels(np.asarray(want.action))
    np.testing.assert_allclose(whole.vasopressor, vasopressor.mean(-1), **close)
    np.testing.assert_allclose(whole.fluid, fluid.mean(-1), **close)


# One branch at a time is slow because of another program; 7 cuts patients and samples too.
@pytest.mark.parametrize("branches", [pytest.param(1, marks=pytest.mark.slow), 7, 20])
def test_the_cut_into_tasks_changes_no_number(ensemble, start, plans, whole, branches):
    got = block(ensemble, start, plans, branches=branches)
    for name in ("final", "sofa", "shaping", "mortality", "lowest_map", "projected"):
        np.testing.assert_allclose(
            getattr(got, name), getattr(whole, name), rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_a_policy_is_played_as_in_rollouts(ensemble, start):
    def follows_lactate(key: jax.Array, observation: Observation) -> jax.Array:
        return jax.nn.softmax(jnp.arange(25.0) * (observation.dynamic[schema.INDEX["lactate"]] - 2))

    got = block(ensemble, start, None, branches=8, policy=follows_lactate)
    want = rollout(ensemble, KEY, start, follows_lactate, horizon=4, samples=6, features=FEATURES)
    np.testing.assert_array_equal(got.first_action, want.action[..., 0])
    np.testing.assert_allclose(got.final, want.values[..., -1, :], rtol=1e-5, atol=1e-5)


def test_the_outcome_may_be_left_out(ensemble, start, plans):
    settings = RolloutConfig(horizon=4, features=FEATURES, mortality=False)
    assert np.isnan(block(ensemble, start, plans, branches=100, settings=settings).mortality).all()


@pytest.mark.parametrize(
    ("patients", "plans", "samples", "members", "branches", "shape"),
    [
        (1, 25, 1000, 1, 512, (1, 25, 20)),
        (1, 25, 999, 3, 512, (1, 25, 20)),  # 333 samples of a member in 17 parts
        (64, 25, 2, 1, 512, (10, 25, 2)),
        (3, 1, 100, 1, 512, (3, 1, 100)),
        (5, 600, 4, 2, 512, (1, 600, 1)),
    ],
)
def test_task_shapes(patients, plans, samples, members, branches, shape):
    assert task_shape(patients, plans, samples, members, branches=branches) == shape


def test_tasks_cover_a_block(ensemble):
    tasks = list(sharded._tasks(5, 14, 2, (2, 3, 4)))
    assert all(task.patients.shape == (2,) and task.samples.shape == (4,) for task in tasks)
    seen = {(p, s) for task in tasks for p in task.patients for s in task.samples}
    assert seen == {(p, s) for p in range(5) for s in range(14)}
    assert all((task.samples % 2 == task.member).all() for task in tasks)


_ON_DEVICES = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 3)
import jax.numpy as jnp
from tests.toy import toy_episodes
from tests.worldmodel.simulate.conftest import CONFIG
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.sharded import ShardedRollout, branch_mesh, rollout_block
from worldmodel.simulate.unroll import RolloutConfig
episodes = toy_episodes(12, 14)
world = init_world_model(jax.random.key(4), Scaler.fit(episodes, split=None), CONFIG, members=2)
start = start_history(world, episodes, 0)
plans = jnp.broadcast_to(jnp.arange(25)[:, None], (12, 25, 3))
devices = jax.devices()
assert len(devices) == 3
for name, some in {"one": devices[:1], "two": devices[:2], "turned": devices[::-1]}.items():
    sharded = ShardedRollout(world, branch_mesh(some), (5, 25, 2), RolloutConfig(horizon=3))
    block = rollout_block(sharded, jax.random.key(5), start, plans, 6)
    np.savez(f"{sys.argv[1]}/{name}.npz", *jax.tree.leaves(block))
"""


def test_devices_and_their_order_change_no_bit(tmp_path):
    """A sweep's test compares processes that have two and three devices."""
    flags = re.sub(r"--xla_force_host\S*", "", os.environ.get("XLA_FLAGS", ""))
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", _ON_DEVICES, tmp_path], check=True, env=environment)
    found = {name: np.load(tmp_path / f"{name}.npz") for name in ("one", "two", "turned")}
    for leaf in found["two"].files:
        two = found["two"][leaf]
        np.testing.assert_array_equal(found["turned"][leaf], two)
        np.testing.assert_allclose(found["one"][leaf], two, rtol=1e-5, atol=1e-5)


def compiled():
    """Rollouts that compilers for GPUs and TPUs planned: figures of a row, platform, branches."""
    for file, rows, platform, branches in (
        ("compile_gpu", "rollouts", "gpu", "branches"),
        ("compile_tpu", "topologies", "tpu", "branches_per_chip"),
    ):
        found = json.loads((BENCHMARKS / f"{file}.json").read_text())
        for row in found[rows]:
            yield {"variant": found.get("variant"), **row}, platform, row[branches]


@pytest.mark.parametrize(("row", "platform", "branches"), list(compiled()))
def test_memory_of_a_call_is_what_compilers_plan(row, platform, branches):
    config = ModelConfig(variant=row["variant"])
    planned = row["bytes"]["temporaries"] + row["bytes"]["outputs"]
    foretold = branches * bytes_per_branch(config, platform, row["kernel"])
    assert foretold == pytest.approx(planned, rel=0.15)


def test_a_device_simulates_as_many_branches_as_it_holds():
    small, wide = ModelConfig(), ModelConfig(hidden=1024)
    sizes = partial(branches_per_device, platform="gpu", kernel="xla")
    assert sizes(small, memory=80 * 2**30) == BRANCHES_PER_DEVICE["gpu"]
    assert sizes(small, memory=2**29) == 65_536  # 0.43 GB of it hold 68,000
    assert sizes(wide, memory=2**29) == 8_192
    assert sizes(small, memory=None) == BRANCHES_PER_DEVICE["gpu"]
    assert branches_per_device(wide, "cpu", "xla", 2**20) == BRANCHES_PER_DEVICE["cpu"]
