"""Decisions are learned by the wanted probabilities of all 25 actions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy import qwen3
from policy.agent.dialogue import Decision
from policy.agent.tools import PRESCRIPTION, DecisionTokens, level_targets, prescription_arguments
from policy.qwen3.logprobs import token_logprobs
from policy.serving.tokens import write_call
from policy.train.data.packing import Dialogue, Rows, as_read, cut, judged_by_turn, pack, written
from policy.train.losses import Objective, RolloutRows, cross_entropy, policy_loss
from policy.train.rl.advantages import AdvantageConfig, of_all_actions
from policy.train.rl.minibatch_update import JudgedDecisions
from policy.train.rl.trainer import AgenticConfig
from tests.policy.train.conftest import stay_of
from tests.policy.train.test_packing import replayed
from worldmodel import schema
from worldmodel.errors import InputError


@pytest.fixture(scope="module")
def decisions(tokens):
    return DecisionTokens.of(tokens)


@pytest.fixture(scope="module")
def model(untaught):
    return qwen3.load(untaught)


def decision(turn, action, values, **state):
    healthy = {"sofa": 3.0, "meanbp": 80.0, "lactate": 1.0, "pao2": 90.0, "fio2": 21.0}
    return Decision(
        step=3, action=action, reward=0.0, previous_vasopressor=0, simulations=1, invalid=0,
        values=values, turn=turn, **(healthy | state),
    )  # fmt: skip


def judged(stay, draw):
    """The stay with random wanted probabilities of its prescriptions, which are the odd turns."""
    found = []
    for number, turn in enumerate(stay.turns[1::2]):
        action = schema.action_index(1, number % 5)
        assert turn.reply.tool_calls[0].arguments == prescription_arguments(action)
        values = tuple(draw.dirichlet(np.ones(25)).tolist())
        found.append(decision(2 * number + 1, action, values))
    return replace(stay, decisions=found)


def test_the_tokens_that_decide_are_the_levels(tokens, decisions):
    assert [tokens.text([level]) for level in decisions.levels] == list("01234")
    for action in range(25):
        ids = tokens.encode(write_call(PRESCRIPTION, prescription_arguments(action)))
        reply = [*tokens.encode("I see."), *ids, tokens.end_id]
        places = decisions.places_in(reply, action)
        written = [decisions.levels.index(reply[place]) for place in places]
        assert schema.action_index(*written) == action
        assert decisions.places_in(reply, (action + 1) % 25) is None
        assert decisions.places_in(reply[:-1], action) is None
    assert decisions.places_in([], 0) is None


def test_levels_of_several_tokens_are_refused(tokens):
    class Merging:
        end_id = tokens.end_id

        @staticmethod
        def encode(text):
            return tokens.encode(text.replace("4", "a level that is four"))

    with pytest.raises(InputError, match="decision_loss=sampled"):
        DecisionTokens.of(Merging())


def test_targets_are_a_marginal_and_a_conditional():
    table = np.random.default_rng(0).dirichlet(np.ones(25)).reshape(5, 5)
    first, second = level_targets(table.ravel(), schema.action_index(3, 1))
    np.testing.assert_allclose(first, table.sum(1), rtol=1e-5)
    np.testing.assert_allclose(second, table[3] / table[3].sum(), rtol=1e-5)
    impossible = np.zeros((5, 5))
    impossible[0, 2] = 1.0
    np.testing.assert_array_equal(level_targets(impossible.ravel(), 24)[1], np.eye(5)[2])


def test_a_dialogue_says_where_it_decides(tokens, decisions):
    stay = judged(stay_of(1, 3), np.random.default_rng(0))
    (found,) = written(stay, tokens, decisions)
    assert len(found.decides) == 3 and found.own[found.decides[:, :2]].all()
    for one, (*places, action), values in zip(
        stay.decisions, found.decides.tolist(), found.judged, strict=True
    ):
        levels = [decisions.levels.index(found.ids[place]) for place in places]
        assert schema.action_index(*levels) == action == one.action
        np.testing.assert_array_equal(values, np.float32(one.values))
    first, *rest = cut(found, int(found.ends()[3]), rest=True)
    (part,) = rest
    assert (len(first.decides), len(part.decides)) == (2, 1)
    assert part.ids[part.decides[0, :2]].tolist() == found.ids[found.decides[2, :2]].tolist()
    rows = pack([first, part], 2 * len(found), seed=0)
    assert (rows.wanted.any(-1).sum(), rows.mask[rows.wanted.any(-1)].all()) == (6, True)
    expected = [level_targets(np.float32(one.values), one.action) for one in stay.decisions]
    np.testing.assert_array_equal(
        np.sort(rows.wanted[rows.wanted.any(-1)], 0), np.sort(np.concatenate(expected), 0)
    )
    assert {*rows.ids[rows.wanted.any(-1)].tolist()} <= set(decisions.levels)
    assert pack(written(stay, tokens), 2 * len(found), seed=0).wanted is None


def test_refused_replies_are_read_and_not_learned(tokens, decisions):
    stay = judged(stay_of(1, 2), np.random.default_rng(0))
    (plain,) = written(stay, tokens, decisions)
    stay.turns[2] = replace(stay.turns[2], refused=True)
    (found,) = written(stay, tokens, decisions)
    assert found.ids.tolist() == plain.ids.tolist()
    left_out = plain.own & ~found.own
    said = tokens.text(plain.ids[left_out].tolist())
    assert '"simulation"' in said and "prescription" not in said
    assert found.decides.tolist() == plain.decides.tolist()


def sequence(tokens, decisions, wanted, action):
    """A prompt and the prescription of an action, with wanted probabilities."""
    prompt = tokens.encode("MAP 61 lactate 2.4")
    reply = decisions.calls[action]
    places = np.array(decisions.places_in(reply, action)) + len(prompt)
    own = np.r_[np.zeros(len(prompt), bool), np.ones(len(reply), bool)]
    ids = np.array([*prompt, *reply], np.int32)
    decides = np.array([[*places, action]], np.int32)
    return Dialogue(ids, own, decides, np.float32(wanted)[None])


def test_the_loss_is_the_mean_over_what_might_have_been_written(model, tokens, decisions):
    """Of the vasopressor's level: written by the wanted probabilities, learned as usual."""
    wanted = np.random.default_rng(1).dirichlet(np.ones(25))
    soft = sequence(tokens, decisions, wanted, schema.action_index(2, 0))
    found = cross_entropy(model, pack([soft], len(soft), seed=0), levels=decisions.levels)
    format_part = float(found.metrics["format_loss"])
    assert float(found.total) == pytest.approx(
        format_part + float(found.metrics["decision_loss"]), rel=1e-5
    )
    share = wanted.reshape(5, 5).sum(1)
    first, second, _ = soft.decides[0].tolist()
    expected = 0.0
    for level in range(5):
        ids = sequence(tokens, decisions, wanted, schema.action_index(level, 0)).ids
        expected -= share[level] * float(token_logprobs(model, ids[None]).logprob[0, first])
    conditional = wanted.reshape(5, 5)[2] / wanted.reshape(5, 5)[2].sum()
    for level in range(5):
        ids = sequence(tokens, decisions, wanted, schema.action_index(2, level)).ids
        expected -= conditional[level] * float(token_logprobs(model, ids[None]).logprob[0, second])
    assert float(found.metrics["decision_loss"]) == pytest.approx(expected, rel=1e-4)


