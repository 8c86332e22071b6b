"""The whole loop with a tiny model in this process: exact resume, staleness, what stops it."""

import asyncio
import gc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from policy.agent.dialogue import DialogueConfig
from policy.agent.tools import DecisionTokens
from policy.qwen3.config import load_stop_ids
from policy.qwen3.weights import load
from policy.serving.backend import BackendError, Lockstep, Sampling
from policy.serving.embedded import EmbeddedGenerator
from policy.serving.tokens import ChatTokens, TokenBackend
from policy.simple import GuidelineRules
from policy.testing.taught_qwen3 import tiny_runner
from policy.train.data.packing import judged_by_turn
from policy.train.loop.checkpoints import Checkpoints
from policy.train.loop.learner import Learner
from policy.train.loop.optimizer import LearnerConfig
from policy.train.losses import Objective
from policy.train.rl.advantages import AdvantageConfig
from policy.train.rl.counterfactual import counterfactual
from policy.train.rl.minibatch_update import trajectories
from policy.train.rl.publishers import EmbeddedPublisher
from policy.train.rl.trainer import AgenticConfig, AgenticTrainer, agentic_loss
from tests.policy.train.conftest import stay_of
from tests.policy.train.test_decisions import judged
from tests.policy.train.test_packing import replayed
from worldmodel.errors import InputError

PATIENTS, DECISIONS, ROWS = 4, 2, 4


@pytest.fixture(scope="module")
def runner():
    tiny = tiny_runner(max_steps=DECISIONS)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_completion_length=64)
    dialogue = DialogueConfig(memory="decision", max_invalid=1, sampling=sampling)
    return replace(tiny, dialogue=dialogue, concurrency=PATIENTS)


class StoppedError(Exception):
    """In the middle of an iteration."""


class Loop:
    """A trainer with all it needs, begun anew."""

    def __init__(self, runner, folder, *, kind="counterfactual", reference=False, **settings):
        model = load(folder)
        lockstep = Lockstep()
        self.generator = EmbeddedGenerator(
            model, stop_ids=load_stop_ids(folder), min_batch=ROWS, max_batch=ROWS, lockstep=lockstep
        )
        num_generations = 1 if kind == "counterfactual" else 2
        tokens = ChatTokens.load(folder)
        decisions = DecisionTokens.of(tokens) if "decision_loss" in settings else None
        objective = Objective(beta=0.1) if reference else Objective()
        config = AgenticConfig(
            patients=PATIENTS // num_generations, num_generations=num_generations,
            num_minibatches=2, row_length=1024, micro_batch_size=ROWS,
            advantages=AdvantageConfig(kind=kind), objective=objective, **settings,
        )  # fmt: skip
        learner = Learner(
            model,
            agentic_loss(config, 1.0, decisions),
            LearnerConfig(max_steps=20, warmup_steps=0, learning_rate=1e-3),
        )
        state_scorer = counterfactual(runner.env, GuidelineRules(), samples=1)
        self.trainer = AgenticTrainer(
            learner, runner, TokenBackend(self.generator, tokens),
            EmbeddedPublisher(self.generator), config, reference=model if reference else None,
            state_scorer=state_scorer if kind == "counterfactual" else None, lockstep=lockstep,
            decisions=decisions,
        )  # fmt: skip
        self.reports = []
        self.copies = []  # of the embeddings in memory at each report

    def run(self, checkpoints=None, until=None):
        async def report(number, figures, stays):
            gc.collect()
            table = self.trainer.learner.state.params["embed_tokens"]["embedding"][...].shape
            self.copies.append(sum(leaf.shape == table for leaf in jax.live_arrays()))
            versions = {turn.reply.weight_version for stay in stays for turn in stay.turns}
            said = [turn.reply.token_ids for stay in stays for turn in stay.turns]
            self.reports.append((number, figures, versions, said))
            if number == until:
                raise StoppedError

        async def go():
            try:
                await self.trainer.run(report, checkpoints=checkpoints)
            finally:
                await self.generator.close()

        asyncio.run(go())
        return self


