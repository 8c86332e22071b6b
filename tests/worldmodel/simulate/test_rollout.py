"""Rollouts against a slow implementation, and invariances of a branch."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worldmodel.simulate.plain_rollout import play
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.simulate.history import start_history
from worldmodel.simulate.randomness import abduct_noise
from worldmodel.simulate.rollout import rollout

KEY = jax.random.key(11)
PLANS = np.array([[0, 7, 24], [12, 12, 3], [0, 7, 24]])
ARRAYS = ("values", "sofa", "ventilation", "reward", "action", "mortality", "projected")


@pytest.fixture(scope="module")
def patients(episodes):
    """Two stays that start in rows 0 and 8, both before their last row."""
    long = np.flatnonzero(np.asarray(episodes.length) >= 12)[:2]
    return episodes.select(long), np.array([0, 8])


@pytest.fixture(scope="module")
def start(world, patients):
    return start_history(world, *patients)


@pytest.fixture(scope="module")
def base(world, start):
    return rollout(world, KEY, start, PLANS, samples=4, features=schema.FEATURE_NAMES)


def of(rollouts, *index):
    return {name: np.asarray(getattr(rollouts, name))[index] for name in ARRAYS}


def assert_same(a, b):
    for name in ARRAYS:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_close(a, b):
    """Policies and plans are two compiled programs, which some processors round differently."""
    for name in ARRAYS:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5, err_msg=name)


def all_of(rollouts):
    return of(rollouts, slice(None))


@pytest.mark.parametrize("mode", ["corrected", "reference"])
def test_rollout_is_its_slow_twin(world, patients, mode):
    episodes, steps = patients
    noise = np.random.default_rng(0).normal(size=(2, 2, 3, 39)).astype(np.float32)
    got = rollout(
        world, KEY, start_history(world, *patients, recorded_sofa=mode == "reference"),
        PLANS[:2], samples=2, noise=jnp.asarray(noise), mode=mode, features=schema.FEATURE_NAMES,
    )  # fmt: skip
    total = 0
    for p in range(2):
        for k in range(2):
            for s in range(2):
                want = play(world, episodes, p, int(steps[p]), PLANS[k], noise[p, s], mode)
                branch = of(got, p, k, s)
                np.testing.assert_allclose(
                    branch["values"], want["values"], rtol=2e-4, atol=2e-3, err_msg=f"{p}{k}{s}"
                )
                for name in ("sofa", "reward", "ventilation", "mortality"):
                    np.testing.assert_allclose(branch[name], want[name], atol=1e-4, err_msg=name)
                assert branch["projected"] == want["projected"]
                np.testing.assert_array_equal(branch["action"], PLANS[k])
                total += want["projected"]
                died = want["mortality"]
                if mode == "reference":
                    died = float(died > 0.5)
                np.testing.assert_allclose(
                    got.total_reward[p, k, s], sum(want["reward"]) + 15 - 30 * died, atol=1e-3
                )
    assert (total > 0) is (mode == "corrected")


def test_equal_plans_have_equal_futures(base):
    assert_same(of(base, slice(None), 0), of(base, slice(None), 2))
    assert not np.allclose(base.values[:, 0], base.values[:, 1])


def test_first_noise_is_common_to_all_plans(world, start):
    """With sigma alone left in the model, all plans get the same noise."""
    still = replace(
        world,
        state_model=jax.tree.map(jnp.zeros_like, world.state_model),
    )
    got = rollout(still, KEY, start, PLANS, samples=3, mode="reference")
    np.testing.assert_array_equal(got.values[:, 0], got.values[:, 1])
    own = rollout(still, KEY, start, PLANS, samples=3, mode="reference", common_noise=False)
    assert not np.isclose(own.values[:, 0], own.values[:, 1]).any()
    # Every patient, sample and step has noise of its own.
    flat = np.asarray(got.feature("lactate")[:, 0]).ravel()
    assert len(np.unique(flat)) == flat.size == 2 * 3 * 3


def test_other_keys_give_other_futures(world, start, base):
    other = rollout(
        world, jax.random.key(12), start, PLANS, samples=4, features=schema.FEATURE_NAMES
    )
    assert not np.isclose(other.values, base.values).all(-1).any()


def test_noise_is_standard_normal(world, start):
    """A model of zeros shows the noise itself: z' = 0 + 1 * eps."""
    still = replace(world, state_model=jax.tree.map(jnp.zeros_like, world.state_model))
    got = rollout(still, KEY, start, PLANS[:1], samples=500, mode="reference",
                  features=("meanbp", "lactate"))  # fmt: skip
    for name in ("meanbp", "lactate"):
        j = schema.INDEX[name]
        eps = (np.asarray(got.feature(name)) - world.scaler.mean[j]) / world.scaler.std[j]
        assert abs(eps.mean()) < 0.06 and abs(eps.std() - 1) < 0.04  # 3000 values