def test_certain_wishes_are_the_usual_loss(model, tokens, decisions):
    action = schema.action_index(4, 3)
    one = sequence(tokens, decisions, np.eye(25)[action], action)
    rows = pack([one], len(one), seed=0)
    plain = cross_entropy(model, rows._replace(wanted=None))
    found = cross_entropy(model, rows, levels=decisions.levels)
    assert float(found.total) == pytest.approx(float(plain.total), rel=1e-5)
    assert float(found.weight) == float(plain.weight) == rows.mask.sum()
    heavy = cross_entropy(model, rows, levels=decisions.levels, decision_weight=5.0)
    extra = 4.0 * float(found.metrics["decision_loss"])
    assert float(heavy.total) == pytest.approx(float(found.total) + extra, rel=1e-5)
    assert float(heavy.weight) == rows.mask.sum() + 8.0
    assert float(heavy.tokens) == rows.mask.sum()


def test_decisions_of_sampled_rows_follow_the_wishes_and_nothing_else(model, tokens, decisions):
    wanted = np.random.default_rng(2).dirichlet(np.ones(25))
    one = sequence(tokens, decisions, wanted, 7)
    packed: Rows = pack([one], len(one), seed=0)
    zeros = np.zeros(packed.ids.shape, np.float32)
    logprob = np.asarray(token_logprobs(model, packed.ids, temperature=0.7).logprob)
    rows = RolloutRows(
        packed.ids, packed.positions, packed.segments, packed.mask, logprob, logprob, zeros,
        zeros + 3.0, packed.wanted,
    )  # fmt: skip
    objective = Objective(decision_weight=2.0)
    found = policy_loss(model, rows, objective, temperature=0.7, levels=decisions.levels)
    scored = token_logprobs(model, packed.ids, temperature=0.7, choices=decisions.levels)
    at = one.decides[0, :2]
    apart = -float(jnp.sum(level_targets(wanted, 7) * scored.choices[0, at]))
    others = 3.0 * (packed.mask.sum() - 2)  # ratios are 1, so each loses its advantage
    assert float(found.total) == pytest.approx(2.0 * apart - others, rel=1e-4)
    assert float(found.metrics["decision_loss"]) == pytest.approx(2.0 * apart, rel=1e-4)

    def loss(advantage):
        moved = rows._replace(advantage=jnp.asarray(advantage))
        return policy_loss(model, moved, objective, temperature=0.7, levels=decisions.levels).total

    slope = jax.grad(loss)(rows.advantage)
    assert (np.asarray(slope)[0, at] == 0).all()


