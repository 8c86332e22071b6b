"""Counts against arithmetic by hand and against the engine's own products."""

import jax
import numpy as np
import pytest

from sepsis_jax.benchmark.hardware import Shape, minimal_flops, plain_flops
from tests.toy import toy_episodes
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import rollout


def test_plain_model_by_hand():
    config = ModelConfig(variant="reference")
    gru = 6 * (141 + 3 * 128) * 384  # 1,209,600
    assert gru == 1_209_600
    state = gru + 6 * 10 * 32 + 3 * 32 + 128 * 64 + 64 + 129 * 128 + 128 * 78
    outcome = 2 * gru + 12 * 10 * 32 + 3 * 32 + 128 * 64 + 64
    assert plain_flops(config, 24) == pytest.approx(2 * (state + outcome / 24))
    residual = ModelConfig(variant="residual")
    assert plain_flops(residual, 1) == pytest.approx(2 * (state + (3 * 87 + 3) * 39 + outcome))


def test_one_branch_one_step_by_hand():
    config = ModelConfig(variant="reference", hidden=2, layers=1, embed=3, head=5)
    rows = 6 * 90 * 6  # five of the past and the newest, 39 + 38 + 3 + 10 columns
    # Ten moves of windows in the past, of which one window is kept: its step and the heads.
    state = rows + (0 + 1 + 2 + 3 + 4) * 12 + 5 * 12 + 2 * (5 + 2 + 78)
    state -= 4 * 12  # the other four windows would end after the horizon
    outcome = 12 * 90 * 6 + 11 * 12 + 2 * 5
    assert minimal_flops(config, Shape(1, 1, 1), 1) == 2 * (state + outcome)


@pytest.mark.parametrize("variant", ["residual", "reference"])
@pytest.mark.parametrize("horizon", [1, 2, 5, 6, 8, 24])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 4)])
def test_the_engine_multiplies_as_counted(variant, horizon, shape):
    config = ModelConfig(variant=variant, hidden=8, embed=4, head=4)
    episodes = toy_episodes(3, 14).select(np.arange(shape[0]))
    world = init_world_model(jax.random.key(0), Scaler.fit(toy_episodes(), split=None), config)
    start = start_history(world, episodes, 1)
    plans = np.zeros((shape[0], shape[1], horizon), np.int32)

    def run(world, start):
        return rollout(world, jax.random.key(0), start, plans, samples=shape[2])

    counted = minimal_flops(config, Shape(*shape), horizon) * np.prod(shape) * horizon
    # Weights are folded once per call, whatever the number of branches.
    folded = 2 * 2 * (3 + 1 + 10 + 1) * config.embed * 3 * config.hidden
    found = products(jax.make_jaxpr(run)(world, start).jaxpr) - folded
    # The scan moves all kept windows in every row, masked before their first; the minimum has each
    # of its five windows from its own first row on.
    square, layers = config.hidden * 3 * config.hidden, config.layers
    masked = 5 * min(horizon, 5) * (2 * layers - 1)
    least = (0 + 1 + 2 + 3 + 4) * (2 * layers - 1) + 5 * (layers - 1)
    assert found == round(counted) + 2 * shape[0] * (masked - least) * square


def products(jaxpr, times=1):
    """Floating-point operations of all matrix products, those of loops included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = np.prod([left[i] for i in contract])
            total += 2 * times * int(np.prod(equation.outvars[0].aval.shape) * depth)
        for name, value in equation.params.items():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                loops = equation.params["length"] if equation.primitive.name == "scan" else 1
                total += products(inner, times * loops)
            elif name == "branches":
                raise NotImplementedError
    return total
