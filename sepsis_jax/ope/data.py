"""What off-policy evaluation needs to know about recorded stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from worldmodel import schema
from worldmodel.clinical.reward import episode_rewards
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError


@struct.dataclass
class OPEData:
    """N recorded stays padded to T steps; nothing after the end of a stay is ever read."""

    reward: jax.Array  # [N, T] float32
    alive: jax.Array  # [N, T] bool, True on recorded steps, which come first
    action: jax.Array  # [N, T] int32
    behavior_prob: jax.Array  # [N, T] clinician's probability of the recorded action
    behavior_probs: jax.Array | None = None  # [N, T, A] of all actions
    features: jax.Array | None = None  # [N, T, D] of the state, for fitted values

    @property
    def num_stays(self) -> int:
        return self.reward.shape[0]

    @property
    def num_steps(self) -> int:
        return self.reward.shape[1]

    @property
    def length(self) -> jax.Array:
        """[N] int32 number of recorded steps."""
        return self.alive.sum(1)

    def select(self, index: Any) -> OPEData:
        """The stays picked by an index array or boolean mask [N]."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def returns(self, gamma: float = 1.0) -> jax.Array:
        """[N] sum_t gamma^t r_t."""
        return (self.reward * gamma ** jnp.arange(self.num_steps)).sum(1)


@dataclass(frozen=True)
class Treatment:
    """What to do about flawed input; "error" refuses it, everything else is counted.

    Attributes:
      zero_behavior: the clinician's probability of a recorded action is 0. "drop" leaves the stay
        out, "floor" raises the probability to `floor`.
      row_sums: a row of action probabilities does not sum to 1. "normalize" divides by the sum.
      missing_reward: a reward is NaN or infinite. "drop" leaves the stay out.
      floor: the least behaviour probability under "floor".
    """

    zero_behavior: str = "error"
    row_sums: str = "error"
    missing_reward: str = "error"
    floor: float = 0.001

    def __post_init__(self) -> None:
        for name, allowed in (
            ("zero_behavior", ("error", "drop", "floor")),
            ("row_sums", ("error", "normalize")),
            ("missing_reward", ("error", "drop")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )
        if not 0 < self.floor < 1:
            raise InputError(f"floor: got {self.floor}, expected between 0 and 1")


def from_episodes(
    episodes: Episodes,
    *,
    behavior_probs: np.ndarray | jax.Array | None = None,
    features: jax.Array | None = None,
) -> OPEData:
    """Recorded stays for evaluation.

    Args:
      episodes: the stays.
      behavior_probs: [N, T, 25] the clinician's action probabilities; without them those of the
        recorded actions in `episodes.behavior_prob` are used.
      features: [N, T, D] for fitted values; see `sepsis_jax.ope.features`.

    Raises:
      InputError: no probabilities are known, or their shape is wrong.
    """
    if behavior_probs is not None:
        expected = (episodes.num_stays, episodes.num_steps, schema.NUM_ACTIONS)
        if np.shape(behavior_probs) != expected:
            raise InputError(
                f"behavior_probs: got shape {np.shape(behavior_probs)}, expected {expected}"
            )
        behavior_probs = jnp.asarray(behavior_probs, jnp.float32)
        taken = taken_probs(behavior_probs, episodes.action)
    else:
        taken = episodes.behavior_prob
        unknown = np.isnan(np.asarray(taken)) & np.asarray(episodes.valid)
        if unknown.any():
            stay = int(np.asarray(episodes.stay_id)[np.argwhere(unknown)[0, 0]])
            raise InputError(
                f"behavior_prob: unknown in {unknown.sum()} steps (first in stay {stay}); "
                "estimate the clinician's probabilities first (policy.clinician)"
            )
    return OPEData(
        reward=episode_rewards(episodes),
        alive=episodes.valid,
        action=episodes.action,
        behavior_prob=jnp.where(episodes.valid, taken, 1.0),
        behavior_probs=behavior_probs,
        features=features,
    )


def taken_probs(probs: jax.Array, action: jax.Array) -> jax.Array:
    """[..., T] probabilities of the taken actions from [..., T, A] of all."""
    action = jnp.broadcast_to(action, probs.shape[:-1])
    return jnp.take_along_axis(probs, action[..., None], -1)[..., 0]


def pad(data: OPEData, steps: int) -> OPEData:
    """The same stays with `steps` more columns of padding."""

    def more(leaf: jax.Array, value: float) -> jax.Array:
        widths = ((0, 0), (0, steps), *((0, 0),) * (leaf.ndim - 2))
        return jnp.pad(leaf, widths, constant_values=value)

    padded = jax.tree.map(lambda leaf: more(leaf, 0), data)
    return replace(padded, behavior_prob=more(data.behavior_prob, 1.0))
