"""The torch baseline plays by the same rules."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepsis_jax.benchmark.torch_model import load_torch
from sepsis_jax.benchmark.torch_runners import TorchRollout
from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import rollout

pytest.importorskip("torch")
pytestmark = pytest.mark.parity
HORIZON = 24


@pytest.fixture(scope="module")
def episodes():
    return toy_episodes(3, 14).select(np.arange(3))


def stirred(model, key):
    """Every parameter moved a little: heads that start at zero say nothing."""
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            leaf + 0.05 * jax.random.normal(k, leaf.shape)
            for leaf, k in zip(leaves, keys, strict=True)
        ],
    )


@pytest.mark.parametrize("variant", ["residual", "reference"])
@pytest.mark.parametrize("unrolled", [False, True])
def test_the_same_numbers_over_24_steps(episodes, variant, unrolled):
    config = ModelConfig(variant=variant, hidden=16, embed=4, head=4)
    world = init_world_model(jax.random.key(0), Scaler.fit(episodes, split=None), config)
    world = replace(world, state_model=stirred(world.state_model, jax.random.key(1)))
    start = start_history(world, episodes, np.minimum(np.asarray(episodes.length) - 1, 2))
    plans = np.random.default_rng(0).integers(0, 25, (1, HORIZON))
    noise = jax.random.normal(jax.random.key(2), (3, 1, HORIZON, 39))
    jax_result = rollout(world, jax.random.key(0), start, plans, noise=noise,
                   features=schema.FEATURE_NAMES)  # fmt: skip

    torch = load_torch("highest")
    torch_rollout = TorchRollout(torch, world, "cpu", compiled=False)
    for trunk in (torch_rollout.models.state, torch_rollout.models.outcome):
        trunk.unrolled = unrolled
    torch_result = torch_rollout.run(
        torch_rollout.start(start),
        torch.tensor(np.broadcast_to(plans, (3, HORIZON)).copy()),
        torch.tensor(np.array(noise[:, 0])),
    )
    z = world.scaler.normalize(jnp.asarray(jax_result.values[:, 0, 0]))
    np.testing.assert_allclose(torch_result["obs"], z, atol=1e-4)
    values = jax_result.values[:, 0, 0][..., [3, schema.INDEX["lactate"], schema.URINE]]
    np.testing.assert_allclose(torch_result["values"], values, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        torch_result["ventilation"], jax_result.ventilation[:, 0, 0], atol=1e-4
    )
    np.testing.assert_allclose(torch_result["mortality"], jax_result.mortality[:, 0, 0], atol=1e-4)
    np.testing.assert_array_equal(torch_result["projected"], jax_result.projected[:, 0, 0])
    np.testing.assert_array_equal(torch_result["sofa"], jax_result.sofa[:, 0, 0])
    np.testing.assert_allclose(torch_result["reward"], jax_result.reward[:, 0, 0], atol=1e-3)
    assert np.ptp(np.asarray(jax_result.sofa)) > 0 and np.asarray(jax_result.projected).sum() > 0