def equal(one, other):
    """Whether parameters and moments are the same to the last bit."""
    leaves = [jax.tree.leaves(loop.trainer.learner.state) for loop in (one, other)]
    return all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_resumed_run_ends_where_an_unbroken_one_does(runner, taught, tmp_path, staleness):
    folder, _ = taught
    settings = {"iterations": 4, "staleness": staleness}
    whole = Loop(runner, folder, **settings).run()
    stopped = Loop(runner, folder, **settings)
    with pytest.raises(StoppedError):
        stopped.run(Checkpoints(tmp_path / "run"), until=3)
    again = Loop(runner, folder, **settings)
    assert again.trainer.resume(Checkpoints(tmp_path / "run"))
    assert again.trainer.iteration == 2  # the third was not saved
    again.run(Checkpoints(tmp_path / "run"))
    assert equal(whole, again)
    assert [report[0] for report in again.reports] == [3, 4]
    for one, other in zip(whole.reports[2:], again.reports, strict=True):
        assert one[1:] == other[1:]

    for number, figures, versions, _ in whole.reports:
        assert versions == {str(max(number - 1 - staleness, 0))}
        assert figures["staleness"] == min(number - 1, staleness)
        if not figures["staleness"]:
            assert figures["mismatch_max"] < 1e-4
    assert not equal(whole, Loop(runner, folder, **settings))  # something was learned


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_published_weights_are_kept_once_per_version_that_samples(runner, taught, staleness):
    folder, _ = taught
    table = load(folder).embed_tokens.embedding[...].shape
    gc.collect()
    before = sum(leaf.shape == table for leaf in jax.live_arrays())
    loop = Loop(runner, folder, iterations=5, staleness=staleness).run()
    own = 3  # parameters and two moments
    kept = [count - before - own for count in loop.copies[1:-1]]
    # A generator that has finished before the learner needs fewer at the end.
    assert max(kept) == kept[0] == max(staleness, 1) and min(kept) >= 1


@pytest.mark.parametrize("kind", ["episode", "step"])
def test_advantages_of_groups_and_a_reference(runner, taught, kind):
    folder, _ = taught
    loop = Loop(runner, folder, kind=kind, reference=True, iterations=2).run()
    for _, figures, _, said in loop.reports:
        assert "kl" in figures or figures["uninformative_stays"] == PATIENTS
        assert len(set(said)) > PATIENTS // 2  # stays of a patient speak differently
    moved = jax.tree.leaves(nnx.state(loop.trainer.learner.model()))
    assert all(np.isfinite(leaf).all() for leaf in moved)


def test_decisions_are_learned_from_all_actions(runner, taught):
    """Where one action is far better than all others, it becomes the likeliest."""
    folder, _ = taught
    best = 7
    loop = Loop(runner, folder, decision_loss="all", iterations=6)
    loop.trainer._state_scorer = lambda states: jnp.tile(
        5.0 * (jnp.arange(25) == best), (len(states.taken), 1)
    )
    loop.run()
    figures = [report[1] for report in loop.reports]
    assert all(np.isfinite(one["decision_loss"]) and one["decision_loss"] > 0 for one in figures)
    assert figures[-1]["counterfactual_gain"] > figures[0]["counterfactual_gain"] + 0.5


def test_accepted_replies_have_an_advantage_of_one_beside_wanted_decisions(taught):
    tokens = ChatTokens.load(taught[0])
    stay, _ = replayed(judged(stay_of(2, 2), np.random.default_rng(4)), tokens)
    stay.turns[2] = replace(stay.turns[2], refused=True)
    decisions = DecisionTokens.of(tokens)
    (plain,) = trajectories(stay, [3.0, -2.0])
    (found,) = trajectories(stay, [3.0, -2.0], decisions, judged_by_turn(stay))
    assert {*plain.advantage[plain.dialogue.own].tolist()} == {3.0, -2.0}
    ends = found.dialogue.ends()
    assert found.advantage[ends - 1].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert len(found.dialogue.decides) == 2 and not len(plain.dialogue.decides)


def test_a_lost_server_stops_the_run_and_the_last_checkpoint_is_good(runner, taught, tmp_path):
    folder, _ = taught
    loop = Loop(runner, folder, iterations=4)
    generate, calls = loop.generator.generate, []

    async def breaks(*arguments, **settings):
        calls.append(1)
        if len(loop.reports) >= 2:
            raise BackendError("connection refused")
        return await generate(*arguments, **settings)

    loop.generator.generate = breaks
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(InputError, match=r"iteration 3: .* 4 of 4 stays .connection refused"):
        loop.run(checkpoints)
    assert checkpoints.latest() == 2
    again = Loop(runner, folder, iterations=4)
    assert again.trainer.resume(Checkpoints(tmp_path / "run"))
    assert equal(Loop(runner, folder, iterations=4).run(), again.run())


def test_what_does_not_fit_is_refused(runner, taught):
    folder, _ = taught
    with pytest.raises(InputError, match="at least 2"):
        AgenticConfig(advantages=AdvantageConfig(kind="episode"), num_generations=1)
    with pytest.raises(InputError, match="of the drawn actions alone"):
        AgenticConfig(
            advantages=AdvantageConfig(kind="step"), num_generations=2, decision_loss="all"
        )
    nucleus = DialogueConfig(sampling=Sampling(top_p=0.9))
    with pytest.raises(InputError, match="top_p 1"):
        Loop(replace(runner, dialogue=nucleus), folder)
