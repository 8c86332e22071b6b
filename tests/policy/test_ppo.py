"""PPO: estimates and losses by hand, ends of episodes, learning, where it may start from."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from policy.offline.algorithms import (
    ALGORITHMS,
    OfflineConfig,
    OfflinePolicy,
    Perceptron,
    make_networks,
)
from policy.ppo import (
    Networks,
    OnlinePolicy,
    PPOConfig,
    Rows,
    advantages,
    draw_rows,
    play,
    ppo_loss,
    rows_of,
    train_ppo,
)
from worldmodel import SepsisEnv, schema, struct
from worldmodel.envs.base import first_timestep
from worldmodel.errors import InputError
from worldmodel.observation import NUM_STATE_FEATURES, Observation
from worldmodel.scaling import published_scaler
from worldmodel.synthetic import Config

SCALER = published_scaler()
LENGTHS = 4  # rows 0-3: episodes of 1 to 4 steps


class Toy(NamedTuple):
    key: jax.Array
    length: jax.Array
    observation: Observation


@struct.dataclass
class ToyDynamics:
    """A reward of 1 for action 7, another for the last step; the row's number is its SOFA."""

    seen: Observation

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        length = jax.random.randint(key, (), 1, LENGTHS + 1)
        return Toy(key, length, self.seen), first_timestep(self.seen, sofa=self.seen.sofa)

    def step(self, state: Toy, action: jax.Array) -> tuple[Any, Any]:
        number = state.observation.step + 1
        observation = replace(state.observation, step=number, sofa=number.astype(jnp.float32))
        over = number >= state.length
        timestep = replace(
            first_timestep(observation, sofa=observation.sofa),
            reward=jnp.where(action == 7, 1.0, 0.0) + jnp.where(over, 10.0, 0.0),
            terminated=over,
        )
        return Toy(state.key, state.length, observation), timestep


def toy_env(max_steps=None):
    observation = Observation(
        dynamic=SCALER.mean,
        measured=jnp.ones(schema.NUM_MASKED, bool),
        static=SCALER.static_mean,
        ventilated=jnp.bool_(False),
        sofa=jnp.float32(0),
        urine_24h=jnp.float32(1000),
        vasopressor=jnp.int32(0),
        fluid=jnp.int32(0),
        step=jnp.int32(0),
    )
    return SepsisEnv(ToyDynamics(observation), max_steps)


SMALL = PPOConfig(
    hidden=(16,), iterations=40, patients=64, steps=6, minibatches=8, batch_size=64,
    learning_rate=5e-3, past=0,
)  # fmt: skip


def networks_of(width, hidden=(16,), seed=0):
    rngs = nnx.Rngs(seed)
    return Networks(
        Perceptron(width, hidden, 25, rngs=rngs), Perceptron(width, hidden, 1, rngs=rngs)
    )


def test_advantages_against_a_loop():
    rng = np.random.default_rng(0)
    steps, patients, gamma, trace = 7, 30, 0.9, 0.8
    reward, values = rng.normal(size=(steps, patients)), rng.normal(size=(steps + 1, patients))
    end, cut = rng.integers(0, 9, patients), rng.random(patients) < 0.4
    number = np.arange(steps)[:, None]
    done = number >= end
    terminated = done & ~cut
    got = advantages(
        *(jnp.asarray(leaf) for leaf in (reward, values, terminated, done)),
        gamma=gamma, trace=trace,
    )  # fmt: skip
    for patient in range(patients):
        last = min(end[patient], steps - 1)
        for step in range(last + 1):
            want, weight = 0.0, 1.0
            for later in range(step, last + 1):
                following = 0.0 if terminated[later, patient] else values[later + 1, patient]
                surprise = reward[later, patient] + gamma * following - values[later, patient]
                want += weight * surprise
                weight *= gamma * trace
            np.testing.assert_allclose(got[step, patient], want, rtol=1e-4, atol=1e-5)


