"""Settings and training loop of every stage: a loss, an optimizer, trainable parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from policy.qwen3.model import Qwen3
from policy.qwen3.sharding import shardings
from policy.train.loop.checkpoints import Checkpoints
from policy.train.loop.distributed import place_batch, place_state
from policy.train.loop.metrics import Report, tokens_read
from policy.train.loop.optimizer import (
    LearnerConfig,
    Loss,
    Params,
    State,
    initial_state,
    schedule,
    update,
)
from policy.train.losses import Summed
from worldmodel.errors import InputError


class Learner:
    """A model in training.

    Args:
      model: to start from; it is not changed. Trained parameters are kept in the configured types
        (products are computed in the model's `dtype`), others are shared and keep their type.
      loss: summed over a micro-batch; the gradient is that of the sum over all micro-batches of
        an update, divided by their summed weight.
      config: settings.
      trainable: which parameters, as a filter of NNX, such as `nnx.LoRAParam`.
      mesh: of `policy.qwen3.sharding.make_mesh`; parameters, moments and batches are split over
        it. With several processes each gives the same model and the same batches.

    Attributes:
      mesh: likewise.
      frozen: parameters that are not trained.
    """

    def __init__(
        self,
        model: Qwen3,
        loss: Loss,
        config: LearnerConfig,
        *,
        trainable: nnx.filterlib.Filter = nnx.Param,
        mesh: Mesh | None = None,
    ):
        self.config = config
        self.mesh = mesh
        self._schedule = schedule(config)
        # flax's split has no exact type for a variable number of filters
        parts: Any = nnx.split(model, trainable, ...)
        self._graphdef, params, self.frozen = parts
        make: Callable[[Any], State] = partial(initial_state, config=config)
        if mesh is None:
            self._update = _jitted_update(self._graphdef, loss, config)
        else:
            params, self.frozen = place_state((params, self.frozen), mesh)
            places = shardings(jax.eval_shape(make, params), mesh)
            make = jax.jit(make, out_shardings=places)
            everywhere = NamedSharding(mesh, PartitionSpec())
            self._update = jax.jit(
                partial(update, self._graphdef, loss, config),
                donate_argnums=0,
                out_shardings=(places, everywhere, everywhere),
            )
        # Copies, since an update gives away the memory of what it replaces.
        self.state = make(params)

    @property
    def step(self) -> int:
        """Updates made."""
        return int(self.state.step)

    @property
    def consumed(self) -> int:
        """Micro-batches that `run` has taken, at which the data of a resumed run begin."""
        return self.step * self.config.gradient_accumulation_steps

    def update(self, batch: object) -> tuple[Summed, jax.Array]:
        """One update.

        Args:
          batch: PyTree of leaves [gradient_accumulation_steps, ...], one micro-batch each; with a
            mesh, of [gradient_accumulation_steps, rows, ...].

        Returns:
          The loss and its metrics summed over the batch, and the norm of the gradient; on the
          device, so that the next update need not wait.

        Raises:
          InputError: the rows do not divide over the mesh.
        """
        if self.mesh is not None:
            batch = place_batch(batch, self.mesh)
        with self.on_mesh():
            self.state, summed, norm = self._update(self.state, self.frozen, batch)
        return summed, norm

    def resume(self, checkpoints: Checkpoints) -> dict[str, object] | None:
        """Takes the state of the newest checkpoint.

        Returns:
          What else was saved with it; None, and all stays as it is, if there is no checkpoint.

        Raises:
          InputError: as `Checkpoints.restore`.
        """
        if checkpoints.latest() is None:
            return None
        self.state, extra, _ = checkpoints.restore(self.state)
        return extra

    def run(
        self,
        batches: Iterable[object],
        *,
        report: Callable[[Report], None] | None = None,
        checkpoints: Checkpoints | None = None,
        extra: Callable[[], Mapping[str, object]] = dict,
    ) -> list[Report]:
        """Updates up to `config.max_steps`.

        Args:
          batches: micro-batches, `gradient_accumulation_steps` per update; a resumed run is given
            those after the first `consumed`.
          report: called every `logging_steps` updates, and before a checkpoint is written.
          checkpoints: written every `save_steps` updates and at the end.
          extra: JSON to save with a checkpoint.

        Returns:
          All reports.

        Raises:
          InputError: the loss is not finite (the last checkpoint is from before), there are too
            few batches, or a checkpoint cannot be written.
        """
        config = self.config
        reports: list[Report] = []
        done = self.step
        waiting: list[tuple[Summed, jax.Array]] = []
        read = 0
        began = time.perf_counter()
        for batch in islice(self._stacked(batches), config.max_steps - done):
            waiting.append(self.update(batch))
            read += tokens_read(batch)
            done += 1
            if done % config.logging_steps == 0 or done == config.max_steps:
                found = self._report(jax.device_get(waiting), read, done, began)
                reports.append(found)
                if report is not None:
                    report(found)
                due = done == config.max_steps or (
                    config.save_steps and done % config.save_steps == 0
                )
                if checkpoints is not None and due:
                    checkpoints.save(done, self.state, extra())
                waiting, read, began = [], 0, time.perf_counter()
        if done < config.max_steps:
            raise InputError(f"batches: ended after {done} of {config.max_steps} updates")
        return reports

    def model(self) -> Qwen3:
        """A copy of the model as it is now, trained parameters in the types they are kept in."""
        return self.with_params(self.params_as(None))

    def present(self) -> Qwen3:
        """The model as it is now, without a copy; the next update gives its arrays away."""
        return self.with_params(self.state.params)

    def params_as(self, dtype: DTypeLike | None) -> Params:
        """A copy of the trained parameters in a type; in their own if not given."""
        copied: Params = jax.tree.map(
            lambda x: jnp.array(x, dtype or x.dtype, copy=True), self.state.params
        )
        return copied

    def params_like(self, dtype: DTypeLike) -> Params:
        """Shapes and places of `params_as`."""
        shapes: Params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), self.state.params
        )
        return shapes

    def with_params(self, params: Params, frozen: object = None) -> Qwen3:
        """The model with other trained parameters; those that are not trained are shared.

        Args:
          params: as of `params_as`.
          frozen: as `self.frozen`, elsewhere.
        """
        result: Qwen3 = nnx.merge(self._graphdef, params, self.frozen if frozen is None else frozen)
        return result

    def on_mesh(self) -> AbstractContextManager[object]:
        """Within it, programs lay their arrays along the mesh, if there is one."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _stacked(self, batches: Iterable[object]) -> Iterator[object]:
        source = iter(batches)
        while (
            len(group := list(islice(source, self.config.gradient_accumulation_steps)))
            == self.config.gradient_accumulation_steps
        ):
            yield jax.tree.map(lambda *leaves: np.stack(leaves), *group)

    def _report(
        self, found: list[tuple[Summed, jax.Array]], read: int, step: int, began: float
    ) -> Report:
        for number, (loss, norm) in enumerate(found, step - len(found) + 1):
            require_finite(number, loss, norm)
        losses, norms = zip(*found, strict=True)
        weight = float(sum(loss.weight for loss in losses))
        tokens = float(sum(loss.weight if loss.tokens is None else loss.tokens for loss in losses))
        share = 1.0 / max(weight, 1.0)
        seconds = time.perf_counter() - began
        return Report(
            step=step,
            loss=share * float(sum(loss.total for loss in losses)),
            tokens=tokens / len(found),
            tokens_read=read / len(found),
            tokens_per_s=tokens / seconds,
            seconds=seconds / len(found),
            grad_norm=float(np.mean(norms)),
            learning_rate=float(self._schedule(step - 1)),
            metrics={
                name: share * float(sum(loss.metrics[name] for loss in losses))
                for name in losses[0].metrics
            },
        )


def require_finite(step: int, loss: Summed, norm: jax.Array | float) -> None:
    """Makes sure that an update did not destroy the parameters.

    Args:
      step: of the update, counted from 1, for the message.
      loss, norm: as `Learner.update` returned them.

    Raises:
      InputError: the loss or the norm of its gradient is not finite.
    """
    if not (np.isfinite(loss.total) and np.isfinite(norm)):
        raise InputError(
            f"training: the loss or its gradient is not finite in update {step}; lower "
            "learning_rate or look for damaged data"
        )


def cast(model: Qwen3, dtype: DTypeLike) -> Qwen3:
    """A model with all parameters in another type, such as to save what was trained."""
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), params))


@lru_cache(maxsize=8)
def _jitted_update(graphdef: nnx.GraphDef[Qwen3], loss: Loss, config: LearnerConfig) -> Any:
    """`update`, the same function for learners of equal settings, so that it is compiled once."""
    return jax.jit(partial(update, graphdef, loss, config), donate_argnums=0)
