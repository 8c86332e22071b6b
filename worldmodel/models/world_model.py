"""The Clinical World Model: both models, their scaler, and an ensemble axis."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from worldmodel import schema, struct
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import (
    RECURRENT,
    ModelConfig,
    OutcomeModel,
    Prediction,
    StateModel,
)
from worldmodel.models.recurrent import NOISE_WIDTH, CompetingRisks, RecurrentStateModel
from worldmodel.scaling import Scaler

ModelT = TypeVar("ModelT")
Models = tuple[StateModel | RecurrentStateModel, OutcomeModel | CompetingRisks]


@struct.dataclass
class WorldModel:
    """A PyTree: pass it through `jax.jit`, `jax.vmap`, `jax.device_put` as it is.

    The parameters of both models have a leading ensemble axis [E, ...].
    """

    state_model: StateModel | RecurrentStateModel
    outcome_model: OutcomeModel | CompetingRisks
    scaler: Scaler
    config: ModelConfig = struct.field(pytree_node=False)
    step_hours: float = struct.field(pytree_node=False, default=schema.STEP_HOURS)
    dose_edges: schema.DoseEdges = struct.field(
        pytree_node=False, default=schema.DEFAULT_DOSE_EDGES
    )
    # Rows of the recorded window, in the last of which every stay ends; recurrent variant only.
    stay_steps: int = struct.field(pytree_node=False, default=0)

    @property
    def is_recurrent(self) -> bool:
        """Whether it carries one state over whole stays instead of reading windows."""
        return self.config.variant == RECURRENT

    @property
    def noise_width(self) -> int:
        """Standard normals that a simulated step takes."""
        return NOISE_WIDTH if self.is_recurrent else schema.NUM_FEATURES

    @property
    def num_members(self) -> int:
        """Ensemble size E."""
        result: int = jax.tree.leaves(self.state_model)[0].shape[0]
        return result

    def whole_samples(self, samples: int) -> int:
        """At least so many futures, as many from each member of the ensemble."""
        return -(-samples // self.num_members) * self.num_members

    def member(self, index: int) -> WorldModel:
        """The world model of one ensemble member.

        Raises:
          InputError: there is no such member.
        """
        members = self.num_members
        if not -members <= index < members:
            raise InputError(f"member: got {index}, the ensemble has {members} members")

        def pick(model: ModelT) -> ModelT:
            picked: ModelT = jax.tree.map(lambda leaf: leaf[index][None], model)
            return picked

        return replace(
            self, state_model=pick(self.state_model), outcome_model=pick(self.outcome_model)
        )

    def with_models(self, models: Models) -> WorldModel:
        """The world model of one member, whose models are given without the ensemble axis."""
        state_model, outcome_model = jax.tree.map(lambda leaf: leaf[None], models)
        return replace(self, state_model=state_model, outcome_model=outcome_model)

    def transitions(
        self,
        obs: Float[Array, "B W 39"],
        observed: Float[Array, "B W 38"],
        static: Float[Array, "B 3"],
        action: Float[Array, "B W 10"],
    ) -> Prediction:
        """Every member's prediction: arguments as `transition`, results [E, B, ...]."""
        self._require_windows()
        result: Prediction = jax.vmap(lambda model: model(obs, observed, static, action))(
            self.state_model
        )
        return result

    def transition(
        self,
        obs: Float[Array, "B W 39"],
        observed: Float[Array, "B W 38"],
        static: Float[Array, "B 3"],
        action: Float[Array, "B W 10"],
    ) -> Prediction:
        """Mean and spread of the next state, in z-space, and the ventilation logit.

        The prediction of an ensemble has the moments of its mixture (law of total variance).

        Args:
          obs: [B, 6, 39] z-scores, left-padded with zero rows.
          observed: [B, 6, 38] measured in the step.
          static: [B, 3] scaled.
          action: [B, 6, 10] one-hot pairs; the last row holds the treatment in question.

        Returns:
          `(mu [B, 39], log_sigma [B, 39], vent_logit [B])`.
        """
        members = self.transitions(obs, observed, static, action)
        if self.num_members == 1:
            return Prediction(*(value[0] for value in members))
        mu = members.mu.mean(0)
        variance = jnp.exp(2 * members.log_sigma).mean(0) + members.mu.var(0)
        vent = _logit(jax.nn.sigmoid(members.vent_logit).mean(0))
        return Prediction(mu, 0.5 * jnp.log(variance), vent)

    def mortality_logit(
        self,
        obs: Float[Array, "B W 39"],
        observed: Float[Array, "B W 38"],
        static: Float[Array, "B 3"],
        action: Float[Array, "B W 10"],
    ) -> Float[Array, " B"]:
        """Logit [B] of death within 90 days; arguments as `transition`, window 12."""
        logits = self.mortality_logits(obs, observed, static, action)
        if self.num_members == 1:
            return logits[0]
        return _logit(jax.nn.sigmoid(logits).mean(0))

    def mortality_logits(
        self,
        obs: Float[Array, "B W 39"],
        observed: Float[Array, "B W 38"],
        static: Float[Array, "B 3"],
        action: Float[Array, "B W 10"],
    ) -> Float[Array, "E B"]:
        """Every member's logit [E, B] of death within 90 days; arguments as `mortality_logit`."""
        self._require_windows()
        result: Array = jax.vmap(lambda model: model(obs, observed, static, action))(
            self.outcome_model
        )
        return result

    def window_models(self) -> tuple[StateModel, OutcomeModel]:
        """Both models of a variant that reads windows, with the ensemble axis.

        Raises:
          InputError: the variant is recurrent.
        """
        self._require_windows()
        assert isinstance(self.state_model, StateModel)
        assert isinstance(self.outcome_model, OutcomeModel)
        return self.state_model, self.outcome_model

    def stay_models(self) -> tuple[RecurrentStateModel, CompetingRisks]:
        """Both models of the recurrent variant, with the ensemble axis.

        Raises:
          InputError: the variant reads windows.
        """
        if not self.is_recurrent:
            raise InputError(f"the {self.config.variant} variant reads windows, no whole stays")
        assert isinstance(self.state_model, RecurrentStateModel)
        assert isinstance(self.outcome_model, CompetingRisks)
        return self.state_model, self.outcome_model

    def _require_windows(self) -> None:
        if self.is_recurrent:
            raise InputError(
                "the recurrent variant reads whole stays, no windows; use "
                "worldmodel.simulate.predict_next, or rollout"
            )


