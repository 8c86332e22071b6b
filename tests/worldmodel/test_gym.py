"""The Gymnasium interface: Gymnasium's own checkers, seeds, vectors, an off-the-shelf agent."""

import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

from tests.toy import toy_episodes
from worldmodel import SepsisEnv
from worldmodel.envs.env import episode_key
from worldmodel.episode_files import save_episodes
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import save_world_model
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.observation import state_feature_bounds, state_features
from worldmodel.scaling import Scaler

gymnasium = pytest.importorskip("gymnasium")

from gymnasium.utils.env_checker import check_env  # noqa: E402
from gymnasium.vector import AutoresetMode, SyncVectorEnv  # noqa: E402

from worldmodel.gym import IDS, SepsisGymEnv, SepsisVectorEnv  # noqa: E402

CONFIG = ModelConfig(variant="reference", hidden=8, layers=1, embed=4, head=4)
SOURCES = ("learned", "synthetic", "icu_sepsis", "gumbel_max")


@pytest.fixture(scope="module")
def envs():
    episodes = toy_episodes(12, 14)
    world = init_world_model(jax.random.key(3), Scaler.fit(episodes, split=None), CONFIG)
    return {
        "learned": SepsisEnv.learned(world, episodes, horizon=3, max_steps=6),
        "synthetic": SepsisEnv.synthetic(),
        "icu_sepsis": SepsisEnv.icu_sepsis(),
        "gumbel_max": SepsisEnv.gumbel_max(hidden=("diabetes",)),
    }


def play(env, actions, **reset):
    """Observations, rewards and ends, resetting at the end of an episode."""
    observation, info = env.reset(**reset)
    rows = [(observation, 0.0, False, False, info)]
    for action in actions:
        rows.append(env.step(action))
        if rows[-1][2] or rows[-1][3]:
            observation, info = env.reset()
            rows.append((observation, 0.0, False, False, info))
    return rows


def assert_same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left[0], right[0])
        assert left[1:4] == right[1:4]
        assert left[4] == right[4]


@pytest.mark.parametrize("source", SOURCES)
def test_gymnasiums_checker(envs, source):
    env = SepsisGymEnv(envs[source])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_env(env)
    # Without a registered id there is no spec to make other render modes from.
    others = [str(w.message) for w in found if "alternative render modes" not in str(w.message)]
    assert not [
        message for message in others if "gymnasium" in message.lower() or "WARN" in message
    ]
    assert env.observation_space.contains(env.reset(seed=1)[0])


@pytest.fixture(scope="module")
def folders(envs, tmp_path_factory):
    """What `gymnasium.make` reads the learned environment from."""
    root = tmp_path_factory.mktemp("learned")
    dynamics = envs["learned"].dynamics
    save_world_model(dynamics.world_model, root / "model")
    save_episodes(dynamics.episodes, root / "cohort")
    return {"model": root / "model", "episodes": root / "cohort", "split": "all"}


def settings_of(name, folders):
    learned = {**folders, "horizon": 3, "max_steps": 6}
    hidden = {"hidden": ("diabetes",)}
    return {"learned": learned, "gumbel_max": hidden}.get(IDS[name], {})


@pytest.mark.parametrize("name", IDS)
def test_registered_environments_pass_the_checker(name, envs, folders):
    env = gymnasium.make(name, **settings_of(name, folders))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    assert_same(
        play(SepsisGymEnv(envs[IDS[name]]), [0, 1, 2], seed=4),
        play(env.unwrapped, [0, 1, 2], seed=4),
    )
    vector = gymnasium.make_vec(name, num_envs=3, **settings_of(name, folders))
    assert isinstance(vector, SepsisVectorEnv)
    np.testing.assert_allclose(vector.reset(seed=4)[0][0], env.reset(seed=4)[0], atol=1e-4)


