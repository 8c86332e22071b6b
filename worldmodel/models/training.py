"""Training a world model on episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.episodes import Episodes
from worldmodel.files import digest
from worldmodel.models import evaluation
from worldmodel.models.checkpoint import Saver
from worldmodel.models.clinical_model import LOG_SIGMA_RANGE, ModelConfig, StateModel
from worldmodel.models.evaluation import Rows, evaluate_world_model, predict_members
from worldmodel.models.fitting import (
    FitConfig,
    Loss,
    ModelT,
    fit,
    outcome_model_loss,
    state_model_loss,
)
from worldmodel.models.recurrent_training import (
    StayRows,
    calibrate_noise,
    fill_values,
    recurrent_loss,
    to_stay_rows,
)
from worldmodel.models.windows import (
    Sequences,
    every_step_index,
    last_step_index,
    require_transitions,
    to_sequences,
    transition_index,
)
from worldmodel.models.world_model import WorldModel, init_world_model
from worldmodel.scaling import Scaler

EpochProgress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainConfig:
    """How to train a world model.

    Attributes:
      model: shape and variant.
      state, outcome: optimisation of the two models that read windows.
      stays: optimisation of the recurrent variant, both models at once; batches are stays.
      members: ensemble size.
      seed: of initialisation, minibatch order and dropout.
      imputed_weight: weight of imputed entries in the State Model's loss. None: 1 for the
        reference variant (all entries have equal weight), 0.1 for the residual variant.
      vent_weight: weight of the ventilation loss.
      outcome_prefixes: train the Outcome Model on every row instead of last rows only, so
        that it can be evaluated in mid-trajectory. None: only for the residual variant.
      history_weights: weigh the recurrent variant's outcomes by the history of treatments, so that
        past doses are no sign of how sick a patient was; off to see what it does.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    state: FitConfig = field(default_factory=FitConfig)
    outcome: FitConfig = field(default_factory=lambda: FitConfig(epochs=10, learning_rate=1e-3))
    stays: FitConfig = field(
        default_factory=lambda: FitConfig(
            epochs=12, batch_size=64, learning_rate=2e-3, weight_decay=0.1
        )
    )
    members: int = 1
    seed: int = 0
    imputed_weight: float | None = None
    vent_weight: float = 0.3
    outcome_prefixes: bool | None = None
    history_weights: bool = True

    def __post_init__(self) -> None:
        require(self, "1 to 1000", lambda count: 1 <= count <= 1000, "members")
        require(self, "0 or more", lambda weight: weight is None or weight >= 0, "imputed_weight")
        require(self, "0 or more", lambda weight: weight >= 0, "vent_weight")

    @property
    def resolved_imputed_weight(self) -> float:
        """Weight of imputed entries: as given, or the default of the variant."""
        if self.imputed_weight is not None:
            return self.imputed_weight
        return 1.0 if self.model.variant == "reference" else 0.1

    @property
    def resolved_prefixes(self) -> bool:
        """Whether the Outcome Model is trained on all rows: as given, or by variant."""
        if self.outcome_prefixes is not None:
            return self.outcome_prefixes
        return self.model.variant != "reference"


class Trained(NamedTuple):
    """A trained world model, its training history and its test metrics."""

    world_model: WorldModel
    metrics: dict[str, Any]  # nested numbers by name, as JSON holds them
    history: dict[str, list[dict[str, float]]]


def train_world_model(
    episodes: Episodes,
    scaler: Scaler,
    config: TrainConfig | None = None,
    *,
    step_hours: float = schema.STEP_HOURS,
    dose_edges: schema.DoseEdges = schema.DEFAULT_DOSE_EDGES,
    state_folder: str | Path | None = None,
    progress: EpochProgress | None = None,
) -> Trained:
    """Trains the State Model and the Outcome Model and evaluates them on the test split.

    Args:
      episodes: with training, validation and test stays.
      scaler: fitted on the training split.
      config: settings.
      step_hours, dose_edges: of the episodes; kept with the model.
      state_folder: where to keep the state after every epoch; the same call again continues
        from there to the same result.
      progress: called after each epoch with (model name, epoch, epochs, metrics).

    Returns:
      The world model with each member's best parameters, metrics beside two baselines, and
      the losses per epoch.

    Raises:
      InputError: a split is too small, or `state_folder` belongs to another run.
    """
    config = config or TrainConfig()
    key_init, key_state, key_outcome = jax.random.split(jax.random.key(config.seed), 3)
    world_model = init_world_model(
        key_init,
        scaler,
        config.model,
        members=config.members,
        step_hours=step_hours,
        dose_edges=dose_edges,
        stay_steps=episodes.num_steps,
    )
    parts = {name: episodes.of_split(name) for name in schema.SPLITS}
    transitions = {
        name: require_transitions(transition_index(part), name) for name, part in parts.items()
    }
    fingerprint = {"config": asdict(config), "data": digest(jax.tree.leaves((episodes, scaler)))}
    if world_model.is_recurrent:
        world_model, history = _fit_stays(
            key_state, world_model, parts, config, state_folder, fingerprint, progress
        )
        return Trained(world_model, evaluate_world_model(world_model, episodes), history)
    sequences = {name: to_sequences(part, scaler) for name, part in parts.items()}

    def run(
        name: str,
        key: jax.Array,
        model: ModelT,
        loss: Loss[Sequences],
        index: Callable[[Episodes], np.ndarray],
        fit_config: FitConfig,
    ) -> tuple[ModelT, list[dict[str, float]]]:
        saver = None
        if state_folder is not None:
            saver = Saver(Path(state_folder) / name, fingerprint)
        return fit(
            key,
            model,
            loss,
            (sequences["train"], index(parts["train"])),
            (sequences["validation"], index(parts["validation"])),
            fit_config,
            saver=saver,
            progress=None if progress is None else partial(progress, name),
        )

    if config.model.variant == "residual":
        rows = evaluation.transition_rows(sequences["train"], transitions["train"])
        start_from_last_value(world_model.window_models()[0], rows)
    state_model, state_history = run(
        "state",
        key_state,
        world_model.state_model,
        _state_loss(config.resolved_imputed_weight, config.vent_weight),
        transition_index,
        config.state,
    )
    outcome_model, outcome_history = run(
        "outcome",
        key_outcome,
        world_model.outcome_model,
        _OUTCOME_LOSS,
        every_step_index if config.resolved_prefixes else last_step_index,
        config.outcome,
    )
    world_model = replace(world_model, state_model=state_model, outcome_model=outcome_model)
    if config.model.variant == "residual":
        world_model = calibrate_sigma(
            world_model, sequences["validation"], transitions["validation"]
        )
    return Trained(
        world_model,
        evaluate_world_model(world_model, episodes),
        {"state": state_history, "outcome": outcome_history},
    )