def init_world_model(
    key: jax.Array,
    scaler: Scaler,
    config: ModelConfig | None = None,
    *,
    members: int = 1,
    step_hours: float = schema.STEP_HOURS,
    dose_edges: schema.DoseEdges = schema.DEFAULT_DOSE_EDGES,
    stay_steps: int = 0,
) -> WorldModel:
    """An untrained world model; the key is consumed."""
    config = config or ModelConfig()
    key_state, key_outcome = jax.random.split(key)
    return WorldModel(
        state_model=_init_state(jax.random.split(key_state, members), config),
        outcome_model=_init_outcome(jax.random.split(key_outcome, members), config),
        scaler=scaler,
        config=config,
        step_hours=step_hours,
        dose_edges=dose_edges,
        stay_steps=stay_steps,
    )


@partial(jax.jit, static_argnums=1)
def _init_state(keys: jax.Array, config: ModelConfig) -> StateModel | RecurrentStateModel:
    """State Models with a leading ensemble axis."""

    def one(key: jax.Array) -> StateModel | RecurrentStateModel:
        rngs = nnx.Rngs(key)
        if config.variant != RECURRENT:
            return StateModel(config, rngs=rngs)
        dropout = 0.5 * config.dropout
        return RecurrentStateModel(config.hidden, config.head, dropout, config.precision, rngs=rngs)

    return jax.vmap(one)(keys)


@partial(jax.jit, static_argnums=1)
def _init_outcome(keys: jax.Array, config: ModelConfig) -> OutcomeModel | CompetingRisks:
    """Outcome Models, likewise."""

    def one(key: jax.Array) -> OutcomeModel | CompetingRisks:
        rngs = nnx.Rngs(key)
        if config.variant != RECURRENT:
            return OutcomeModel(config, rngs=rngs)
        return CompetingRisks(
            config.hidden, config.head, config.dropout, config.precision, rngs=rngs
        )

    return jax.vmap(one)(keys)


def _logit(probability: jax.Array) -> jax.Array:
    probability = jnp.clip(probability, 1e-7, 1 - 1e-7)
    return jnp.log(probability) - jnp.log1p(-probability)
