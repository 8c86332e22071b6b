"""The Pallas kernel of the recurrent variant, interpreted, against the engine of XLA's kernels."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toy import toy_episodes
from tests.worldmodel.simulate.test_stays import random_world
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.randomness import under_plans
from worldmodel.simulate.sharded import ShardedRollout, branch_mesh, rollout_block
from worldmodel.simulate.stay_kernel import LAYOUTS, block_size
from worldmodel.simulate.stay_unroll import unroll_branches
from worldmodel.simulate.stays import FOLLOW_CLINICIAN
from worldmodel.simulate.unroll import RolloutConfig, RolloutSpec

ROOT = Path(__file__).resolve().parents[3]
PATIENTS, SAMPLES, HORIZON = 3, 48, 3  # more columns than one block of 128 holds
CONFIG = RolloutConfig(HORIZON, ("meanbp", "lactate", "gcs_eye", "output_4hourly"))


@pytest.fixture(scope="module")
def stays():
    return toy_episodes(12, 14)


@pytest.fixture(scope="module")
def world(stays):
    # The end of the window is within the horizon of some patients.
    return replace(random_world(stays, 1), stay_steps=4)


@pytest.fixture(scope="module")
def start(world, stays):
    return start_history(world, stays.select(np.arange(PATIENTS)), np.arange(PATIENTS))


def play(world, start, plans, config, policy=None, samples=SAMPLES):
    shape = (PATIENTS, 1 if plans is None else plans.shape[1], samples)
    sharded = ShardedRollout(world, branch_mesh(jax.devices()[:1]), shape, config, policy)
    plans = None if plans is None else jnp.asarray(plans)
    return rollout_block(sharded, jax.random.key(0), start, plans, samples)


@pytest.mark.parametrize(("platform", "changes"), [
    ("tpu", {"follow_clinician": True}), ("gpu", {"common_noise": False}),
], ids=str)  # fmt: skip
def test_both_kernels_give_the_same_branches(world, start, monkeypatch, platform, changes):
    layout = LAYOUTS[platform]._replace(blocks=(128,))
    monkeypatch.setitem(LAYOUTS, "cpu", layout)
    plans = np.random.default_rng(0).integers(0, 25, (PATIENTS, 2, HORIZON)).astype(np.int32)
    if changes.get("follow_clinician"):
        plans[:, 1, 1:] = FOLLOW_CLINICIAN
    config = replace(CONFIG, **changes)
    want, got = (play(world, start, plans, replace(config, kernel=k)) for k in ("xla", "pallas"))
    for field in fields(want):
        np.testing.assert_allclose(
            getattr(got, field.name), getattr(want, field.name),
            rtol=1e-5, atol=1e-5, err_msg=field.name,
        )  # fmt: skip


def test_operands_are_rounded_likewise(world, start):
    """One step in bfloat16: thresholds, which sums in another order may cross, come after it."""
    plans = np.full((PATIENTS, 1, 1), 7, np.int32)
    config = RolloutConfig(1, CONFIG.features, precision="bfloat16")
    want, got = (play(world, start, plans, replace(config, kernel=k)) for k in ("xla", "pallas"))
    np.testing.assert_allclose(got.alive, want.alive, rtol=1e-3)
    np.testing.assert_allclose(got.support, want.support, rtol=1e-3)
    same = np.isclose(got.final, want.final, rtol=1e-3, atol=1e-2).mean()
    assert same > 0.99


def test_blocks_are_as_large_as_the_chip_allows(world, stays):
    published = init_world_model(
        jax.random.key(0), Scaler.fit(stays, split=None), ModelConfig(variant="recurrent")
    )
    assert block_size(5000, 24, published, LAYOUTS["tpu"]) == 256
    assert block_size(5000, 60, published, LAYOUTS["tpu"]) == 128
    assert block_size(100, 24, published, LAYOUTS["tpu"]) == 128
    assert block_size(327, 24, published, LAYOUTS["tpu"]) == 128  # 256 would fill up 512
    assert block_size(5000, 1000, published, LAYOUTS["tpu"]) is None
    assert block_size(60, 24, published, LAYOUTS["tpu"]) is None


def test_what_it_is_not_for(world, start, stays):
    pallas = replace(CONFIG, kernel="pallas")
    plans = np.zeros((PATIENTS, 1, HORIZON), np.int32)
    with pytest.raises(InputError, match="no block of pallas suits 6 patients x samples"):
        play(world, start, plans, pallas, samples=2)
    shape = (PATIENTS, 1, SAMPLES)
    for platform, words in (("gpu", "bfloat16 or default precision"), ("rocm", "not compiled for")):
        with pytest.raises(InputError, match=words):
            spec = RolloutSpec(pallas, shape, under_plans(plans), lambda h: h, platform=platform)
            unroll_branches(world, start, spec)
    with pytest.raises(InputError, match="pallas simulates the recurrent variant"):
        windowed = ModelConfig(variant="reference", hidden=8, layers=1, embed=4, head=4)
        other = init_world_model(jax.random.key(3), Scaler.fit(stays, split=None), windowed)
        begin = start_history(other, stays.select(np.arange(PATIENTS)), 0)
        play(other, begin, plans, pallas)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no jax[tpu]")
def test_compiles_for_a_tpu_that_is_not_there(tmp_path):
    """Far less is moved than by XLA's kernels, and products are nearly those of its program."""
    script = [sys.executable, ROOT / "scripts" / "compile_tpu.py", "--json", tmp_path / "tpu.json"]
    few = ["--topologies", "v5e:2x2", "--horizon", "8"]
    subprocess.run([*script, *few], check=True, timeout=900)
    rows = json.loads((tmp_path / "tpu.json").read_text())["topologies"]
    xla, pallas = sorted(rows, key=lambda row: row["kernel"], reverse=True)
    assert 20 * pallas["bytes_per_branch_step"] < xla["bytes_per_branch_step"]
    assert 1.0 < pallas["flops_per_branch_step"] / xla["flops_per_branch_step"] < 1.5
    assert pallas["collectives"] == 0