@pytest.mark.parametrize("patient", [0, 1])
def test_a_patient_alone_is_the_same(world, patients, base, patient):
    episodes, steps = patients
    alone = start_history(world, episodes.select(np.array([patient])), steps[[patient]])
    got = rollout(world, KEY, alone, PLANS, samples=4, features=schema.FEATURE_NAMES)
    assert_close(of(got, 0), of(base, patient))


def test_the_order_of_patients_does_not_matter(world, patients, base):
    episodes, steps = patients
    swapped = start_history(world, episodes.select(np.array([1, 0])), steps[::-1])
    got = rollout(world, KEY, swapped, PLANS, samples=4, features=schema.FEATURE_NAMES)
    assert_close(of(got, [1, 0]), all_of(base))


def test_fewer_plans_or_samples_are_a_part(world, start, base):
    got = rollout(world, KEY, start, PLANS[1:2], samples=2, features=schema.FEATURE_NAMES)
    assert_close(of(got, slice(None), 0), of(base, slice(None), 1, slice(2)))


@pytest.mark.parametrize("max_branches", [1, 12])
def test_chunks_change_no_number(world, start, base, max_branches):
    got = rollout(
        world, KEY, start, PLANS, samples=4, features=schema.FEATURE_NAMES,
        max_branches=max_branches,
    )  # fmt: skip
    assert_close(all_of(got), all_of(base))


def test_a_longer_horizon_begins_the_same(world, start, base):
    longer = np.concatenate([PLANS, PLANS[:, :1]], axis=1)
    got = rollout(world, KEY, start, longer, samples=4, features=schema.FEATURE_NAMES)
    np.testing.assert_allclose(got.values[..., :3, :], base.values, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.sofa[..., :3], base.sofa)


def test_plans_may_differ_by_patient(world, start, base):
    own = np.stack([PLANS, PLANS[[1, 0, 2]]])
    got = rollout(world, KEY, start, own, samples=4, features=schema.FEATURE_NAMES)
    assert_close(of(got, 0), of(base, 0))
    assert_close(of(got, 1), of(base, 1, [1, 0, 2]))


def test_results_are_finite_and_possible(base):
    for name, array in all_of(base).items():
        assert np.isfinite(array).all(), name
    values = np.asarray(base.values)
    slack = 1e-3 * (schema.HIGH - schema.LOW)
    assert (values >= schema.LOW - slack).all() and (values <= schema.HIGH + slack).all()
    assert (base.feature("sysbp") >= base.feature("meanbp") - 0.01).all()
    assert (base.feature("meanbp") >= base.feature("diabp") - 0.01).all()
    assert ((base.mortality > 0) & (base.mortality < 1)).all()


def test_no_features_may_be_asked_for(world, start, base):
    got = rollout(world, KEY, start, PLANS, samples=4, features=())
    assert got.values.shape == (2, 3, 4, 3, 0)
    np.testing.assert_array_equal(got.sofa, base.sofa)