def test_lambda_one_is_the_return_and_zero_one_step():
    reward, values = jnp.asarray([[1.0], [2.0], [4.0]]), jnp.asarray([[0.5], [0.25], [1.0], [9.0]])
    over = jnp.asarray([[False], [False], [True]])
    whole = advantages(reward, values, over, over, gamma=1.0, trace=1.0)
    np.testing.assert_allclose((whole + values[:-1])[:, 0], [7, 6, 4])
    single = advantages(reward, values, over, over, gamma=1.0, trace=0.0)
    np.testing.assert_allclose((single + values[:-1])[:, 0], [1.25, 3.0, 4.0])
    cut = advantages(reward, values, jnp.zeros_like(over), over, gamma=1.0, trace=1.0)
    np.testing.assert_allclose((cut + values[:-1])[:, 0], [16, 15, 13])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_loss_row_by_row():
    rng, rows = np.random.default_rng(1), 50
    networks = networks_of(6)
    features = jnp.asarray(rng.normal(size=(rows, 6)), jnp.float32)
    action = rng.integers(0, 25, rows)
    logits = np.asarray(networks.actor(features), np.float64)
    value = np.asarray(networks.critic(features), np.float64)[:, 0]
    advantage, target = rng.normal(size=rows), 6 * rng.normal(size=rows)
    now = np.array([np.log(softmax(row)[a]) for row, a in zip(logits, action, strict=True)])
    old = now + 0.3 * rng.normal(size=rows)
    config = PPOConfig(clip=0.2, value_weight=0.07)
    losses, clipped = [], 0
    for i in range(rows):
        ratio = np.exp(now[i] - old[i])
        bounded = min(max(ratio, 0.8), 1.2)
        clipped += ratio != bounded
        error = abs(value[i] - target[i])
        huber = error**2 / 2 if error <= 5 else 5 * (error - 2.5)
        p = softmax(logits[i])
        losses.append(
            -min(ratio * advantage[i], bounded * advantage[i])
            + 0.07 * huber
            + 0.03 * (p * np.log(p)).sum()
        )
    batch = Rows(
        features, *(jnp.asarray(leaf, jnp.float32) for leaf in (action, old, advantage, target))
    )._replace(action=jnp.asarray(action))
    loss, share = ppo_loss(networks, batch, jnp.float32(0.03), config)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(share, clipped / rows, rtol=1e-5)
    assert 0 < clipped < rows


def play_toy(env, config=SMALL):
    networks = networks_of(NUM_STATE_FEATURES)
    return networks, play(jax.random.key(0), env, networks.actor, SCALER, config)


def test_play_ends_with_the_episode():
    networks, played = play_toy(toy_env())
    valid = np.asarray(played.valid)
    length = valid.sum(0)
    assert set(length) == {1, 2, 3, 4}
    np.testing.assert_array_equal(valid, np.arange(6)[:, None] < length)
    np.testing.assert_array_equal(played.terminated, np.arange(6)[:, None] >= length - 1)
    want = np.where(valid, (np.asarray(played.action) == 7) + 0.0, 0.0)
    want[length - 1, np.arange(64)] += 10
    np.testing.assert_array_equal(played.reward, want)
    time = np.asarray(played.features)[..., -2] * 20  # steps since admission
    np.testing.assert_allclose(time[:-1][valid], np.nonzero(valid)[0], atol=1e-5)
    np.testing.assert_allclose(time[length, np.arange(64)], length, atol=1e-5)  # what came after

    rows, error, entropy = rows_of(networks, played, SMALL)
    advantage = np.asarray(rows.advantage).reshape(valid.shape)[valid]
    np.testing.assert_allclose([advantage.mean(), advantage.std()], [0, 1], atol=1e-4)
    target = np.asarray(rows.target).reshape(valid.shape)
    last = target[length - 1, np.arange(64)]
    np.testing.assert_allclose(last, want[length - 1, np.arange(64)], atol=1e-4)
    assert error > 0 and 0 < entropy <= np.log(25) + 1e-5
    drawn = draw_rows(jax.random.key(1), rows, played.valid, 2000)
    flat = np.asarray(rows.log_prob)[valid.reshape(-1)]
    assert set(np.asarray(drawn.log_prob)) == set(flat)  # every valid row, and no other


@pytest.mark.parametrize(("max_steps", "steps"), [(2, 6), (None, 2)])
def test_what_is_cut_off_is_valued_by_the_critic(max_steps, steps):
    config = replace(SMALL, steps=steps, trace=0.0)
    networks, played = play_toy(toy_env(max_steps), config)
    rows, _, _ = rows_of(networks, played, config)
    going_on = np.asarray(played.valid[1] & ~played.terminated[1])
    assert going_on.any() and np.asarray(played.valid).sum(0).max() == 2
    following = networks.critic(played.features[2])[:, 0]
    target = np.asarray(rows.target).reshape(played.valid.shape)[1]
    want = np.asarray(played.reward[1] + following)
    np.testing.assert_allclose(target[going_on], want[going_on], rtol=1e-4, atol=1e-4)


