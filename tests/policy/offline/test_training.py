"""Training on a small decision process whose optimal values are known; seeds, targets, errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.offline.algorithms import ALGORITHMS, OfflineConfig, OfflinePolicy
from policy.offline.data import Transitions, transitions
from policy.offline.training import RECORDS, seed_keys, train_all, train_offline
from tests.toy import toy_episodes
from worldmodel.errors import InputError
from worldmodel.observation import observation_at
from worldmodel.scaling import published_scaler

STATES, ACTIONS, GAMMA = 6, 25, 0.5
SCALER = published_scaler()


def small_world():
    """Rewards, next states and ends [STATES, ACTIONS] of a deterministic process."""
    rng = np.random.default_rng(5)
    reward = rng.normal(size=(STATES, ACTIONS))
    following = rng.integers(0, STATES, (STATES, ACTIONS))
    ends = rng.random((STATES, ACTIONS)) < 0.25
    return reward, following, ends


REWARD, FOLLOWING, ENDS = small_world()


def solve(value_of):
    """Q of the process where `value_of` turns the values [S, A] of a state into one."""
    q = np.zeros((STATES, ACTIONS))
    for _ in range(500):
        q = REWARD + GAMMA * np.where(ENDS, 0.0, value_of(q)[FOLLOWING])
    return q


OPTIMAL = solve(lambda q: q.max(-1))
BEHAVIOR = solve(lambda q: q.mean(-1))  # of the clinician, who draws actions evenly


def records(sofa, rows=9000):
    """Stays under even actions, as transitions with one-hot features."""
    rng = np.random.default_rng(0)
    state, seen, actions = 0, [], rng.integers(0, ACTIONS, rows)
    for action in actions:
        seen.append(state)
        over = ENDS[state, action]
        state = rng.integers(STATES) if over else FOLLOWING[state, action]
    seen = np.asarray(seen)
    last = ENDS[seen, actions]
    last[-1] = True
    return Transitions(
        features=jnp.asarray(np.eye(STATES, dtype=np.float32)[seen]),
        action=jnp.asarray(actions, jnp.int32),
        reward=jnp.asarray(REWARD[seen, actions], jnp.float32),
        last=jnp.asarray(last),
        sofa=jnp.full(rows, sofa, jnp.float32),
    )


def config_of(algorithm, **changes):
    settings = {
        "algorithm": algorithm,
        "hidden": (64,),
        "updates": 2000,
        "batch_size": 256,
        "learning_rate": 5e-3,
        "weight_decay": 0.0,
        "gamma": GAMMA,
        "polyak": 0.05,
        "seeds": 1,
        **changes,
    }
    return OfflineConfig(**settings)


def scores(policy):
    """[STATES, ACTIONS] of the first seed."""
    config = policy.config
    score = ALGORITHMS[config.algorithm].score
    networks = jax.tree.map(lambda leaf: leaf[0], policy.networks)
    return np.asarray(jax.vmap(lambda x: score(networks, x, config))(jnp.eye(STATES)))


def value_of_greedy(scores):
    """[STATES] true values of always taking the action of the highest score."""
    chosen = scores.argmax(-1)
    return solve(lambda q: q[np.arange(STATES), chosen])[np.arange(STATES), chosen]


@pytest.mark.parametrize(
    "config",
    [
        config_of("dqn"),
        config_of("dqn", polyak=0.0, copy_every=50),
        config_of("wd3qne"),
        config_of("cql", cql_alpha=0.0),
        config_of("bcq", support=0.1),
        config_of("iql", expectile=0.99, beta=10.0),
    ],
    ids=["dqn", "dqn-copied", "wd3qne", "cql", "bcq", "iql"],
)
def test_every_algorithm_finds_the_optimal_actions(config):
    policy = train_offline(records(sofa=9.0), SCALER, config).policy
    got, best = value_of_greedy(scores(policy)), OPTIMAL.max(-1)
    runner_up = value_of_greedy(np.random.default_rng(0).random((STATES, ACTIONS)))
    np.testing.assert_allclose(got, best, atol=0.05 * (best - runner_up).mean())
    if config.algorithm in ("dqn", "wd3qne", "cql"):
        np.testing.assert_allclose(scores(policy), OPTIMAL, atol=0.2)


def test_wd3qne_of_the_less_sick_values_the_clinician():
    policy = train_offline(records(sofa=3.0), SCALER, config_of("wd3qne")).policy
    assert np.abs(OPTIMAL - BEHAVIOR)[~ENDS].min() > 0.5
    np.testing.assert_allclose(scores(policy), BEHAVIOR, atol=0.2)


def test_cql_is_pessimistic_about_the_unseen():
    data = records(sofa=9.0)
    kept = np.asarray(data.action) != 7
    # Rows apart from each other no longer follow: every one ends.
    data = jax.tree.map(lambda leaf: leaf[kept], data).replace(last=jnp.ones(kept.sum(), bool))
    q = scores(train_offline(data, SCALER, config_of("cql", cql_alpha=1.0, updates=500)).policy)
    assert (q[:, 7] < np.delete(q, 7, 1).min(-1)).all()


def short(**changes):
    return config_of("dqn", updates=40, batch_size=32, hidden=(8,), seeds=3, **changes)


def assert_equal(got, want, **tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 1e-6, "atol": 1e-7}))


def test_a_seed_is_the_same_whoever_is_trained_beside_it():
    data = records(sofa=9.0, rows=500)
    three = train_offline(data, SCALER, short())
    one = train_offline(data, SCALER, replace(short(), seeds=1))
    assert three.losses.shape == (3, RECORDS) and one.losses.shape == (1, RECORDS)
    assert_equal(three.policy.member(0).networks, one.policy.networks)
    kernels = np.asarray(three.policy.networks["q"].trunk.layers[0].kernel[...])
    assert len(np.unique(kernels[:, 0, 0])) == 3
    other = train_offline(data, SCALER, replace(short(), seed=1)).policy
    assert (np.asarray(other.networks["q"].trunk.layers[0].kernel[...]) != kernels).all()


def test_one_batched_program_learns_the_same():
    data = records(sofa=9.0, rows=500)
    networks, losses = train_all(seed_keys(short()), data, config=short(), report=None)
    learned = train_offline(data, SCALER, short())
    assert_equal(networks, learned.policy.networks, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(losses, learned.losses, rtol=1e-3)


def test_targets_follow_by_polyak_or_by_copies():
    data = records(sofa=9.0, rows=500)
    whole = train_offline(data, SCALER, short(polyak=1.0)).policy.networks
    each = train_offline(data, SCALER, short(polyak=0.3, copy_every=1)).policy.networks
    assert_equal(each, whole)
    # Copied after updates 30 of 40 only: what the policy holds is the network of then.
    late = train_offline(data, SCALER, short(copy_every=30)).policy.networks
    slow = train_offline(data, SCALER, short(polyak=1e-7)).policy.networks

    def distance(a, b):
        return sum(
            float(jnp.abs(x - y).sum())
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )

    assert distance(late, slow) > 0.1 * distance(whole, slow) > 0.01
    assert distance(late, whole) > 1e-3


def test_progress_comes_to_the_end_and_the_loss_falls():
    seen = []
    data = records(sofa=9.0, rows=2000)
    learned = train_offline(
        data,
        SCALER,
        config_of("dqn", updates=400, seeds=3),
        progress=lambda *values: seen.append(values),
    )
    jax.effects_barrier()
    assert sorted(values[:2] for values in seen) == [(20 * n, 400) for n in range(1, RECORDS + 1)]
    assert learned.losses[0, -1] < 0.5 * learned.losses[0, 0]


@pytest.mark.parametrize("name", ["iql", "bcq"])
def test_policies_of_records(name):
    episodes = toy_episodes(20, 6)
    config = OfflineConfig(algorithm=name, hidden=(8,), updates=20, batch_size=32, past=3, seeds=2)
    data = transitions(episodes, SCALER, past=3)
    policy = train_offline(data, SCALER, config).policy
    assert isinstance(policy, OfflinePolicy)
    assert (policy.past, policy.num_seeds, policy.member(1).num_seeds) == (3, 2, 1)
    observation = observation_at(episodes, 2, 1, past=5)  # looks back further than asked for
    greedy = policy(jax.random.key(0), observation)
    assert sorted(np.unique(greedy)) == [0, 1] and greedy.sum() == 1
    mean = np.mean([policy.member(i).scores(observation)[0] for i in range(2)], 0)
    assert greedy.argmax() == mean.argmax()
    soft = policy.replace(temperature=0.5)(jax.random.key(0), observation)
    np.testing.assert_allclose(soft, jax.nn.softmax(mean / 0.5), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "sarsa"}, "expected one of dqn"),
        ({"updates": 0}, "updates: got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"seeds": 0}, "seeds"),
        ({"hidden": ()}, "hidden"),
        ({"hidden": (8, 0)}, "hidden"),
        ({"gamma": 1.1}, "gamma"),
        ({"expectile": -0.1}, "expectile"),
        ({"support": 2.0}, "support"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"cql_alpha": -1.0}, "cql_alpha"),
        ({"past": 13}, "past"),
        ({"polyak": 0.0}, "targets never move"),
        ({"copy_every": 50, "updates": 40}, "copy_every: got 50"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(InputError, match=message):
        OfflineConfig(**changes)


def test_training_says_what_is_wrong():
    data = records(sofa=9.0, rows=500)
    with pytest.raises(InputError, match="at least two recorded steps"):
        train_offline(jax.tree.map(lambda leaf: leaf[:1], data), SCALER, short())
    broken = data.replace(reward=data.reward.at[3].set(jnp.nan))
    with pytest.raises(InputError, match="not finite"):
        train_offline(broken, SCALER, short())
