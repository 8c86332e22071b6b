"""Flawed input: refused, or treated as asked and counted."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepsis_jax.ope import InputPolicy, OPEData, check, evaluate, from_episodes, rewards
from sepsis_jax.ope.data import FlawError
from tests.sepsis_jax.ope.samples import random_case
from tests.toy import toy_episodes
from worldmodel.errors import InputError


@pytest.fixture
def case():
    data, probs, _ = random_case(stays=12, steps=5, policies=1)
    return data, {name: np.array(p) for name, p in probs.items()}


def changed(data, field, index, value):
    array = np.array(getattr(data, field))
    array[index] = value
    return replace(data, **{field: jnp.asarray(array)})


def test_clean_input_passes_unchanged(case):
    data, probs = case
    cleaned, kept, counts = check(data, probs)
    assert set(counts.values()) == {0}
    assert np.array_equal(cleaned.behavior_prob, data.behavior_prob)
    assert np.array_equal(
        kept["policy 0"][np.asarray(data.alive)], probs["policy 0"][np.asarray(data.alive)]
    )


@pytest.mark.parametrize("value", [-0.1, 1.5, np.nan])
def test_target_probabilities_outside_the_unit_interval(case, value):
    data, probs = case
    probs["policy 0"][0, 0, 3] = value
    with pytest.raises(
        InputError, match=r"policy 'policy 0'.*outside \[0, 1\].*step 0 of stay number 0;"
    ):
        check(data, probs)


def test_rows_that_do_not_sum_to_one(case):
    data, probs = case
    probs["policy 0"][0, 0] *= 0.5
    with pytest.raises(InputError, match="not summing to 1"):
        check(data, probs)
    _, kept, counts = check(data, probs, InputPolicy(row_sums="normalize"))
    assert counts["rows_normalized"] == 1
    assert float(kept["policy 0"][0, 0].sum()) == pytest.approx(1.0)
    probs["policy 0"][0, 0] = 0.0
    with pytest.raises(InputError, match="not summing to 1"):
        check(data, probs, InputPolicy(row_sums="normalize"))


def test_zero_behavior_probability_of_a_recorded_action(case):
    data, probs = case
    data = changed(data, "behavior_prob", (2, 0), 0.0)
    with pytest.raises(InputError, match="0 for a recorded action"):
        check(data, probs)
    cleaned, kept, counts = check(data, probs, InputPolicy(zero_behavior="drop"))
    assert cleaned.num_stays == 11 and counts["stays_dropped"] == 1
    assert len(kept["policy 0"]) == 11
    cleaned, _, counts = check(data, probs, InputPolicy(zero_behavior="floor", floor=1e-4))
    assert cleaned.num_stays == 12 and counts["behavior_floored"] == 1
    assert float(cleaned.behavior_prob[2, 0]) == pytest.approx(1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_missing_reward(case, value):
    data, probs = case
    data = changed(data, "reward", (3, 0), value)
    with pytest.raises(InputError, match=r"reward.*step 0 of stay number 3;"):
        check(data, probs)
    cleaned, _, counts = check(data, probs, InputPolicy(missing_reward="drop"))
    assert counts["stays_dropped"] == 1 and np.isfinite(cleaned.reward).all()


def test_unequal_lengths(case):
    data, probs = case
    with pytest.raises(InputError, match="lengths must agree"):
        check(replace(data, action=data.action[:, :-1]), probs)
    with pytest.raises(InputError, match="policy 'policy 0': got shape"):
        check(data, {"policy 0": probs["policy 0"][:-1]})
    gap = np.array(data.alive)
    gap[0, 1:3] = [False, True]
    with pytest.raises(InputError, match="True after an end"):
        check(replace(data, alive=jnp.asarray(gap)), probs)


def test_actions_outside_the_table(case):
    data, probs = case
    with pytest.raises(InputError, match="action: outside 0 to 24"):
        check(changed(data, "action", (0, 0), 25), probs)


def test_garbage_on_padding_is_never_read(case):
    data, probs = case
    after = ~np.asarray(data.alive)
    dirty = replace(
        data,
        reward=jnp.where(after, jnp.nan, data.reward),
        behavior_prob=jnp.where(after, jnp.nan, data.behavior_prob),
    )
    probs["policy 0"] = np.where(after[..., None], np.nan, probs["policy 0"])
    table = evaluate(dirty, probs, key=jax.random.key(0), n_bootstrap=20)
    clean = evaluate(data, case[1] | {"policy 0": np.nan_to_num(probs["policy 0"], nan=0.04)},
                     key=jax.random.key(0), n_bootstrap=20)  # fmt: skip
    assert np.allclose(table["estimate"], clean["estimate"])


def test_a_policy_that_no_stay_followed_is_undefined_and_said_so(case):
    data, probs = case
    never = np.zeros_like(probs["policy 0"])
    other = (np.asarray(data.action) + 1) % 25
    np.put_along_axis(never, other[..., None], 1.0, -1)
    table = evaluate(data, {"never": never}, key=jax.random.key(0), n_bootstrap=20)
    rows = table.set_index("estimator")
    assert np.isnan(rows.loc["wis", "estimate"]) and not rows.loc["wis", "trust"]
    assert "no stay followed the policy" in rows.loc["wis", "reason"]
    assert rows.loc["is", "estimate"] == 0.0 and not rows.loc["is", "trust"]


@pytest.mark.parametrize(
    "options",
    [
        {"estimators": ["nope"]},
        {"estimators": ["dr"]},
        {"interval": "nope"},
        {"gamma": 1.5},
        {"alpha": 0.0},
        {"interval": "bca", "n_bootstrap": 0},
        {"tail_levels": (0.0,)},
    ],
)
def test_bad_options_are_refused(case, options):
    data, probs = case
    with pytest.raises(InputError):
        evaluate(data, probs, **{"key": jax.random.key(0), "n_bootstrap": 10, **options})


def test_rewards_of_episodes():
    episodes = toy_episodes()
    found = np.asarray(rewards(episodes))
    length, died = np.asarray(episodes.length), np.asarray(episodes.died_90d)
    last = found[np.arange(len(length)), length - 1]
    assert np.array_equal(last, np.where(died, -15.0, 15.0))
    assert (found[~np.asarray(episodes.valid)] == 0).all()
    assert isinstance(from_episodes(episodes), OPEData)
    unknown = replace(episodes, behavior_prob=jnp.full_like(episodes.behavior_prob, jnp.nan))
    with pytest.raises(InputError, match="estimate the clinician"):
        from_episodes(unknown)


def test_flaws_are_told_with_the_id_of_the_stay(case):
    data, probs = case
    with pytest.raises(FlawError) as found:
        check(changed(data, "reward", (3, 0), np.nan), probs)
    ids = np.arange(100, 100 + data.num_stays)
    assert "first at step 0 of stay 103;" in str(found.value.named(ids))