def test_it_learns_the_toy():
    reports = []
    policy, history = train_ppo(
        jax.random.key(0), toy_env(), SCALER, SMALL, progress=lambda *values: reports.append(values)
    )
    jax.effects_barrier()
    # 10 for the end, and 1 for each of 2.5 steps at best.
    assert history.mean_return[0] < 10.5 and history.mean_return[-5:].mean() > 12
    assert history.entropy[-1] < 0.5 * history.entropy[0]
    assert history.value_error[-5:].mean() < 0.3 * history.value_error[0]
    assert policy(jax.random.key(1), toy_env().dynamics.seen).argmax() == 7
    assert [values[0] for values in reports] == list(range(1, 41)) and reports[3][1] == 40
    np.testing.assert_allclose([values[2] for values in reports], history.mean_return, rtol=1e-5)
    again, _ = train_ppo(jax.random.key(0), toy_env(), SCALER, SMALL)
    for a, b in zip(jax.tree.leaves(again.actor), jax.tree.leaves(policy.actor), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_it_learns_in_the_synthetic_world():
    env = SepsisEnv.synthetic(config=Config(past=2))
    config = PPOConfig(
        hidden=(32,), iterations=25, patients=256, minibatches=16, batch_size=256,
        learning_rate=2e-3, past=2,
    )  # fmt: skip
    policy, history = train_ppo(jax.random.key(0), env, SCALER, config)
    assert history.mean_return[-5:].mean() > history.mean_return[:5].mean() + 2
    _, timestep = env.reset(jax.random.key(5))
    greedy = policy(jax.random.key(1), timestep.observation)
    assert sorted(np.unique(greedy)) == [0, 1] and greedy.sum() == 1
    drawn = policy.replace(temperature=1.0)(jax.random.key(1), timestep.observation)
    np.testing.assert_allclose(drawn, jax.nn.softmax(policy.logits(timestep.observation)))
    np.testing.assert_allclose(drawn.sum(), 1, rtol=1e-5)
    assert (
        isinstance(policy, OnlinePolicy) and policy.past == 2 and greedy.argmax() == drawn.argmax()
    )


def test_it_starts_from_the_first_seed_of_iql():
    start, observation = iql_policy(), toy_env().dynamics.seen
    still = replace(SMALL, iterations=1, learning_rate=1e-9)
    policy, _ = train_ppo(jax.random.key(0), toy_env(), SCALER, still, start=start)
    mine, reference = jax.nn.log_softmax(policy.logits(observation)), start.scores(observation)
    np.testing.assert_allclose(mine, reference[0], atol=1e-4)
    assert np.abs(mine - reference[1]).max() > 1e-3


def iql_policy(*, algorithm="iql", hidden=(16,), past=0, width=NUM_STATE_FEATURES):
    config = OfflineConfig(algorithm=algorithm, hidden=hidden, past=past, seeds=2)
    members = [
        make_networks(ALGORITHMS[algorithm], width, config, nnx.Rngs(seed)) for seed in range(2)
    ]
    networks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    return OfflinePolicy(networks, SCALER, config)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (iql_policy(algorithm="cql"), "starts from a policy of iql, got one of cql"),
        (iql_policy(hidden=(16, 16)), "hidden: the policy to start from has"),
        (iql_policy(past=2), "past: the policy to start from has 2, PPO 0"),
    ],
)
def test_policies_it_cannot_start_from(start, message):
    with pytest.raises(InputError, match=message):
        train_ppo(jax.random.key(0), toy_env(), SCALER, SMALL, start=start)


def test_environments_it_cannot_play():
    with pytest.raises(InputError, match="looks back on 3 rows, but sees 0"):
        train_ppo(jax.random.key(0), SepsisEnv.synthetic(), SCALER, replace(SMALL, past=3))

    class Blind(ToyDynamics):
        def reset(self, key):
            state, timestep = super().reset(key)
            return state, replace(timestep, observation=timestep.observation.step)

    env = toy_env()
    with pytest.raises(InputError, match="must give `Observation`s"):
        train_ppo(jax.random.key(0), env.replace(dynamics=Blind(env.dynamics.seen)), SCALER, SMALL)


@pytest.mark.parametrize(
    "changes",
    [
        {"iterations": 0},
        {"patients": 0},
        {"steps": 0},
        {"minibatches": 0},
        {"batch_size": 0},
        {"hidden": ()},
        {"gamma": 1.5},
        {"trace": -0.1},
        {"final_rate": 2.0},
        {"learning_rate": 0.0},
        {"clip": 0.0},
        {"max_grad_norm": 0.0},
        {"entropy": -1.0},
        {"value_weight": -1.0},
        {"past": 13},
    ],
)
def test_settings_that_make_no_sense(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        PPOConfig(**changes)
