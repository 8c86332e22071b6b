"""Losses of both models, and one training loop: ensembles, early stopping, exact resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from worldmodel import struct
from worldmodel.configuration import require
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import Saver
from worldmodel.models.clinical_model import OutcomeModel, Prediction, StateModel
from worldmodel.models.windows import Sequences, Target

ModelT = TypeVar("ModelT")  # a PyTree of parameters
TreeT = TypeVar("TreeT")
Params = Any  # a PyTree of parameters
DataT = TypeVar("DataT")  # a PyTree of stays
Loss = Callable[[Params, DataT, jax.Array, jax.Array | None], jax.Array]
Progress = Callable[[int, int, dict[str, float]], None]


# Model, best model, optimiser state, key, best loss, epochs since the best.
_MemberState = tuple[Params, Params, optax.OptState, jax.Array, jax.Array, jax.Array]


@dataclass(frozen=True)
class FitConfig:
    """Optimisation settings.

    Attributes:
      epochs: at most this many passes over the training windows.
      batch_size: windows per update.
      max_updates: updates per epoch at most, on windows drawn anew; None for a whole pass.
      learning_rate: peak of a warm-up and cosine schedule.
      weight_decay: decoupled, on matrices only.
      clip_norm: global norm of the gradient.
      patience: epochs without a better validation loss before a member stops.
    """

    epochs: int = 20
    batch_size: int = 512
    max_updates: int | None = None
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    patience: int = 4

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda count: count >= 1, "epochs", "batch_size", "patience")
        require(self, "at least 1", lambda count: count is None or count >= 1, "max_updates")
        require(self, "above 0", lambda value: value > 0, "learning_rate", "clip_norm")
        require(self, "0 or more", lambda value: value >= 0, "weight_decay")

    def updates(self, windows: int) -> tuple[int, int]:
        """Updates of an epoch over so many windows, and the windows of each."""
        batch = min(self.batch_size, windows)
        return min(windows // batch, self.max_updates or windows), batch


@struct.dataclass
class FitState:
    """The whole state of a training run; all leaves but `epoch` have a leading ensemble axis."""

    model: Params
    best: Params
    optimizer: optax.OptState
    key: jax.Array  # [E] typed keys
    best_loss: jax.Array  # [E]
    since_best: jax.Array  # [E] int32, epochs since the best one
    epoch: jax.Array  # [] int32, epochs done


def make_optimizer(config: FitConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up over half an epoch and cosine decay to 5%."""
    total = config.epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=max(min(steps_per_epoch // 2, total // 10), 1),
        decay_steps=max(total, 2),
        end_value=0.05 * config.learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            weight_decay=config.weight_decay,
            mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
        ),
    )


