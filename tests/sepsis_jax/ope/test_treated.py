"""What was treated in flawed input is counted, reported, and treated alike everywhere."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from policy.simple import RandomPolicy
from sepsis_jax.ope import ClinicianFit, InputPolicy, check, estimated_clinician, evaluate
from sepsis_jax.ope.policies import read_probabilities, write_probabilities
from sepsis_jax.pipelines import ope_estimates
from sepsis_jax.pipelines.ope import _behavior, open_policies, softened
from sepsis_jax.pipelines.ope_estimates import OPEOptions, estimate_policies, ope_keys
from tests.sepsis_jax.ope.samples import random_case
from tests.toy import toy_episodes
from worldmodel.errors import InputError

OPTIONS = OPEOptions(
    values="none", estimators="wis", n_bootstrap=0, interval="delta", zero_behavior="drop"
)


def with_action(data, action):
    return replace(data, action=jnp.asarray(action))


def test_counts_of_check_reach_the_table():
    data, probs, _ = random_case(stays=12, steps=5, policies=1)
    flawed = replace(data, behavior_prob=data.behavior_prob.at[2, 0].set(0.0), behavior_probs=None)
    cleaned, kept, treated = check(flawed, probs, InputPolicy(zero_behavior="drop"))
    table = evaluate(
        cleaned, kept, key=jax.random.key(0), n_bootstrap=0, interval="delta", treated=treated
    )
    assert table.attrs["treated"]["stays_dropped"] == 1
    assert (table.attrs["stays_given"], table.attrs["stays"]) == (12, 11)


def test_dropped_stays_are_reported_and_left_out_of_every_table(monkeypatch):
    episodes = toy_episodes(num_stays=80)
    episodes = replace(episodes, behavior_prob=episodes.behavior_prob.at[3, 0].set(0.0))
    seen = {}

    def simulated(world_model, key, episodes, policy, **options):
        seen["stays"] = np.asarray(episodes.stay_id)
        return ope_estimates.SimulatedValue(0.0, 0.0, np.zeros(1), np.zeros(len(seen["stays"])))

    class Model:
        num_members = 1

    monkeypatch.setattr(ope_estimates, "simulated_value", simulated)
    result = estimate_policies(
        episodes,
        {"random": RandomPolicy().action_probs(episodes)},
        {"random": RandomPolicy()},
        keys=ope_keys(0),
        options=OPTIONS,
        world_model=Model(),
    )
    assert result.treated["stays_dropped"] == 1
    assert result.table.attrs["treated"]["stays_dropped"] == 1
    kept = np.delete(np.asarray(episodes.stay_id), 3)
    assert np.array_equal(seen["stays"], kept)
    sexes = result.groups[result.groups["group"].isin(["female", "male"])]
    assert sexes.groupby("group")["stays"].first().sum() == 79


def test_float_actions_are_whole_or_refused():
    data, probs, _ = random_case(stays=12, steps=5, policies=1)
    action = np.asarray(data.action).astype(float)
    cleaned, *_ = check(with_action(data, action), probs)
    assert np.array_equal(cleaned.action, np.where(data.alive, data.action, 0))
    for value in (3.7, np.nan, np.inf):
        flawed = action.copy()
        flawed[0, 1] = value
        with pytest.raises(
            InputError, match=r"action: not a whole number .* step 1 of stay number 0;"
        ):
            check(with_action(data, flawed), probs)
    with pytest.raises(InputError, match="action: got bool"):
        check(with_action(data, action > 3), probs)


def test_fractions_in_the_keys_of_a_table_are_refused(tmp_path):
    episodes = toy_episodes()
    path = tmp_path / "p.csv"
    write_probabilities(path, episodes, np.full((*episodes.valid.shape, 25), 0.04))
    table = pd.read_csv(path)
    for column in ("step", "stay_id"):
        table.assign(**{column: table[column] + 0.4}).to_csv(path, index=False)
        with pytest.raises(InputError, match=f"column {column} holds .* whole numbers"):
            read_probabilities(path, episodes)
    table.assign(step=table["step"].astype(float)).to_csv(path, index=False)
    assert read_probabilities(path, episodes).shape[-1] == 25


def test_both_kinds_of_behavior_probabilities_must_agree():
    data, probs, _ = random_case(stays=12, steps=5, policies=1)
    flawed = replace(data, behavior_prob=data.behavior_prob.at[4, 0].multiply(0.9))
    with pytest.raises(
        InputError, match=r"behavior_prob: another probability .* step 0 of stay number 4;"
    ):
        check(flawed, probs)


@pytest.mark.parametrize("which", ["policy", "behavior", "both"])
def test_rounded_rows_do_not_compound_with_the_length_of_a_stay(which):
    data, _, _ = random_case(stays=12, steps=60, policies=1)
    probs, behavior = np.asarray(data.behavior_probs), np.asarray(data.behavior_probs)
    probs = probs * (1.0009 if which != "behavior" else 1.0)
    if which != "policy":
        data = replace(
            data,
            behavior_probs=jnp.asarray(behavior * 0.9991),
            behavior_prob=jnp.where(data.alive, data.behavior_prob * 0.9991, 1.0),
        )
    table = evaluate(data, {"same": probs}, key=jax.random.key(0), n_bootstrap=0, interval="delta")
    rows = table.set_index("estimator")["estimate"]
    assert rows["is"] == pytest.approx(rows["on_policy"], rel=1e-4)
    steps = int(data.alive.sum())
    assert table.attrs["treated"]["rows_normalized"] == (2 if which == "both" else 1) * steps


def test_softening_reaches_built_in_policies_and_nonsense_is_refused():
    episodes = toy_episodes()
    behavior = np.full((*episodes.valid.shape, 25), 0.04, np.float32)
    options = OPEOptions(soften="uniform", soften_share=0.5)
    given = ["none", "clinician"]
    probs = softened(open_policies(given, episodes, behavior)[0], given, behavior, options)
    assert np.allclose(np.asarray(probs["none"])[0, 0, :2], [0.52, 0.02])
    assert np.allclose(probs["clinician"], behavior)
    for flawed in ({"soften": "nonsense"}, {"soften_share": 1.5}, {"soften_share": float("nan")}):
        with pytest.raises(InputError, match=next(iter(flawed))):
            OPEOptions(**flawed)
    with pytest.raises(InputError, match="needs the clinician"):
        softened(open_policies(["none"], episodes, None)[0], ["none"], None,
                 OPEOptions(soften="clinician"))  # fmt: skip


def test_no_stay_is_evaluated_with_a_clinician_that_saw_its_patient(monkeypatch):
    episodes = toy_episodes(num_stays=60)
    seen = []
    fit = estimated_clinician.fit_behavior

    def spied(key, part, *, models):
        seen.append(np.asarray(part.split))
        return fit(key, part, models=models)

    monkeypatch.setattr(estimated_clinician, "fit_behavior", spied)
    options = OPEOptions(split="all", behavior_folds=3)
    everyone = np.arange(60)
    known = _behavior("marginal", episodes, everyone, jax.random.key(0), options)
    assert known.estimated == ClinicianFit(32, shared=True)  # 4/5 of two thirds
    assert len(seen) == 3 and (np.sum([split == 2 for split in seen], 0) == 1).all()
    assert np.allclose(known.probs.sum(-1), 1, atol=1e-4)
    held_out = np.flatnonzero(np.asarray(episodes.split) == 2)
    apart = _behavior("marginal", episodes, held_out, jax.random.key(0), options)
    train = int((np.asarray(episodes.split) == 0).sum())
    assert apart.estimated == ClinicianFit(train) and len(seen) == 3
    result = estimate_policies(
        episodes,
        {"random": RandomPolicy().action_probs(episodes)},
        {},
        keys=ope_keys(0),
        options=OPEOptions(values="none", estimators="wis", n_bootstrap=0),
        behavior_probs=known.probs,
        clinician=known.estimated,
    )
    row = result.table.iloc[0]
    assert np.isfinite(row["se"]) and row["low"] < row["estimate"] < row["high"]
