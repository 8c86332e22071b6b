"""One training loop for every stage: a loss, an optimiser and a model's trainable part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from policy.qwen3.model import Qwen3
from policy.train.losses import Summed
from worldmodel.configuration import require
from worldmodel.errors import InputError

Loss = Callable[[Qwen3, Any], Summed]
"""Of a model and a micro-batch."""


@dataclass(frozen=True)
class LearnerConfig:
    """How to learn.

    Attributes:
      steps: updates; the schedule ends with the last.
      learning_rate: peak of a linear warm-up and a cosine decay.
      warm_up: updates until the peak.
      final_share: of the peak, that remains at the end.
      weight_decay: decoupled, on matrices only.
      beta1, beta2: decay of Adam's moments.
      clip_norm: of the gradient over all parameters.
      accumulate: micro-batches per update; their tokens weigh alike, wherever they are.
      report_every: updates between two reports, and between two checks of the loss.
    """

    steps: int = 1000
    learning_rate: float = 1e-5
    warm_up: int = 20
    final_share: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    accumulate: int = 1
    report_every: int = 10

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda n: n >= 1, "steps", "accumulate", "report_every")
        require(self, "0 or more", lambda x: x >= 0, "learning_rate", "warm_up", "weight_decay")
        require(self, "above 0", lambda x: x > 0, "clip_norm")
        require(self, "within [0, 1]", lambda x: 0 <= x <= 1, "final_share")
        require(self, "within [0, 1)", lambda x: 0 <= x < 1, "beta1", "beta2")
        if self.warm_up > self.steps:
            raise InputError(f"warm_up: got {self.warm_up}, more than the {self.steps} steps")


class State(NamedTuple):
    """What learning changes."""

    params: nnx.State  # float32
    optimizer: optax.OptState
    step: jax.Array  # [] int32 updates made


@dataclass(frozen=True)
class Report:
    """Means since the report before."""

    step: int  # updates made
    loss: float  # per token
    tokens: float  # learned, per update
    tokens_per_s: float  # learned; the first report includes compilation
    gradient_norm: float  # before clipping
    learning_rate: float  # of the last update
    metrics: dict[str, float]  # of the loss


class Learner:
    """A model in training.

    Args:
      model: to start from; it stays as it is. Parameters that are trained are kept in float32
        (products are made in the model's `dtype`), others are shared and keep their type.
      loss: summed over a micro-batch; the gradient is that of the sum over all micro-batches of
        an update, divided by their summed weight.
      config: settings.
      trainable: which parameters, as a filter of NNX, such as `nnx.LoRAParam`.
    """

    def __init__(
        self, model: Qwen3, loss: Loss, config: LearnerConfig, *, trainable: Any = nnx.Param
    ):
        self.config = config
        self._schedule = schedule(config)
        self._optimizer = optimizer(config)
        parts: Any = nnx.split(model, trainable, ...)
        self._graphdef, params, self._frozen = parts
        # Copies, since an update gives away the memory of what it replaces.
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
        self.state = State(params, self._optimizer.init(params), jnp.int32(0))
        self._update = jax.jit(
            partial(_update, self._graphdef, loss, self._optimizer), donate_argnums=0
        )

    def update(self, batch: Any) -> tuple[Summed, jax.Array]:
        """One update.

        Args:
          batch: PyTree of leaves [accumulate, ...], one micro-batch each.

        Returns:
          The loss and its metrics summed over the batch, and the norm of the gradient; on the
          device, so that the next update need not wait.
        """
        self.state, summed, norm = self._update(self.state, self._frozen, batch)
        return summed, norm

    def run(
        self, batches: Iterable[Any], *, report: Callable[[Report], None] | None = None
    ) -> list[Report]:
        """Updates up to `config.steps`.

        Args:
          batches: micro-batches, `accumulate` of which make an update.
          report: called every `report_every` updates.

        Returns:
          All reports.

        Raises:
          InputError: the loss is not finite, or there are too few batches.
        """
        reports: list[Report] = []
        done = int(self.state.step)
        waiting: list[tuple[Summed, jax.Array]] = []
        began = time.perf_counter()
        for batch in islice(self._stacked(batches), self.config.steps - done):
            waiting.append(self.update(batch))
            done += 1
            if done % self.config.report_every == 0 or done == self.config.steps:
                found = self._report(jax.device_get(waiting), done, began)
                waiting, began = [], time.perf_counter()
                reports.append(found)
                if report is not None:
                    report(found)
        if done < self.config.steps:
            raise InputError(f"batches: ended after {done} of {self.config.steps} updates")
        return reports

    def model(self) -> Qwen3:
        """A copy of the model as it is now, trained parameters in float32."""
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), self.state.params)
        return nnx.merge(self._graphdef, params, self._frozen)

    def _stacked(self, batches: Iterable[Any]) -> Iterator[Any]:
        source = iter(batches)
        while len(group := list(islice(source, self.config.accumulate))) == self.config.accumulate:
            yield jax.tree.map(lambda *leaves: np.stack(leaves), *group)

    def _report(self, found: list[tuple[Summed, jax.Array]], step: int, began: float) -> Report:
        losses, norms = zip(*found, strict=True)
        tokens = float(sum(loss.weight for loss in losses))
        total = float(sum(loss.total for loss in losses))
        if not (math.isfinite(total) and np.isfinite(norms).all()):
            raise InputError(
                f"training: the loss or its gradient is not finite by update {step}; lower "
                "learning_rate or look for damaged data"
            )
        share = 1.0 / max(tokens, 1.0)
        return Report(
            step=step,
            loss=total * share,
            tokens=tokens / len(found),
            tokens_per_s=tokens / (time.perf_counter() - began),
            gradient_norm=float(np.mean(norms)),
            learning_rate=float(self._schedule(step - 1)),
            metrics={
                name: share * float(sum(loss.metrics[name] for loss in losses))
                for name in losses[0].metrics
            },
        )


def cast(model: Qwen3, dtype: Any) -> Qwen3:
    """A model with all parameters in another type, such as to save what was trained."""
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), params))


def schedule(config: LearnerConfig) -> optax.Schedule:
    """The learning rate by update."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warm_up else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warm_up,
        decay_steps=max(config.steps, config.warm_up + 1),
        end_value=config.final_share * config.learning_rate,
    )


