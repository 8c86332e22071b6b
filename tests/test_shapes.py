"""The shape checker of the tests checks shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from policy.qwen3.model import rotary
from sepsis_jax.ope.weights import cumulate
from worldmodel.clinical import reward, rules, sofa
from worldmodel.envs.tables import exact, small_mdp
from worldmodel.models.windows import encode_action


def test_right_shapes_pass_as_arrays_numpy_arrays_and_tracers(unit_scaler):
    for rows in (jnp.zeros((2, 39)), np.zeros((2, 39), np.float32)):
        assert unit_scaler.normalize(rows).shape == (2, 39)
    assert jax.jit(jax.vmap(sofa.pf_ratio))(jnp.ones(3), jnp.ones(3)).shape == (3,)
    assert bool(rules.hypoperfused(60.0, 1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: rules.adherence(jnp.zeros(3, bool), jnp.zeros(3, bool), jnp.ones((2, 3), bool)),
        lambda: rules.sirs_score(jnp.zeros((2, 38))),
        lambda: rules.hypoperfused(jnp.zeros(3), jnp.zeros(2)),
        lambda: reward.trajectory_rewards(
            jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros(3, int), jnp.zeros(2, bool)
        ),
        lambda: encode_action(jnp.zeros(3)),
        lambda: exact(small_mdp(), np.ones(25), horizon=2),
        lambda: cumulate(jnp.zeros((2, 3, 4)), jnp.ones((3, 5), bool)),
        lambda: rotary(jnp.zeros(4, int), np.ones(4, np.float32)),
        lambda: jax.jit(rules.sirs_score)(jnp.zeros((2, 38))),
    ],
)
def test_wrong_shapes_and_types_raise(wrong):
    with pytest.raises(TypeCheckError):
        wrong()
