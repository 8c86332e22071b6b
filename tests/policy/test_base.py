"""The protocol: what is asked of a policy in every row, drawn actions, padding."""

import jax
import jax.numpy as jnp
import numpy as np

from policy.base import Policy
from tests.toy import toy_episodes
from worldmodel import schema, struct
from worldmodel.observation import as_pytree, observation_at


@struct.dataclass
class Linear(Policy):
    """Logits from the row, and from the row two before."""

    weight: jax.Array  # [39, 25]
    past = 3

    def __call__(self, key, observation):
        scale = jnp.asarray(schema.HIGH)
        seen = observation.dynamic / scale + observation.past.dynamic[0] / scale
        return jax.nn.softmax(seen @ self.weight + observation.past.fluid.sum())


@struct.dataclass
class Noisy(Policy):
    def __call__(self, key, observation):
        return jax.random.dirichlet(key, jnp.ones(schema.NUM_ACTIONS))


def linear():
    return Linear(jax.random.normal(jax.random.key(1), (39, schema.NUM_ACTIONS)))


def test_action_probs_are_the_policy_at_every_row():
    episodes, policy = toy_episodes(30, 8), linear()
    probs = policy.action_probs(episodes, block=16)  # the last block is not full
    for stay, step in ((0, 0), (0, 7), (11, 1), (29, int(episodes.length[29]) - 1)):
        observation = observation_at(episodes, jnp.int32(stay), jnp.int32(step), past=3)
        np.testing.assert_allclose(probs[stay, step], policy(None, observation), rtol=1e-5)
    valid = np.asarray(episodes.valid)
    np.testing.assert_array_equal(probs[~valid], np.float32(1 / 25))
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)


def test_action_probs_do_not_depend_on_blocks_or_on_numpy_leaves():
    episodes = toy_episodes(30, 8)
    whole = linear().action_probs(episodes)
    np.testing.assert_allclose(linear().action_probs(episodes, block=7), whole, rtol=1e-5)
    on_host = jax.tree.map(np.asarray, episodes)
    np.testing.assert_allclose(linear().action_probs(on_host), whole, rtol=1e-5)


def test_a_policy_that_draws_gets_its_own_key_in_every_row():
    episodes = toy_episodes(30, 8)
    probs = Noisy().action_probs(episodes, key=jax.random.key(3))
    rows = probs[np.asarray(episodes.valid)]
    assert len(np.unique(rows[:, 0])) == len(rows)
    np.testing.assert_array_equal(Noisy().action_probs(episodes, key=jax.random.key(3)), probs)
    assert (Noisy().action_probs(episodes, key=jax.random.key(4)) != probs).any()


def test_drawn_actions_follow_the_probabilities():
    episodes, policy = toy_episodes(5, 4), linear()
    observation = observation_at(episodes, jnp.int32(0), jnp.int32(3), past=3)
    drawn = jax.vmap(policy.act, (0, None))(
        jax.random.split(jax.random.key(0), 20_000), observation
    )
    assert drawn.dtype == jnp.int32
    found = np.bincount(drawn, minlength=25) / len(drawn)
    want = np.asarray(policy(None, observation))
    assert np.abs(found - want).max() < 4 * np.sqrt(want.max() / len(drawn))


def test_new_arrays_need_no_new_compilation():
    traces = 0

    @jax.jit
    def ask(policy, observation):
        nonlocal traces
        traces += 1
        return policy(jax.random.key(0), observation)

    observation = observation_at(toy_episodes(5, 4), jnp.int32(0), jnp.int32(3), past=3)
    ask(as_pytree(linear()), observation)
    ask(as_pytree(linear().replace(weight=jnp.ones((39, 25)))), observation)
    assert traces == 1