# The same functions for equal settings, which `fit` then compiles once.
_OUTCOME_LOSS = partial(outcome_model_loss, window=schema.OUTCOME_WINDOW)


@lru_cache(maxsize=8)
def _state_loss(imputed_weight: float, vent_weight: float) -> Loss[Sequences]:
    return partial(
        state_model_loss,
        window=schema.STATE_WINDOW,
        imputed_weight=imputed_weight,
        vent_weight=vent_weight,
    )


@lru_cache
def _stay_loss(weighted: bool) -> Loss[StayRows]:
    """`recurrent_loss`, the same function for equal settings, so that it is compiled once."""
    return partial(recurrent_loss, weighted=weighted)


def _fit_stays(
    key: jax.Array,
    world_model: WorldModel,
    parts: dict[str, Episodes],
    config: TrainConfig,
    state_folder: str | Path | None,
    fingerprint: Mapping[str, object],
    progress: EpochProgress | None,
) -> tuple[WorldModel, dict[str, list[dict[str, float]]]]:
    """Both models of the recurrent variant at once, then the covariance of its noise."""
    scaler, edges = world_model.scaler, world_model.dose_edges
    fill = fill_values(parts["train"], scaler, world_model.step_hours)
    state_model, outcome_model = world_model.stay_models()
    state_model.fill[...] = jnp.broadcast_to(fill, state_model.fill[...].shape)
    rows = {name: to_stay_rows(parts[name], scaler, edges) for name in ("train", "validation")}
    saver = None
    if state_folder is not None:
        saver = Saver(Path(state_folder) / "stays", fingerprint)
    (state_model, outcome_model), history = fit(
        key,
        (state_model, outcome_model),
        _stay_loss(config.history_weights),
        (rows["train"], last_step_index(parts["train"])),
        (rows["validation"], last_step_index(parts["validation"])),
        config.stays,
        saver=saver,
        progress=None if progress is None else partial(progress, "stays"),
    )
    world_model = replace(world_model, state_model=state_model, outcome_model=outcome_model)
    return calibrate_noise(world_model, rows["validation"]), {"stays": history}


def start_from_last_value(state_model: StateModel, train: Rows) -> None:
    """Sets an untrained residual model's sigma to the spread of the training split's changes.

    Its mu starts at the last value, so that training starts at that baseline's very loss.

    Args:
      state_model: with a leading ensemble axis; changed in place.
      train: transitions of the training split.
    """
    low, high = LOG_SIGMA_RANGE
    log_sigma = np.log(evaluation.spread(train.target - train.last, train.measured))
    share = np.clip((log_sigma - low) / (high - low), 0.02, 0.98)
    bias = state_model.log_sigma_head.bias
    bias[...] = jnp.broadcast_to(np.log(share / (1 - share)).astype(np.float32), bias.shape)


def calibrate_sigma(
    world_model: WorldModel, sequences: Sequences, index: Int[np.ndarray, "K 2"]
) -> WorldModel:
    """Scales each feature's sigma to the validation errors, by maximum likelihood.

    For a fixed mu the best scale of sigma_j is the root mean square of error / sigma over the
    measured entries; features measured fewer than 30 times keep their sigma.
    """
    recorded = sequences.target(index)
    measured, target = np.asarray(recorded.measured), np.asarray(recorded.obs)
    mu, log_sigma, _ = predict_members(world_model, sequences, index)
    z2 = np.square((target - mu) * np.exp(-log_sigma))  # [E, K, 39]
    count = measured.sum(0)
    scale = np.where(count >= 30, (z2 * measured).sum(1) / np.maximum(count, 1), 1.0)
    offset = 0.5 * np.log(np.clip(scale, 1e-2, 1e2))
    state_model = jax.tree.map(lambda leaf: leaf, world_model.state_model)
    state_model.log_sigma_offset[...] = state_model.log_sigma_offset[...] + jnp.asarray(offset)
    return replace(world_model, state_model=state_model)
