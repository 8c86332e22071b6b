"""What reinforcement learning inside the simulator prescribes."""

from __future__ import annotations

import jax
from flax import struct

from policy.base import Policy
from policy.features import decision_features
from policy.offline.networks import Perceptron
from policy.online.configuration import PPOConfig
from worldmodel import schema
from worldmodel.scaling import Scaler
from worldmodel.view import View, recent


@struct.dataclass
class OnlinePolicy(Policy):
    """Acts on the logits of its actor.

    The probabilities are softmax(logits / temperature); at temperature 0 the best action has all.
    At temperature 1 it is the policy that was trained.
    """

    actor: Perceptron
    scaler: Scaler
    config: PPOConfig = struct.field(pytree_node=False)
    temperature: float = struct.field(pytree_node=False, default=0.0)

    @property
    def past(self) -> int:  # type: ignore[override]
        return self.config.past

    def logits(self, view: View) -> jax.Array:
        """[25] of the actor."""
        return self.actor(decision_features(recent(view, self.past), self.scaler))

    def __call__(self, key: jax.Array, view: View) -> jax.Array:
        del key
        logits = self.logits(view)
        if self.temperature <= 0:
            return jax.nn.one_hot(logits.argmax(), schema.NUM_ACTIONS)
        return jax.nn.softmax(logits / self.temperature)
