"""Sampled trajectories as packed rows, and the minibatch updates of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from scipy.special import softmax

from policy.agent.dialogue import Stay
from policy.agent.tools import DecisionTokens
from policy.qwen3.logprobs import token_logprobs
from policy.qwen3.model import Qwen3
from policy.train.data.packing import Dialogue, Judged, Place, as_read, lay_out, layout
from policy.train.loop.distributed import place_batch, place_state, whole
from policy.train.loop.learner import Learner, require_finite
from policy.train.losses import RolloutRows, mismatch
from worldmodel import schema
from worldmodel.resources import bucket


@dataclass(frozen=True)
class Trajectory:
    """A sampled conversation of T tokens."""

    dialogue: Dialogue
    sampler_logprobs: (
        np.ndarray
    )  # [T] float32 log-probability when sampled; 0 on tokens of the prompt
    advantage: np.ndarray  # [T] float32

    def __len__(self) -> int:
        return len(self.dialogue)


def decision_of_turns(stay: Stay) -> np.ndarray:
    """[turns] index of the decision that each turn belongs to; after the last, their number."""
    ends = [decision.turn for decision in stay.decisions]
    return np.searchsorted(ends, np.arange(len(stay.turns)))


def trajectories(
    stay: Stay,
    advantages: Sequence[float] | np.ndarray,
    decisions: DecisionTokens | None = None,
    judged: Mapping[int, Judged] | None = None,
) -> list[Trajectory]:
    """The conversations of a stay with the advantages of its decisions.

    Where all actions are judged at a decision, the tokens that do not decide need no advantage:
    those of accepted replies get 1, of refused ones 0. Their gradient is then that of the
    probability of a reply that is accepted, without the noise of what it led to.

    Args:
      stay: with ids and log-probabilities of its replies.
      advantages: [decisions], and one more for turns after the last decision.
      decisions, judged: as for `policy.train.data.packing.as_read`.

    Raises:
      InputError: a reply came without its ids.
    """
    of_turns = np.append(advantages, 0.0)[decision_of_turns(stay)]
    if decisions is not None:
        of_turns = np.array([0.0 if turn.refused else 1.0 for turn in stay.turns])
    turns = list(zip(stay.turns, of_turns.tolist(), strict=True))
    found = []
    for dialogue in as_read(stay, decisions, judged):
        sampler_logprobs = np.zeros(len(dialogue), np.float32)
        advantage = np.zeros(len(dialogue), np.float32)
        for end in dialogue.ends().tolist():
            turn, value = turns.pop(0)
            spoken = slice(end - len(turn.reply.token_ids or ()), end)
            sampler_logprobs[spoken] = turn.reply.logprobs
            advantage[spoken] = value
        found.append(Trajectory(dialogue, sampler_logprobs, advantage))
    return found


class JudgedDecisions(NamedTuple):
    """The M decisions of packed rows of which all actions are judged."""

    row: np.ndarray  # [M] int
    vasopressor: np.ndarray  # [M] int, column of the level
    fluid: np.ndarray  # [M] int, column of the level
    action: np.ndarray  # [M] int, joint action as written
    advantage: np.ndarray  # [M, 25] of all actions

    @classmethod
    def of(cls, members: Sequence[Trajectory], places: Sequence[Place]) -> JudgedDecisions:
        """From trajectories and where they lie."""
        row = np.repeat([p.row for p in places], [len(m.dialogue.decides) for m in members])
        at = np.concatenate(
            [
                member.dialogue.decides + np.array([place.start, place.start, 0], np.int32)
                for member, place in zip(members, places, strict=True)
            ]
        )
        advantage = np.concatenate([member.dialogue.judged for member in members])
        return cls(row, at[:, 0], at[:, 1], at[:, 2], advantage)

    def wanted(
        self,
        logprobs: Float[np.ndarray, "R L 5"],
        temperature: float,
        prior_weight: float = 1.0,
    ) -> Float[np.ndarray, "R L 5"]:
        """Wanted probabilities of the levels: present ** weight * exp(advantage / temperature).

        With a prior weight of 1 the cross-entropy to them has, to first order, the gradient of the
        expected advantage over all actions (mirror descent). Below 1 the present probabilities are
        flattened first (mirror descent with an entropy bonus: Vieillard et al. 2020, 2007.14430),
        so that a model that was sure of something else is not held back by it. The fluid that would
        go with another vasopressor is taken to be distributed as with the one that was written, the
        only one that the model was asked about.

        Args:
          logprobs: of the levels at present.
          temperature: in units of the advantage.
          prior_weight: within [0, 1].
        """
        size = schema.NUM_LEVELS
        advantage = self.advantage.reshape(-1, size, size) / temperature
        at = [prior_weight * logprobs[self.row, x] for x in (self.vasopressor, self.fluid)]
        of_fluid = softmax(at[1], axis=-1)
        written = schema.action_levels(self.action)[0]
        gains = (
            (advantage * of_fluid[:, None]).sum(-1),
            advantage[np.arange(len(advantage)), written],
        )
        found = np.zeros(logprobs.shape, np.float32)
        for column, present, gain in zip((self.vasopressor, self.fluid), at, gains, strict=True):
            found[self.row, column] = softmax(present + gain, axis=-1)
        return found


def pack_trajectories(
    members: Sequence[Trajectory], length: int, *, seed: int
) -> tuple[RolloutRows, JudgedDecisions]:
    """Rows [R, length]; until computed, `old_logprobs` is `sampler_logprobs`, `reference` zero.

    Args:
      members: of at most `length` tokens each.
      length, seed: as for `policy.train.data.packing.pack`.

    Raises:
      InputError: as `policy.train.data.packing.pack`.
    """
    places = layout([len(member) for member in members], length, seed=seed)
    laid = lay_out([member.dialogue for member in members], places, length)
    shape = laid.mask.shape
    sampler_logprobs, reference, advantage = (np.zeros(shape, np.float32) for _ in range(3))
    for member, place in zip(members, places, strict=True):
        here = (place.row, slice(place.start, place.start + len(member)))
        sampler_logprobs[here], advantage[here] = member.sampler_logprobs, member.advantage
    rows = RolloutRows(
        laid.ids, laid.positions, laid.segments, laid.mask, sampler_logprobs,
        sampler_logprobs.copy(), reference, advantage,
    )  # fmt: skip
    return rows, JudgedDecisions.of(members, places)


class MinibatchUpdate:
    """Updates the weights on one batch of trajectories after the other.

    Args:
      learner: its loss is `policy.train.losses.policy_loss`.
      num_minibatches: parts of a batch; one update each, at most one per row.
      row_length: tokens per row; no trajectory may be longer.
      micro_batch_size: rows per micro-batch.
      temperature: of the sampler.
      reference: model of the KL term; None where beta is 0.
      decisions: of the model's tokens, if decisions are learned from all actions.
      decision_temperature, decision_prior_weight: as for `JudgedDecisions.wanted`.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        num_minibatches: int,
        row_length: int,
        micro_batch_size: int,
        temperature: float,
        reference: Qwen3 | None = None,
        decisions: DecisionTokens | None = None,
        decision_temperature: float = 1.0,
        decision_prior_weight: float = 1.0,
    ):
        self._levels = () if decisions is None else decisions.levels
        self._target = (decision_temperature, decision_prior_weight)
        self._learner, self._num_minibatches = learner, num_minibatches
        self._reference = reference
        if reference is not None and learner.mesh is not None:
            graphdef, state = nnx.split(reference)
            self._reference = nnx.merge(graphdef, place_state(state, learner.mesh))
        self._row_length, self._micro_batch_size = row_length, micro_batch_size
        self._temperature = temperature

    def learn(self, members: Sequence[Trajectory], *, seed: int) -> dict[str, float]:
        """Updates the learner; log-probabilities of the batch are those before the first update.

        Args:
          members: the batch, at least one.
          seed: of the order of trajectories and rows.

        Returns:
          Figures by name: the loss and its metrics as means over the batch, `mismatch_*` between
          sampler and trainer, and numbers of tokens.

        Raises:
          InputError: the loss or a log-probability is not finite.
        """
        learner = self._learner
        rows, judged = pack_trajectories(members, self._row_length, seed=seed)
        old, choices = self._logprobs_of(learner.present(), rows, self._levels)
        rows = rows._replace(old_logprobs=old)
        if choices is not None:
            rows = rows._replace(wanted=judged.wanted(choices, *self._target))
        if self._reference is not None:
            rows = rows._replace(reference=self._logprobs_of(self._reference, rows, ())[0])
        figures = {
            f"mismatch_{name}": value
            for name, value in mismatch(rows.sampler_logprobs, rows.old_logprobs, rows.mask).items()
        }
        found = []
        for part in _parts(rows, self._num_minibatches, seed=seed):
            summed, norm = jax.device_get(
                learner.update(_micro_batches(part, self._micro_batch_size))
            )
            require_finite(learner.step, summed, norm)
            found.append((summed, norm))
        tokens = sum(float(summed.weight) for summed, _ in found)
        figures |= {
            name: sum(float(summed.metrics[name]) for summed, _ in found) / tokens
            for name in found[0][0].metrics
        }
        return figures | {
            "loss": sum(float(summed.total) for summed, _ in found) / tokens,
            "grad_norm": float(np.mean([norm for _, norm in found])),
            "learned_tokens": float(rows.mask.sum()),
            "read_tokens": float(np.count_nonzero(rows.segments)),
        }

    def _logprobs_of(
        self, model: Qwen3, rows: RolloutRows, levels: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """[R, L] of the model's tokens, [R, L, 5] of the levels in their places, if any are given.

        Rows are split over the learner's mesh like those of an update.
        """
        graphdef, state = nnx.split(model)
        batches = _micro_batches(rows, self._micro_batch_size)
        read = (batches.ids, batches.positions, batches.segments, batches.mask)
        settings = (self._temperature, levels)
        mesh, found = self._learner.mesh, []
        for i in range(len(batches.ids)):
            part = tuple(leaf[i] for leaf in read)
            if mesh is not None:
                part = tuple(leaf[0] for leaf in place_batch(tuple(x[None] for x in part), mesh))
            with self._learner.on_mesh():
                found.append(whole(_logprobs(graphdef, state, *part, *settings)))
        logprobs, choices = jax.tree.map(
            lambda *leaves: np.concatenate(leaves)[: len(rows.ids)], *found
        )
        return logprobs, choices


@partial(jax.jit, static_argnums=(0, 6, 7))
def _logprobs(
    graphdef: nnx.GraphDef[Qwen3],
    state: object,
    ids: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    mask: jax.Array,
    temperature: float,
    levels: tuple[int, ...],
) -> tuple[jax.Array, jax.Array | None]:
    model = nnx.merge(graphdef, state)
    found = token_logprobs(
        model, ids, positions=positions, segments=segments, wanted=mask,
        temperature=temperature, choices=levels,
    )  # fmt: skip
    return found.logprob, found.choices


def _parts(rows: RolloutRows, count: int, *, seed: int) -> list[RolloutRows]:
    """At most `count` parts of about equally many rows, in an order drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(rows.ids))
    parts = np.array_split(order, min(count, len(order)))
    return [jax.tree.map(itemgetter(part), rows) for part in parts]


def _micro_batches(rows: RolloutRows, size: int) -> RolloutRows:
    """[A, size, L], filled up with empty rows; A is one of few numbers, so are the programs."""
    count = bucket(-(-len(rows.ids) // size), digits=3) * size

    def batched(leaf: np.ndarray) -> np.ndarray:
        pad = [(0, count - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)]
        return np.pad(leaf, pad).reshape(-1, size, *leaf.shape[1:])

    result: RolloutRows = jax.tree.map(batched, rows)
    return result