def test_a_broken_rule_costs_every_action_that_breaks_it():
    values = np.random.default_rng(3).normal(size=25)
    config = AdvantageConfig(violation=-0.8)
    # Hypoperfused and untreated breaks G1; every vasopressor may be started.
    low = decision(1, 0, tuple(values), meanbp=50.0, lactate=4.0)
    np.testing.assert_allclose(
        of_all_actions(low, config), values - 0.8 * (np.arange(25) == 0), rtol=1e-6
    )


def test_wanted_is_a_step_of_the_expected_advantage():
    """The gradient of the cross-entropy is that of the mean advantage over all 25 actions."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(2, 5))  # of the vasopressor; of the fluid, whatever goes with it
    advantage, action = rng.normal(size=25), schema.action_index(3, 1)
    decided = JudgedDecisions(*(np.array([x]) for x in (0, 1, 4, action)), advantage[None])
    logprobs = np.zeros((1, 6, 5))
    logprobs[0, [1, 4]] = np.asarray(jax.nn.log_softmax(logits))

    def mean_advantage(logits):
        first, second = jax.nn.softmax(logits)
        table = jnp.asarray(advantage).reshape(5, 5)
        return first @ table @ jax.lax.stop_gradient(second) + table[3] @ second

    slope = np.asarray(jax.grad(mean_advantage)(jnp.asarray(logits)))
    hot = 1e3
    wanted = decided.wanted(logprobs, hot)
    assert not wanted[0, [0, 2, 3, 5]].any()
    moved = wanted[0, [1, 4]] - np.exp(logprobs[0, [1, 4]])  # minus the gradient by the logits
    np.testing.assert_allclose(hot * moved, slope, atol=2e-3)
    cold = decided.wanted(logprobs, 1e-3)[0, 4]
    assert cold.argmax() == advantage.reshape(5, 5)[3].argmax() and cold.max() > 0.99


def test_with_a_lower_prior_weight_a_sure_model_is_held_back_less():
    """Repeated to the end, the target is softmax(advantage / ((1 - w) temperature))."""
    rng = np.random.default_rng(6)
    advantage, action, weight, temperature = rng.normal(size=25), 12, 0.75, 2.0
    decided = JudgedDecisions(*(np.array([x]) for x in (0, 1, 2, action)), advantage[None])
    probabilities = np.full((1, 3, 5), 1e-9)
    probabilities[..., 4] = 1.0 - 4e-9  # sure of the highest levels
    for _ in range(100):
        probabilities = np.where(
            decided.wanted(np.log(probabilities), temperature, weight).any(-1, keepdims=True),
            decided.wanted(np.log(probabilities), temperature, weight),
            0.2,
        )
    of_fluid = advantage.reshape(5, 5)[action // 5] / ((1 - weight) * temperature)
    np.testing.assert_allclose(probabilities[0, 2], np.asarray(jax.nn.softmax(of_fluid)), rtol=1e-4)
    regardless = decided.wanted(np.log(np.full((1, 3, 5), 0.2)), temperature, 0.0)
    other = decided.wanted(rng.normal(size=(1, 3, 5)), temperature, 0.0)
    np.testing.assert_allclose(regardless[0, 2], other[0, 2], rtol=1e-5)
    with pytest.raises(InputError, match="decision_prior_weight"):
        AgenticConfig(decision_prior_weight=1.5)


def test_sampled_replies_carry_wishes_too(tokens, decisions):
    stay = judged(stay_of(2, 2), np.random.default_rng(4))
    again, _ = replayed(stay, tokens)
    (read,) = as_read(again, decisions, judged_by_turn(again))
    (expected,) = written(stay, tokens, decisions)
    assert read.decides.tolist() == expected.decides.tolist()
    np.testing.assert_array_equal(read.judged, expected.judged)