def optimizer(config: LearnerConfig) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient."""
    matrices = partial(jax.tree.map_with_path, _is_matrix)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=matrices,
        ),
    )


def _is_matrix(path: Any, leaf: Any) -> bool:
    """Norms of stacked layers have two axes too, so names tell."""
    return "scale" not in jax.tree_util.keystr(path)


def _update(
    graphdef: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: State,
    frozen: Any,
    batch: Any,
) -> tuple[State, Summed, jax.Array]:
    def of_micro_batch(params: Any, micro: Any) -> tuple[jax.Array, Summed]:
        summed = loss(nnx.merge(graphdef, params, frozen), micro)
        return summed.total, summed

    def add(so_far: Any, micro: Any) -> tuple[Any, None]:
        gradient, summed = jax.grad(of_micro_batch, has_aux=True)(state.params, micro)
        return jax.tree.map(jnp.add, so_far, (gradient, summed)), None

    first = jax.tree.map(lambda leaf: leaf[0], batch)
    shapes = jax.eval_shape(jax.grad(of_micro_batch, has_aux=True), state.params, first)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (gradient, summed), _ = jax.lax.scan(add, nothing, batch)
    gradient = jax.tree.map(lambda g: g / jnp.maximum(summed.weight, 1.0), gradient)
    change, opt_state = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, change)
    norm = optax.tree.norm(gradient)
    return State(params, opt_state, state.step + 1), summed, norm
