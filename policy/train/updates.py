"""What a batch of sampled dialogues teaches: a few updates, each on another part of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from policy.qwen3.logprobs import token_logprobs
from policy.qwen3.model import Qwen3
from policy.train.learner import Learner, require_finite
from policy.train.objectives import RolloutRows
from policy.train.ratios import mismatch
from policy.train.trajectories import Trajectory, pack_trajectories


class Updates:
    """Learns from one batch after the other.

    Args:
      learner: its loss is `objectives.policy_loss`.
      count: updates per batch, at most one per row.
      row_length: tokens per row; no trajectory may be longer.
      rows: per micro-batch.
      temperature: at which the batches are sampled.
      reference: model that the objective's divergence is from; none where its weight is 0.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        count: int,
        row_length: int,
        rows: int,
        temperature: float,
        reference: Qwen3 | None = None,
    ):
        self._learner, self._count, self._reference = learner, count, reference
        self._row_length, self._rows = row_length, rows
        self._logprobs = jax.jit(partial(_logprobs, temperature=temperature), static_argnums=0)

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
        rows = pack_trajectories(members, self._row_length, seed=seed)
        rows = rows._replace(proximal=self._logprobs_of(learner.model(), rows))
        if self._reference is not None:
            rows = rows._replace(reference=self._logprobs_of(self._reference, rows))
        figures = {
            f"mismatch_{name}": value
            for name, value in mismatch(rows.behavior, rows.proximal, rows.mask).items()
        }
        found = []
        for part in _parts(rows, self._count, seed=seed):
            summed, norm = jax.device_get(learner.update(_micro_batches(part, self._rows)))
            require_finite(learner.step, summed, norm)
            found.append((summed, norm))
        tokens = sum(float(summed.weight) for summed, _ in found)
        figures |= {
            name: sum(float(summed.metrics[name]) for summed, _ in found) / tokens
            for name in found[0][0].metrics
        }
        return figures | {
            "loss": sum(float(summed.total) for summed, _ in found) / tokens,
            "gradient_norm": float(np.mean([norm for _, norm in found])),
            "learned_tokens": float(rows.mask.sum()),
            "read_tokens": float(np.count_nonzero(rows.segments)),
        }

    def _logprobs_of(self, model: Qwen3, rows: RolloutRows) -> np.ndarray:
        graphdef, state = nnx.split(model)
        batches = _micro_batches(rows, self._rows)
        found = [
            np.asarray(self._logprobs(graphdef, state, *(leaf[i] for leaf in batches[:3])))
            for i in range(len(batches.ids))
        ]
        return np.concatenate(found)[: len(rows.ids)]


def _logprobs(
    graphdef: Any,
    state: Any,
    ids: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    *,
    temperature: float,
) -> jax.Array:
    model = nnx.merge(graphdef, state)
    return token_logprobs(
        model, ids, positions=positions, segments=segments, temperature=temperature
    ).logprob


def _parts(rows: RolloutRows, count: int, *, seed: int) -> list[RolloutRows]:
    """At most `count` parts of about equally many rows, in an order drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(rows.ids))
    parts = np.array_split(order, min(count, len(order)))
    return [RolloutRows(*(leaf[part] for leaf in rows)) for part in parts]


def _micro_batches(rows: RolloutRows, size: int) -> RolloutRows:
    """[A, size, L], filled up with empty rows; A is one of few numbers, so are the programs."""
    count = _rounded(-(-len(rows.ids) // size)) * size
    return RolloutRows(
        *(
            np.pad(leaf, ((0, count - len(leaf)), (0, 0))).reshape(-1, size, leaf.shape[1])
            for leaf in rows
        )
    )


def _rounded(count: int) -> int:
    """Up to three leading binary digits: 1 to 8, 10, 12, 14, 16, 20, ..."""
    unit = 1 << max(count.bit_length() - 3, 0)
    return -(-count // unit) * unit