# Ensembles


def test_sample_s_is_played_by_member_s_mod_e(ensemble, patients):
    start = start_history(ensemble, *patients)
    got = rollout(ensemble, KEY, start, PLANS, samples=4, features=schema.FEATURE_NAMES)
    members = [
        rollout(ensemble.member(e), KEY, start, PLANS, samples=4, features=schema.FEATURE_NAMES)
        for e in range(2)
    ]
    for s in range(4):
        alone = members[s % 2]
        branch = (slice(None), slice(None), s)
        assert_close(of(got, *branch), of(alone, *branch))


def test_members_disagree(ensemble, patients):
    start = start_history(ensemble, *patients)
    zero = jnp.zeros((2, 2, 3, 39))
    got = rollout(ensemble, KEY, start, PLANS, samples=2, noise=zero)
    assert not np.allclose(got.values[:, :, 0], got.values[:, :, 1])


# Policies


def test_a_constant_policy_is_a_constant_plan(world, start):
    plan = np.full((1, 3), 12)
    got = rollout(
        world, KEY, start, lambda key, observation: jax.nn.one_hot(12, 25), horizon=3, samples=2
    )
    assert_close(all_of(got), all_of(rollout(world, KEY, start, plan, samples=2)))


def test_a_policy_sees_the_branch_and_its_own_keys(world, start):
    def policy(key, observation):
        assert key.shape == observation.step.shape == () and observation.past is None
        level = jnp.arange(25) % 5 == 0
        return jnp.where(observation.step % 2 == 0, level, jnp.arange(25) < 5) / 5.0

    got = rollout(world, KEY, start, policy, horizon=3, samples=2)
    action = np.asarray(got.action)[:, 0]  # [P, S, H]; patients start in rows 0 and 8
    assert (action[..., [0, 2]] % 5 == 0).all() and (action[..., 1] < 5).all()
    assert len(np.unique(action)) > 2
    again = rollout(world, KEY, start, policy, horizon=3, samples=2)
    assert_same(all_of(got), all_of(again))


def test_policy_randomness_is_apart_from_the_patients(world, start):
    """A policy that chooses the actions of a plan gets the noise of that plan."""

    def policy(key, observation):
        return jax.nn.one_hot(3, 25) + 0 * jax.random.normal(key)

    got = rollout(world, KEY, start, policy, horizon=3, samples=2)
    assert_close(all_of(got), all_of(rollout(world, KEY, start, np.full((1, 3), 3), samples=2)))


# Abduction


def test_abducted_noise_gives_back_the_record(world, patients, start):
    episodes, steps = patients
    rows = np.arange(2)[:, None], steps[:, None] + np.arange(1, 4)
    plan = np.asarray(episodes.action)[np.arange(2)[:, None], steps[:, None] + np.arange(3)]
    recorded = world.scaler.normalize(episodes.dynamic)[rows]
    noise = abduct_noise(world, start, plan, recorded)
    assert noise.shape == (2, 1, 3, 39)
    other = (plan + 5) % 25
    got = rollout(
        world, KEY, start, np.stack([plan, other], axis=1), noise=noise, mode="reference",
        features=schema.FEATURE_NAMES,
    )  # fmt: skip
    replayed = world.scaler.normalize(got.values[:, 0, 0])
    np.testing.assert_allclose(replayed, recorded, atol=1e-4)
    np.testing.assert_allclose(
        got.values[:, 0, 0], np.asarray(episodes.dynamic)[rows], rtol=1e-4, atol=1e-3
    )
    assert np.abs(world.scaler.normalize(got.values[:, 1, 0]) - recorded).max() > 1e-2


def test_abduction_needs_one_model(ensemble, patients):
    start = start_history(ensemble, *patients)
    with pytest.raises(InputError, match=r"pick one with \.member"):
        abduct_noise(ensemble, start, np.zeros((2, 1), int), np.zeros((2, 1, 39)))