def fit(
    key: jax.Array,
    model: ModelT,
    loss: Loss[DataT],
    train: tuple[DataT, np.ndarray],
    validation: tuple[DataT, np.ndarray],
    config: FitConfig,
    *,
    saver: Saver | None = None,
    progress: Progress | None = None,
) -> tuple[ModelT, list[dict[str, float]]]:
    """Trains an ensemble and returns each member's best parameters.

    Args:
      key: consumed; orders the minibatches and drives dropout.
      model: PyTree with a leading ensemble axis on every leaf.
      loss: `loss(member, sequences, index [B, 2], key or None)`; no key means evaluation.
      train, validation: sequences and the (stay, step) rows [K, 2] to use.
      config: optimisation settings.
      saver: saves the whole state after every epoch and restores it, so that an interrupted
        run continues to the same result.
      progress: called after each epoch with (epochs done, epochs, metrics).

    Returns:
      The best model and one record of metrics per epoch.

    Raises:
      InputError: a split has no windows, or a loss is not finite.
    """
    for name, (_, index) in (("training", train), ("validation", validation)):
        if not len(index):
            raise InputError(f"the {name} split has no windows; use a larger cohort")
    updates, batch = config.updates(len(train[1]))
    optimizer = make_optimizer(config, updates)
    members = jax.tree.leaves(model)[0].shape[0]
    state = FitState(
        model=model,
        best=model,
        optimizer=jax.jit(jax.vmap(optimizer.init))(model),
        key=jax.random.split(key, members),
        best_loss=jnp.full(members, jnp.inf, jnp.float32),
        since_best=jnp.zeros(members, jnp.int32),
        epoch=jnp.int32(0),
    )
    history: list[dict[str, float]] = []
    if saver is not None:
        state, history = saver.restore(state)
    run_epoch = _jitted_epoch(loss, config, (updates, batch))
    train_data = (train[0], jnp.asarray(train[1]))
    validation_data = (validation[0], jnp.asarray(validation[1]))
    while int(state.epoch) < config.epochs and not _stopped(state, config):
        state, train_loss, validation_loss = run_epoch(state, train_data, validation_data)
        for name, value in (("training", train_loss), ("validation", validation_loss)):
            if not np.isfinite(np.asarray(value)).all():
                raise InputError(
                    f"{name} loss is not finite in epoch {int(state.epoch)}; lower the learning "
                    "rate or look for extreme values in the episodes"
                )
        record = {
            "epoch": int(state.epoch),
            "train_loss": float(train_loss.mean()),
            "validation_loss": float(validation_loss.mean()),
            "best_validation_loss": float(state.best_loss.mean()),
        }
        history.append(record)
        if saver is not None:
            saver.save(int(state.epoch), state, history)
        if progress is not None:
            progress(int(state.epoch), config.epochs, record)
    return state.best, history


def _stopped(state: FitState, config: FitConfig) -> bool:
    return bool((state.since_best >= config.patience).all())


@lru_cache(maxsize=8)
def _jitted_epoch(loss: Loss[DataT], config: FitConfig, shape: tuple[int, int]) -> Any:
    """`_epoch`, the same function for equal settings, so that it is compiled once."""
    optimizer = make_optimizer(config, shape[0])
    return jax.jit(
        partial(_epoch, loss=loss, optimizer=optimizer, shape=shape, patience=config.patience)
    )


def _epoch(
    state: FitState,
    train: tuple[DataT, jax.Array],
    validation: tuple[DataT, jax.Array],
    *,
    loss: Loss[DataT],
    optimizer: optax.GradientTransformation,
    shape: tuple[int, int],
    patience: int,
) -> tuple[FitState, jax.Array, jax.Array]:
    def member_epoch(carry: _MemberState) -> tuple[_MemberState, jax.Array, jax.Array]:
        model, best, opt_state, key, best_loss, since_best = carry
        key_next, key_order, key_dropout = jax.random.split(key, 3)
        new_model, new_opt, train_loss = _updates(
            model, opt_state, key_order, key_dropout, train, loss, optimizer, shape
        )
        validation_loss = mean_loss(new_model, loss, *validation, batch=4 * shape[1])
        running = since_best < patience  # a stopped member no longer changes
        better = running & (validation_loss < best_loss)

        def keep(new: TreeT, old: TreeT, when: jax.Array) -> TreeT:
            kept: TreeT = jax.tree.map(lambda a, b: jnp.where(when, a, b), new, old)
            return kept

        moved = (
            keep(new_model, model, running),
            keep(new_model, best, better),
            keep(new_opt, opt_state, running),
            key_next,
            jnp.where(better, validation_loss, best_loss),
            jnp.where(better, 0, since_best + 1),
        )
        return moved, train_loss, validation_loss

    carry = (
        state.model, state.best, state.optimizer, state.key, state.best_loss, state.since_best,
    )  # fmt: skip
    # Members are trained in turn: on a CPU, a batched product over members is slower.
    carry, train_loss, validation_loss = jax.lax.map(member_epoch, carry)
    model, best, opt, key, best_loss, since = carry
    state = FitState(model, best, opt, key, best_loss, since, state.epoch + 1)
    return state, train_loss, validation_loss


