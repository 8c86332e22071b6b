"""Simple policies: constant ones by hand, the guidelines in single states and in any state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.simple import Constant, GuidelineRules, MaximumTreatment, NoTreatment, RandomPolicy
from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.clinical import rules
from worldmodel.clinical.safety import assess_episodes
from worldmodel.observation import observation_at
from worldmodel.synthetic import generate

ALL = (RandomPolicy(), NoTreatment(), MaximumTreatment(), Constant(7), GuidelineRules())
ROW = observation_at(toy_episodes(2, 3), jnp.int32(0), jnp.int32(0))


def observation(meanbp=70.0, lactate=1.5, vasopressor=0, step=3, pf=400.0):
    dynamic = ROW.dynamic
    for name, value in (("meanbp", meanbp), ("lactate", lactate), ("pao2", pf), ("fio2", 100.0)):
        dynamic = dynamic.at[schema.INDEX[name]].set(value)
    return ROW.replace(dynamic=dynamic, vasopressor=jnp.int32(vasopressor), step=jnp.int32(step))


@jax.jit
def levels_of(policy, seen):
    return schema.action_levels(jnp.argmax(policy(jax.random.key(0), seen)))


def levels(policy, **seen):
    vasopressor, fluid = levels_of(policy, observation(**seen))
    return int(vasopressor), int(fluid)


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: type(policy).__name__)
def test_every_policy_gives_a_distribution_in_every_row(policy):
    episodes = toy_episodes(20, 6)
    probs = policy.action_probs(episodes)
    assert probs.shape == (20, 6, 25) and (probs >= 0).all()
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-6)


def test_constant_policies_by_hand():
    at = {
        RandomPolicy(): np.full(25, 0.04),
        NoTreatment(): np.eye(25)[0],
        MaximumTreatment(): np.eye(25)[24],
        Constant(7): np.eye(25)[7],
    }
    for policy, want in at.items():
        np.testing.assert_allclose(policy(jax.random.key(0), observation()), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        # At admission fluid comes first, unless the pressure is very low.
        ({"meanbp": 64.9, "step": 0}, (0, 4)),
        ({"meanbp": 55.0, "step": 0}, (0, 4)),
        ({"meanbp": 54.9, "step": 0}, (1, 4)),
        ({"lactate": 2.1, "step": 0}, (0, 4)),
        ({"lactate": 2.0, "meanbp": 65.0, "step": 0}, (0, 1)),
        # Early fluid ends with hour 8.
        ({"lactate": 4.0, "step": 1}, (0, 4)),
        ({"lactate": 4.0, "step": 2}, (0, 2)),
        # The vasopressor goes one level up below 65, stays, and goes one down above 75.
        ({"meanbp": 64.9, "vasopressor": 1}, (2, 2)),
        ({"meanbp": 64.9, "vasopressor": 4}, (4, 2)),
        ({"meanbp": 65.0, "vasopressor": 2}, (2, 1)),
        ({"meanbp": 75.0, "vasopressor": 2}, (2, 1)),
        ({"meanbp": 75.1, "vasopressor": 2}, (1, 1)),
        ({"meanbp": 75.1, "vasopressor": 0}, (0, 1)),
        # Half the fluid where the lungs fail.
        ({"lactate": 4.0, "step": 0, "pf": 200.0}, (0, 4)),
        ({"lactate": 4.0, "step": 0, "pf": 199.0}, (0, 2)),
        ({"lactate": 4.0, "pf": 199.0}, (0, 1)),
        ({"pf": 199.0}, (0, 0)),
    ],
)
def test_guidelines_by_hand(seen, expected):
    assert levels(GuidelineRules(), **seen) == expected


pressures = st.one_of(st.floats(20, 200, width=32), st.sampled_from([55.0, 65.0, 75.0, 95.0]))
lactates = st.one_of(st.floats(0.25, 30, width=32), st.sampled_from([2.0, 2.5]))
thresholds = st.floats(0, 300, width=32, allow_subnormal=False)


@given(
    pressures, lactates, st.integers(0, 4), st.integers(0, 19), st.floats(20, 700, width=32),
    st.tuples(*[st.integers(-1, 6)] * 4), st.tuples(*[thresholds] * 4),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_guidelines_are_adherent_in_any_state_and_setting(
    meanbp, lactate, before, step, pf, amounts, limits
):
    early_fluid, later_fluid, maintenance, highest = amounts
    early_hours, severe_map, wean_above, restrain_pf = limits
    odd = GuidelineRules(
        early_fluid=early_fluid, later_fluid=later_fluid, maintenance=maintenance, highest=highest,
        early_hours=early_hours, severe_map=severe_map, wean_above=wean_above,
        restrain_pf=restrain_pf,
    )  # fmt: skip
    for policy in (GuidelineRules(), odd):
        vasopressor, fluid = levels(
            policy, meanbp=meanbp, lactate=lactate, vasopressor=before, step=step, pf=pf
        )
        assert 0 <= vasopressor <= 4 and 0 <= fluid <= 4 and abs(vasopressor - before) <= 1
        row = map(jnp.asarray, (meanbp, lactate, vasopressor, fluid))
        assert not rules.g1_untreated_hypoperfusion(*row)
        row = map(jnp.asarray, (meanbp, vasopressor, before, step))
        assert not rules.g2_unneeded_escalation(*row)
        assert not (step == 0 and meanbp >= 65 and vasopressor > before)


def test_guidelines_keep_every_rule_in_the_synthetic_world():
    episodes, _ = generate(jax.random.key(2), 128, policy=GuidelineRules(), keep_latent=False)
    table = assess_episodes(episodes).table()
    assert table["adherence"] == 100.0
    for name in ("unsafe", "dose_jump", "abrupt_stop", "early_fluid_missed", "fluid_overload"):
        assert table[name] == 0.0