# Errors and compilation


@pytest.mark.parametrize(
    ("plans", "settings", "message"),
    [
        ([[25]], {}, "joint action 25 is outside 0 to 24"),
        ([[0, -1]], {}, "joint action -1 is outside 0 to 24"),
        ([[0.0]], {}, "got float64 values, expected integers"),
        ([[True]], {}, "got bool values, expected integers"),
        ([0, 1], {}, r"plans: got shape \(2,\)"),
        (np.zeros((2, 0), int), {}, r"plans: got shape \(2, 0\)"),
        (np.zeros((0, 2), int), {}, r"plans: got shape \(0, 2\)"),
        (np.zeros((3, 1, 1), int), {}, "for 3 patients, but 2 start"),
        (np.zeros((1, 1, 1, 1), int), {}, r"plans: got shape \(1, 1, 1, 1\)"),
        ([[0]], {"horizon": 2}, "horizon: got 2, but the plans have 1 steps"),
        ([[0]], {"features": ("pulse",)}, "features: 'pulse' is unknown"),
        ([[0]], {"mode": "Reference"}, "mode: got 'Reference'"),
        ([[0]], {"samples": 0}, "samples: got 0"),
        ([[0]], {"noise": np.zeros((2, 1, 2, 39))}, r"noise: got shape \(2, 1, 2, 39\)"),
        (lambda key, observation: key, {}, "horizon: got None, expected at least 1"),
        (lambda key, observation: key, {"horizon": 0}, "horizon: got 0, expected at least 1"),
    ],
)
def test_bad_requests_are_named(world, start, plans, settings, message):
    plans = plans if callable(plans) else np.asarray(plans)
    with pytest.raises(InputError, match=message):
        rollout(world, KEY, start, plans, **settings)


def test_samples_must_fill_the_ensemble(ensemble, patients):
    with pytest.raises(InputError, match=r"samples: got 3, expected a multiple of 2 \(members\)"):
        rollout(ensemble, KEY, start_history(ensemble, *patients), PLANS, samples=3)


def test_equal_shapes_compile_once(world, start, patients):
    traces = []

    def policy(key, observation):
        traces.append(1)
        return jax.nn.one_hot(0, 25)

    rollout(world, KEY, start, policy, horizon=2, samples=2)
    once = len(traces)
    assert once >= 1
    later_start = start_history(world, patients[0], 5)
    other = jax.tree.map(lambda leaf: leaf * 1.5, world)
    rollout(world, jax.random.key(99), later_start, policy, horizon=2, samples=2)
    rollout(other, KEY, start, policy, horizon=2, samples=2)
    assert len(traces) == once
    rollout(world, KEY, start, policy, horizon=2, samples=3)  # another shape
    assert len(traces) > once


def test_unknown_precision_is_refused(world, start):
    with pytest.raises(InputError, match="precision: got 'float8', expected one of"):
        rollout(world, KEY, start, PLANS, precision="float8")


def test_a_rollout_may_be_traced(world, start, base):
    """Inside an outer jit, where no compiler options can be given."""
    inner = jax.jit(lambda key: rollout(world, key, start, PLANS, samples=4, features=("meanbp",)))
    np.testing.assert_allclose(inner(KEY).reward, base.reward, rtol=1e-5, atol=1e-5)


def test_other_plans_of_equal_shape_compile_nothing(world, start):
    from worldmodel.simulate import rollout as module

    compiled = module._jitted(None)
    compiled.clear_cache()  # of what other tests compiled, so that the bound is far away
    settings = {"samples": 4, "features": schema.FEATURE_NAMES}
    rollout(world, KEY, start, PLANS, **settings)
    assert compiled._cache_size() == 1
    rollout(world, jax.random.key(5), start, (PLANS + 3) % 25, **settings)
    assert compiled._cache_size() == 1
    rollout(world, KEY, start, PLANS[:, :1], **settings)
    assert compiled._cache_size() == 2