def _updates(
    model: ModelT,
    opt_state: optax.OptState,
    key_order: jax.Array,
    key_dropout: jax.Array,
    train: tuple[DataT, jax.Array],
    loss: Loss[DataT],
    optimizer: optax.GradientTransformation,
    shape: tuple[int, int],
) -> tuple[ModelT, optax.OptState, jax.Array]:
    """One epoch of one member: the model, the optimiser's state and the mean loss."""
    sequences, index = train
    order = jax.random.permutation(key_order, index.shape[0])[: shape[0] * shape[1]]

    def update(
        carry: tuple[ModelT, optax.OptState], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[ModelT, optax.OptState], jax.Array]:
        model, opt_state = carry
        rows, key = inputs
        value, gradient = jax.value_and_grad(loss)(model, sequences, index[rows], key)
        changes, opt_state = optimizer.update(gradient, opt_state, model)
        return (optax.apply_updates(model, changes), opt_state), value

    inputs = (order.reshape(shape), jax.random.split(key_dropout, shape[0]))
    (model, opt_state), values = jax.lax.scan(update, (model, opt_state), inputs)
    return model, opt_state, values.mean()


def mean_loss(
    model: Params, loss: Loss[DataT], sequences: DataT, index: Int[Array, "K 2"], *, batch: int
) -> jax.Array:
    """Evaluation loss, averaged over whole batches of `index` and its remainder."""
    count = index.shape[0]
    batch = min(batch, count)
    whole = count // batch
    values = jax.lax.map(
        lambda rows: loss(model, sequences, rows, None),
        index[: whole * batch].reshape(whole, batch, 2),
    )
    total = values.sum() * batch
    if count > whole * batch:
        rest = index[whole * batch :]
        total = total + loss(model, sequences, rest, None) * rest.shape[0]
    result: jax.Array = total / count
    return result


LOG_2PI = 1.8378770664093453


def gaussian_nll(
    target: Float[Array, "*#b"], mu: Float[Array, "*#b"], log_sigma: Float[Array, "*#b"]
) -> Float[Array, "*#b"]:
    """Negative log density, elementwise, in nats."""
    error = (target - mu) * jnp.exp(-log_sigma)
    return 0.5 * (jnp.square(error) + LOG_2PI) + log_sigma


def state_loss(
    prediction: Prediction, target: Target, *, imputed_weight: float, vent_weight: float
) -> Float[Array, ""]:
    """Gaussian NLL plus ventilation cross-entropy, mean over the batch.

    Args:
      prediction: of the State Model, [B, ...].
      target: what was recorded.
      imputed_weight: weight of entries that were not measured in the step; measured ones
        count 1. At 1 all entries have equal weight, as in the reference system.
      vent_weight: weight of the cross-entropy.
    """
    nll = gaussian_nll(target.obs, prediction.mu, prediction.log_sigma)
    weight = jnp.where(target.measured, 1.0, imputed_weight)
    cross_entropy = optax.sigmoid_binary_cross_entropy(
        prediction.vent_logit, target.ventilated.astype(jnp.float32)
    )
    total = jnp.maximum(weight.sum(), 1e-6)  # 0 where nothing counts
    result: jax.Array = (nll * weight).sum() / total + vent_weight * cross_entropy.mean()
    return result


def state_model_loss(
    model: StateModel,
    sequences: Sequences,
    index: Int[Array, "B 2"],
    key: jax.Array | None,
    *,
    window: int,
    imputed_weight: float,
    vent_weight: float,
) -> Float[Array, ""]:
    """`state_loss` of the transitions `index` [B, 2] (stay, step)."""
    return state_loss(
        model(*sequences.window(index, window), key=key),
        sequences.target(index),
        imputed_weight=imputed_weight,
        vent_weight=vent_weight,
    )


def outcome_model_loss(
    model: OutcomeModel,
    sequences: Sequences,
    index: Int[Array, "B 2"],
    key: jax.Array | None,
    *,
    window: int,
) -> Float[Array, ""]:
    """Cross-entropy of 90-day death at the rows `index` [B, 2] (stay, step)."""
    logit = model(*sequences.window(index, window), key=key)
    died = sequences.died_90d[index[:, 0]].astype(jnp.float32)
    result: jax.Array = optax.sigmoid_binary_cross_entropy(logit, died).mean()
    return result
