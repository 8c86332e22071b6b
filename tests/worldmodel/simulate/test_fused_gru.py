"""The fused GRU against whole windows: rollouts of 24 steps, every variant, shared or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import WorldModel, init_world_model
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.step import advance
from worldmodel.simulate.unroll import RolloutConfig, RolloutSpec, unroll

HORIZON = 24
SMALL = {"hidden": 16, "embed": 4, "head": 8, "dropout": 0.0}
CONFIGS = {
    "published": ModelConfig(variant="reference"),
    "residual": ModelConfig(variant="residual"),
    "one layer": ModelConfig(variant="residual", layers=1, **SMALL),
    "three layers": ModelConfig(variant="reference", layers=3, **SMALL),
    "one linear row": ModelConfig(variant="residual", linear_rows=1, **SMALL),
    "two linear rows": ModelConfig(variant="residual", linear_rows=2, **SMALL),
    "six linear rows": ModelConfig(variant="residual", linear_rows=6, **SMALL),
}


def shaken(config: ModelConfig, scaler: Scaler, members: int = 1) -> WorldModel:
    """A world whose every parameter matters, and in which patients return to their mean.

    Without that, as in a trained model, a loop of random weights would blow up rounding errors.
    """
    world = init_world_model(jax.random.key(0), scaler, config, members=members)
    leaves, structure = jax.tree.flatten((world.state_model, world.outcome_model))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        leaf + 0.01 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    state_model, outcome_model = jax.tree.unflatten(structure, leaves)
    if config.variant == "residual":
        kernel = state_model.autoregression.kernel[...]
        row = schema.NUM_FEATURES + schema.NUM_MASKED + schema.ACTION_WIDTH
        newest = kernel.shape[1] - schema.NUM_STATIC - row
        pull = jnp.zeros(kernel.shape[1:]).at[newest + jnp.arange(39), jnp.arange(39)].set(-0.4)
        state_model.autoregression.kernel[...] = kernel + pull
    return WorldModel(state_model, outcome_model, scaler, config)


@pytest.fixture(scope="module")
def episodes():
    return toy_episodes(12, 14)


@pytest.fixture(scope="module")
def start_rows(episodes):
    """Stays with few and with many rows before the start."""
    long = np.flatnonzero(np.asarray(episodes.length) >= 12)[:3]
    return episodes.select(long), np.array([0, 3, 11])


_step = jax.jit(advance, static_argnames="mode")


def whole_windows(world, start, plans, eps, mode):
    """[P, K, S, H, ...] by `advance`, every branch computed separately."""
    patients, num_plans, horizon = plans.shape
    samples = eps.shape[2]
    shape = (patients, num_plans, samples)

    def flat(leaf):
        return jnp.broadcast_to(leaf, (*shape, *leaf.shape[3:])).reshape(-1, *leaf.shape[3:])

    history = jax.tree.map(lambda leaf: flat(leaf[:, None, None]), start)
    rows = {"obs": [], "sofa": [], "reward": [], "ventilation": [], "projected": []}
    for h in range(horizon):
        action = flat(plans[:, :, None, h])
        history, outputs = _step(world, history, action, flat(eps[:, :, :, h]), mode=mode)
        rows["obs"].append(history.obs[:, -1])
        rows["sofa"].append(history.sofa)
        rows |= {name: [*rows[name], getattr(outputs, name)] for name in outputs._fields}
    window = history.choose(action).window(schema.OUTCOME_WINDOW)
    mortality = jax.nn.sigmoid(world.mortality_logit(*window)).reshape(shape)
    kept = {
        name: np.moveaxis(np.stack(parts).reshape(horizon, *shape, *parts[0].shape[1:]), 0, 3)
        for name, parts in rows.items()
    }
    return {**kept, "mortality": np.asarray(mortality)}


def unrolled(world, start, plans, eps, mode, precision=None):
    spec = RolloutSpec(
        shape=(*plans.shape[:2], eps.shape[2]),
        config=RolloutConfig(plans.shape[2], mode=mode, precision=precision),
        treat=lambda h, now: plans[:, :, h][..., None],
        noise=lambda h: eps[:, :, :, h],
        collect=lambda step: step._asdict(),
    )
    found = jax.jit(lambda w, s: unroll(w, s, spec)[1:])(world, start)
    return {**found[0], "mortality": found[1]}


def inputs(start_rows, world, horizon, plans=2, samples=2, mode="corrected"):
    episodes, steps = start_rows
    rng = np.random.default_rng(0)
    shape = (len(steps), plans, horizon)
    start = start_history(world, episodes, steps, recorded_sofa=mode == "reference")
    eps = rng.normal(size=(len(steps), 1, samples, horizon, 39)).astype(np.float32)
    return start, jnp.asarray(rng.integers(0, 25, shape, np.int32)), jnp.asarray(eps)


def assert_equal(got, want, atol=1e-6):
    """z-scores to `atol`; SOFA and counts too, except where a value lies on a threshold."""
    for name in ("obs", "ventilation", "mortality"):
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=atol, err_msg=name)
    for name in ("sofa", "projected"):
        assert (np.asarray(got[name]) == want[name]).mean() > 0.999, name
    np.testing.assert_allclose(got["reward"], want["reward"], atol=0.2)


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "corrected") for name in CONFIGS), ("residual", "reference")]
)
def test_24_closed_loop_steps_equal_whole_windows(episodes, start_rows, name, mode):
    world = shaken(CONFIGS[name], Scaler.fit(episodes, split=None))
    given = inputs(start_rows, world, HORIZON, mode=mode)
    assert_equal(unrolled(world, *given, mode), whole_windows(world, *given, mode))


@pytest.mark.parametrize("horizon", [1, 2, 5, 6, 7, 8, 9, 13])
def test_every_horizon_equals_whole_windows(episodes, start_rows, horizon):
    """Horizons at which windows end, the scan begins, or the outcome reads recorded rows."""
    world = shaken(CONFIGS["one layer"], Scaler.fit(episodes, split=None))
    given = inputs(start_rows, world, horizon, plans=3, samples=1)
    assert_equal(unrolled(world, *given, "corrected"), whole_windows(world, *given, "corrected"))


def test_bfloat16_rounds_products_alone(episodes, start_rows):
    world = shaken(CONFIGS["residual"], Scaler.fit(episodes, split=None))
    given = inputs(start_rows, world, HORIZON)
    exact = unrolled(world, *given, "corrected")
    rounded = unrolled(world, *given, "corrected", precision="bfloat16")
    drift = np.abs(np.asarray(rounded["obs"]) - np.asarray(exact["obs"]))
    assert 1e-5 < drift.max() < 0.05
    assert np.abs(np.asarray(rounded["mortality"] - exact["mortality"])).max() < 0.01
