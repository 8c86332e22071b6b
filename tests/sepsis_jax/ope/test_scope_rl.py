"""Point values against SCOPE-RL, where its assumptions hold: all stays of one length."""

import jax.numpy as jnp
import numpy as np
import pytest

from sepsis_jax.ope import OPEData, Values, estimate, make_batch, weigh

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    stays, steps, actions = 60, 7, 25
    behavior = rng.dirichlet(np.full(actions, 2.0), (stays, steps)).astype(np.float32)
    target = rng.dirichlet(np.full(actions, 2.0), (stays, steps)).astype(np.float32)
    target = 0.7 * behavior + 0.3 * target
    action = (behavior.cumsum(-1) > rng.random((stays, steps, 1))).argmax(-1)
    reward = rng.normal(size=(stays, steps)).astype(np.float32)
    q = rng.normal(size=(stays, steps, actions)).astype(np.float32)
    return behavior, target, action, reward, q


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_agrees_with_scope_rl(case, gamma):
    discrete = pytest.importorskip("scope_rl.ope.discrete")
    behavior, target, action, reward, q = case
    stays, steps, actions = behavior.shape
    taken = np.take_along_axis(behavior, action[..., None], -1)[..., 0]
    theirs = {
        "step_per_trajectory": steps,
        "action": action.reshape(-1),
        "reward": reward.reshape(-1),
        "pscore": taken.reshape(-1),
        "evaluation_policy_action_dist": target.reshape(-1, actions),
        "state_action_value_prediction": q.reshape(-1, actions),
        "gamma": gamma,
    }
    classes = {
        "dm": "DirectMethod",
        "is": "TrajectoryWiseImportanceSampling",
        "pdis": "PerDecisionImportanceSampling",
        "dr": "DoublyRobust",
        "wis": "SelfNormalizedTIS",
        "wpdis": "SelfNormalizedPDIS",
        "wdr": "SelfNormalizedDR",
    }
    data = OPEData(
        reward=jnp.asarray(reward),
        alive=jnp.ones((stays, steps), bool),
        action=jnp.asarray(action),
        behavior_prob=jnp.asarray(taken),
    )
    values = Values(
        jnp.asarray(np.take_along_axis(q, action[..., None], -1)[None, ..., 0]),
        jnp.asarray((target * q).sum(-1)[None]),
    )
    batch = make_batch(
        data, weigh(data, jnp.asarray(target)[None]).log_weight, gamma=gamma, values=values
    )
    ours = estimate(batch, list(classes))
    for name, label in classes.items():
        expected = getattr(discrete, label)().estimate_policy_value(**theirs)
        assert float(ours[name][0]) == pytest.approx(expected, abs=1e-5), name