def test_registered_environments_refuse_bad_settings(folders):
    make = gymnasium.make
    learned = "sepsis_jax/LearnedSepsis-v0"
    for settings, reason in (
        ({}, "model: give a folder"),
        ({"model": folders["model"]}, "episodes: give a folder"),
        ({**folders, "split": "tests"}, "split: got 'tests'"),
        ({**folders, "horizons": 3}, "unexpected keyword"),
    ):
        with pytest.raises(InputError, match=reason):
            make(learned, **settings)


def test_the_name_may_name_the_module():
    code = (
        "import gymnasium\n"
        "env = gymnasium.make('worldmodel.gym:sepsis_jax/Sepsis-v0', max_steps=3)\n"
        "print(env.unwrapped.action_space)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "Discrete(25)", done.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_stable_baselines_checker(envs, source):
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        checker.check_env(SepsisGymEnv(envs[source]))


def test_seeds(envs):
    actions = np.random.default_rng(0).integers(0, 25, 12)
    env = SepsisGymEnv(envs["learned"])
    first = play(env, actions, seed=3)
    assert_same(first, play(env, actions, seed=3))
    assert_same(first, play(SepsisGymEnv(envs["learned"]), actions, seed=3))
    other = play(env, actions, seed=4)
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(first, other, strict=True))
    ends = [i for i, row in enumerate(first) if row[2]]
    assert len(ends) == 3
    # One episode is not the next.
    assert not np.array_equal(first[1][0], first[ends[0] + 2][0])
    # Without a seed two environments differ.
    unseeded = [play(SepsisGymEnv(envs["learned"]), actions) for _ in range(2)]
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(*unseeded, strict=True))


def test_it_is_the_environment_beneath(envs):
    env = envs["learned"]
    observation, info = SepsisGymEnv(env).reset(seed=7)
    state, timestep = jax.jit(env.reset)(episode_key(jax.random.key(7), 0))
    want = state_features(timestep.observation, env.dynamics.scaler)
    np.testing.assert_allclose(observation, want, rtol=1e-5, atol=1e-5)
    gym = SepsisGymEnv(env)
    gym.reset(seed=7)
    _, earned, terminated, truncated, info = gym.step(np.int64(8))
    _, timestep = jax.jit(env.step)(state, np.int32(8))
    assert earned == pytest.approx(float(timestep.reward), rel=1e-4)
    assert (terminated, truncated) == (False, False)
    assert info["sofa"] == float(timestep.info.sofa)
    terms = sum(value for name, value in info.items() if name.startswith("reward_"))
    assert terms == pytest.approx(earned, abs=1e-5)
    # What is unknown is left out: there is no behaviour policy here.
    assert "support" not in info and "mortality" in info


def test_truncation_is_apart(envs):
    env = SepsisGymEnv(SepsisEnv.synthetic(max_steps=3))
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


@pytest.mark.parametrize("action", [-1, 25, 1.5, [3], None])
def test_bad_actions(envs, action):
    env = SepsisGymEnv(envs["icu_sepsis"])
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    with pytest.raises(InputError, match="action: got"):
        env.step(action)
    vector = SepsisVectorEnv(envs["icu_sepsis"], 1)
    with pytest.raises(gymnasium.error.ResetNeeded):
        vector.step([0])
    vector.reset(seed=0)
    with pytest.raises(InputError, match="action: got"):
        vector.step([action])


