"""Every loss against its formula, written out in NumPy row by row; where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from policy.offline.algorithms import (
    ALGORITHMS,
    NAMES,
    Batch,
    OfflineConfig,
    allowed_actions,
    bcq_loss,
    cql_loss,
    double_q_value,
    dqn_loss,
    iql_loss,
    make_networks,
    wd3qne_loss,
    wd3qne_value,
)
from worldmodel import struct

STATES, ACTIONS, ROWS = 9, 25, 40


@struct.dataclass
class Table:
    """A network whose feature is the number of the state."""

    values: jax.Array  # [STATES, O]

    def __call__(self, features):
        return self.values[features[..., 0].astype(int)]


def tables(seed, **sizes):
    rng = np.random.default_rng(seed)
    return {
        name: Table(jnp.asarray(4 * rng.normal(size=(STATES, size)), jnp.float32))
        for name, size in sizes.items()
    }


SIZES = {"q": ACTIONS, "v": 1, "actor": ACTIONS, "behavior": ACTIONS}
ONLINE, TARGET = tables(1, **SIZES), tables(2, **SIZES)


@pytest.fixture
def batch():
    rng = np.random.default_rng(3)
    sofa = rng.integers(0, 9, ROWS).astype(np.float32)
    sofa[:3] = 4.0, 3.999, 0.0
    discount = np.where(rng.random(ROWS) < 0.3, 0.0, 0.97).astype(np.float32)
    discount[:3] = 0.97
    return Batch(
        features=jnp.asarray(rng.integers(0, STATES, (ROWS, 1)), jnp.float32),
        action=jnp.asarray(rng.integers(0, ACTIONS, ROWS), jnp.int32),
        reward=jnp.asarray(8 * rng.normal(size=ROWS), jnp.float32),
        discount=jnp.asarray(discount),
        next_features=jnp.asarray(rng.integers(0, STATES, (ROWS, 1)), jnp.float32),
        next_action=jnp.asarray(rng.integers(0, ACTIONS, ROWS), jnp.int32),
        next_sofa=jnp.asarray(sofa),
    )


def rows_of(batch):
    """(state, action, reward, discount, next state, next action, next SOFA) of every row."""
    leaves = [np.asarray(leaf, np.float64).reshape(ROWS) for leaf in batch]
    for state, action, reward, discount, following, next_action, sofa in zip(*leaves, strict=True):
        yield int(state), int(action), reward, discount, int(following), int(next_action), sofa


def values(networks, name):
    return np.asarray(networks[name].values, np.float64)


def huber(error):
    error = abs(error)
    return error**2 / 2 if error <= 5 else 5 * (error - 2.5)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference_dqn(batch):
    q, target = values(ONLINE, "q"), values(TARGET, "q")
    losses = []
    for s, a, r, discount, n, _, _ in rows_of(batch):
        following = target[n, np.argmax(q[n])]
        losses.append(huber(q[s, a] - (r + discount * following)))
    return np.mean(losses)


def test_dqn(batch):
    got = dqn_loss(ONLINE, TARGET, batch, OfflineConfig(algorithm="dqn"))
    np.testing.assert_allclose(got, reference_dqn(batch), rtol=1e-5)


def test_double_q_value_is_the_targets_of_the_online_choice(batch):
    q, target = values(ONLINE, "q"), values(TARGET, "q")
    state = np.asarray(batch.features[:, 0], int)
    want = target[state, q[state].argmax(-1)]
    assert (want < target[state].max(-1)).any()  # so that taking the target's own best would show
    np.testing.assert_allclose(double_q_value(ONLINE, TARGET, batch.features), want, rtol=1e-6)


def test_wd3qne(batch):
    q, target = values(ONLINE, "q"), values(TARGET, "q")
    following, losses = [], []
    for s, a, r, discount, n, clinician, sofa in rows_of(batch):
        if sofa < 4:
            value = target[n, clinician]
        else:
            both = np.array([target[n, np.argmax(q[n])], target[n].max()])
            value = softmax(both) @ both
        following.append(value)
        losses.append(huber(q[s, a] - (r + discount * value)))
    np.testing.assert_allclose(wd3qne_value(ONLINE, TARGET, batch), following, rtol=1e-5)
    got = wd3qne_loss(ONLINE, TARGET, batch, OfflineConfig(algorithm="wd3qne"))
    np.testing.assert_allclose(got, np.mean(losses), rtol=1e-5)


def test_wd3qne_trusts_the_clinician_below_sofa_4_only(batch):
    other = (batch.next_action + 1) % ACTIONS
    moved = wd3qne_value(ONLINE, TARGET, batch) != wd3qne_value(
        ONLINE, TARGET, batch._replace(next_action=other)
    )
    np.testing.assert_array_equal(moved, np.asarray(batch.next_sofa) < 4.0)
    assert moved[:3].tolist() == [False, True, True]  # SOFA 4.0, 3.999, 0


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_cql(batch, alpha):
    q = values(ONLINE, "q")
    penalty = np.mean([np.log(np.exp(q[s]).sum()) - q[s, a] for s, a, *_ in rows_of(batch)])
    got = cql_loss(ONLINE, TARGET, batch, OfflineConfig(algorithm="cql", cql_alpha=alpha))
    np.testing.assert_allclose(got, reference_dqn(batch) + alpha * penalty, rtol=1e-5)


def test_iql(batch):
    config = OfflineConfig(expectile=0.8, beta=1.5)
    q, target, v = values(ONLINE, "q"), values(TARGET, "q"), values(ONLINE, "v")[:, 0]
    actor = values(ONLINE, "actor")
    losses, weights = [], []
    for s, a, r, discount, n, _, _ in rows_of(batch):
        advantage = target[s, a] - v[s]
        value_loss = (0.8 if advantage > 0 else 0.2) * advantage**2
        weights.append(np.exp(1.5 * advantage))
        actor_loss = -min(weights[-1], 100.0) * np.log(softmax(actor[s])[a])
        losses.append(value_loss + huber(q[s, a] - (r + discount * v[n])) + actor_loss)
    assert max(weights) > 100 > min(weights)
    np.testing.assert_allclose(iql_loss(ONLINE, TARGET, batch, config), np.mean(losses), rtol=1e-5)


def test_bcq(batch):
    config = OfflineConfig(algorithm="bcq", support=0.3)
    q, target, behavior = (
        values(ONLINE, "q"),
        values(TARGET, "q"),
        values(ONLINE, "behavior"),
    )
    losses, refused = [], 0
    for s, a, r, discount, n, _, _ in rows_of(batch):
        probabilities = softmax(behavior[n])
        allowed = probabilities >= 0.3 * probabilities.max()
        refused += not allowed[q[n].argmax()]
        best = max(np.flatnonzero(allowed), key=lambda action: q[n, action])
        cloning = -np.log(softmax(behavior[s])[a])
        losses.append(huber(q[s, a] - (r + discount * target[n, best])) + cloning)
    assert refused
    np.testing.assert_allclose(bcq_loss(ONLINE, TARGET, batch, config), np.mean(losses), rtol=1e-5)


def test_allowed_actions_on_the_edge():
    logits = jnp.log(jnp.asarray([0.5, 0.26, 0.24]))
    assert allowed_actions(logits, 0.5).tolist() == [True, True, False]
    assert allowed_actions(logits, 0.0).tolist() == [True] * 3
    assert allowed_actions(logits, 1.0).tolist() == [True, False, False]


@pytest.mark.parametrize("name", NAMES)
def test_after_the_end_nothing_counts(name, batch):
    config, loss = OfflineConfig(algorithm=name), ALGORITHMS[name].loss
    ended = batch._replace(discount=jnp.zeros(ROWS))
    other = ended._replace(
        next_features=(ended.next_features + 1) % STATES,
        next_action=(ended.next_action + 1) % ACTIONS,
        next_sofa=ended.next_sofa + 3,
    )
    assert loss(ONLINE, TARGET, ended, config) == loss(ONLINE, TARGET, other, config)
    assert loss(ONLINE, TARGET, ended, config) != loss(ONLINE, TARGET, batch, config)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_rows_seen_and_nothing_else(name, batch):
    config, loss = OfflineConfig(algorithm=name), ALGORITHMS[name].loss
    used = {"q": ONLINE["q"], **{extra: ONLINE[extra] for extra in ALGORITHMS[name].extra}}
    targets = {extra: TARGET[extra] for extra in used}
    # States 0-4 now, 5-8 next: whatever reaches the latter comes through the bootstrapped value.
    batch = batch._replace(features=batch.features % 5, next_features=5 + batch.next_features % 4)
    online, target = jax.grad(loss, (0, 1))(used, targets, batch, config)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(target))
    for extra, table in online.items():
        gradient = np.asarray(table.values)
        assert gradient[:5].any(), extra
        assert not gradient[5:].any(), extra


def test_iql_actor_does_not_pull_on_the_value(batch):
    def loss(networks, beta):
        return iql_loss(networks, TARGET, batch, OfflineConfig(beta=beta))

    def pull(beta):
        return jax.grad(loss)(ONLINE, beta)["v"].values

    np.testing.assert_array_equal(pull(0.0), pull(2.0))


@pytest.mark.parametrize("name", NAMES)
def test_networks_and_scores(name):
    config = OfflineConfig(algorithm=name, hidden=(16,))
    networks = make_networks(ALGORITHMS[name], 7, config, nnx.Rngs(0))
    features = jax.random.normal(jax.random.key(1), (7,))
    score = ALGORITHMS[name].score(networks, features, config)
    assert score.shape == (25,)
    if name == "iql":
        np.testing.assert_allclose(jnp.exp(score).sum(), 1, rtol=1e-5)
    elif name != "bcq":
        np.testing.assert_array_equal(score, networks["q"](features))


def test_bcq_never_acts_outside_its_support():
    for state in range(STATES):
        score = ALGORITHMS["bcq"].score(
            ONLINE, jnp.asarray([state], jnp.float32), OfflineConfig(algorithm="bcq", support=0.5)
        )
        likely = softmax(values(ONLINE, "behavior")[state])
        assert likely[int(score.argmax())] >= 0.5 * likely.max()
