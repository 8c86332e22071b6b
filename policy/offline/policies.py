"""What offline reinforcement learning prescribes."""

from __future__ import annotations

from dataclasses import replace

import jax
from flax import struct

from policy.base import Policy
from policy.features import decision_features
from policy.offline.algorithms import ALGORITHMS, Networks
from policy.offline.configuration import OfflineConfig
from worldmodel import schema
from worldmodel.scaling import Scaler
from worldmodel.view import View, recent


@struct.dataclass
class OfflinePolicy(Policy):
    """Acts on the scores of its networks, averaged over seeds.

    The probabilities are softmax(score / temperature); at temperature 0 the best action has all.
    Scores are values of actions, for IQL log-probabilities of its actor.
    """

    networks: Networks  # leaves [S, ...]
    scaler: Scaler
    config: OfflineConfig = struct.field(pytree_node=False)
    temperature: float = struct.field(pytree_node=False, default=0.0)

    @property
    def past(self) -> int:  # type: ignore[override]
        return self.config.past

    @property
    def num_seeds(self) -> int:
        return jax.tree.leaves(self.networks)[0].shape[0]

    def member(self, index: int) -> OfflinePolicy:
        """The policy of one seed."""
        networks = jax.tree.map(lambda leaf: leaf[index][None], self.networks)
        return replace(self, networks=networks)

    def scores(self, view: View) -> jax.Array:
        """[S, 25] of every seed."""
        features = decision_features(recent(view, self.past), self.scaler)
        score = ALGORITHMS[self.config.algorithm].score
        return jax.vmap(lambda networks: score(networks, features, self.config))(self.networks)

    def __call__(self, key: jax.Array, view: View) -> jax.Array:
        del key
        scores = self.scores(view).mean(0)
        if self.temperature <= 0:
            return jax.nn.one_hot(scores.argmax(), schema.NUM_ACTIONS)
        return jax.nn.softmax(scores / self.temperature)