def test_bad_settings(envs):
    with pytest.raises(InputError, match="num_envs: got 0"):
        SepsisVectorEnv(envs["synthetic"], 0)
    with pytest.raises(InputError, match="autoreset_mode"):
        SepsisVectorEnv(envs["synthetic"], 2, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(InputError, match="give both or neither"):
        SepsisGymEnv(envs["synthetic"], features=lambda observation: observation.sofa[None])
    vector = SepsisVectorEnv(envs["icu_sepsis"], 2)
    with pytest.raises(InputError, match="got 3 seeds for 2"):
        vector.reset(seed=[1, 2, 3])


def test_own_features(envs):
    space = gymnasium.spaces.Box(0, 24, (1,))
    env = SepsisGymEnv(
        envs["learned"],
        features=lambda observation: observation.sofa[None],
        observation_space=space,
    )
    observation, info = env.reset(seed=0)
    assert observation == [info["sofa"]] and env.observation_space is space


def test_bounds_hold_the_features(envs):
    low, high = state_feature_bounds(20)
    assert low.shape == high.shape == (49,) and (low <= high).all() and np.isfinite(high).all()
    env = SepsisGymEnv(envs["synthetic"])
    for row in play(env, [24] * 30, seed=2):
        assert env.observation_space.contains(row[0])


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("source", ["learned", "icu_sepsis"])
def test_vector_is_single_environments(envs, source, mode):
    count = 3
    vector = SepsisVectorEnv(envs[source], count, autoreset_mode=mode)
    reference = SyncVectorEnv([lambda: SepsisGymEnv(envs[source])] * count, autoreset_mode=mode)
    assert vector.metadata["autoreset_mode"] is mode
    assert vector.observation_space == reference.observation_space
    assert vector.action_space == reference.action_space

    def compare(a, b):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-4)
        assert a[0].dtype == b[0].dtype and vector.observation_space.contains(a[0])
        compare_infos(a[-1], b[-1])

    def compare_infos(a, b):
        for name in ("sofa", "mortality", "reward_terminal"):
            known = b.get(f"_{name}", np.zeros(count, bool))
            np.testing.assert_array_equal(a[f"_{name}"], known)
            if known.any():
                np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4)

    compare(vector.reset(seed=5), reference.reset(seed=5))
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(40):
        actions = rng.integers(0, 25, count)
        a, b = vector.step(actions), reference.step(actions)
        compare(a, b)
        for left, right in zip(a[1:4], b[1:4], strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)
            assert left.dtype == right.dtype
        done = a[2] | a[3]
        ends += int(done.sum())
        last = mode is AutoresetMode.SAME_STEP and done.any()
        assert ("final_obs" in a[4]) == ("final_obs" in b[4]) == last
        if last:
            np.testing.assert_array_equal(a[4]["_final_obs"], b[4]["_final_obs"])
            compare_infos(a[4]["final_info"], b[4]["final_info"])
            for i in np.flatnonzero(done):
                np.testing.assert_allclose(
                    a[4]["final_obs"][i], b[4]["final_obs"][i], rtol=1e-4, atol=1e-4
                )
    assert ends > 4


def test_vector_without_seed_goes_on(envs):
    vector = SepsisVectorEnv(envs["icu_sepsis"], 40)
    first = vector.reset(seed=1)[0]
    second = vector.reset()[0]
    assert (first != second).any()
    np.testing.assert_array_equal(vector.reset(seed=1)[0], first)
    np.testing.assert_array_equal(vector.reset()[0], second)
    np.testing.assert_array_equal(vector.reset(seed=list(range(1, 41)))[0], first)


@pytest.mark.parity
def test_an_off_the_shelf_agent_trains():
    """DQN of Stable-Baselines3 trains against the environment as it is."""
    sb3 = pytest.importorskip("stable_baselines3")
    env = SepsisGymEnv(SepsisEnv.synthetic(max_steps=3))
    agent = sb3.DQN(
        "MlpPolicy", env, learning_starts=100, buffer_size=2_000, train_freq=4, seed=0,
        policy_kwargs={"net_arch": [32]}, device="cpu",
    )  # fmt: skip
    before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
    agent.learn(600)
    assert agent.num_timesteps >= 600
    after = list(agent.policy.parameters())
    assert any(not (a == b).all() for a, b in zip(before, after, strict=True))
    action, _ = agent.predict(env.reset(seed=0)[0])
    assert env.action_space.contains(int(action))
