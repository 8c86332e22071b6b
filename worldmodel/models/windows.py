"""Training windows: the last rows of fixed number before each step, cut on the device.

Rows before ICU admission are all zero (observation, mask and action), as in SepsisAgent.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from worldmodel import schema, struct
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.scaling import Scaler


class Window(NamedTuple):
    """Inputs of the State Model (W = 6) or the Outcome Model (W = 12)."""

    obs: jax.Array  # [B, W, 39] z-scores
    observed: jax.Array  # [B, W, 38] float32
    static: jax.Array  # [B, 3] scaled
    action: jax.Array  # [B, W, 10] one-hot pairs


class Target(NamedTuple):
    """Target of the State Model: the row after the window."""

    obs: jax.Array  # [B, 39] z-scores
    measured: jax.Array  # [B, 39] bool; urine counts where it is above 0 mL
    ventilated: jax.Array  # [B] bool


@struct.dataclass
class Sequences:
    """Episodes in model space, left-padded so that every window is a plain slice."""

    obs: jax.Array  # [N, P + T, 39] z-scores
    measured: jax.Array  # [N, P + T, 39] bool; urine has no mask: above 0 mL counts
    action: jax.Array  # [N, P + T] int32, -1 in the padding
    ventilated: jax.Array  # [N, P + T] bool
    static: jax.Array  # [N, 3] scaled
    length: jax.Array  # [N] int32
    died_90d: jax.Array  # [N] bool
    padding: int = struct.field(pytree_node=False)

    @property
    def num_steps(self) -> int:
        """Padded number of steps T."""
        return self.obs.shape[1] - self.padding

    @partial(jax.jit, static_argnames="width")
    def window(self, index: Int[Array | np.ndarray, "B 2"], width: int) -> Window:
        """Windows that end at the rows `index` [B, 2] (stay, step)."""
        stay, step = index[:, 0], index[:, 1]
        rows = self.padding + step[:, None] + jnp.arange(1 - width, 1)
        stays = stay[:, None]
        return Window(
            obs=self.obs[stays, rows],
            observed=self.measured[stays, rows, : schema.NUM_MASKED].astype(jnp.float32),
            static=self.static[stay],
            action=encode_action(self.action[stays, rows]),
        )

    def target(self, index: Int[Array | np.ndarray, "B 2"]) -> Target:
        """The rows after `index` [B, 2] (stay, step)."""
        stay, row = index[:, 0], self.padding + index[:, 1] + 1
        return Target(
            obs=self.obs[stay, row],
            measured=self.measured[stay, row],
            ventilated=self.ventilated[stay, row],
        )


def encode_action(action: Int[Array, "*b"]) -> Float[Array, "*b 10"]:
    """Joint actions [...] to one-hot pairs [..., 10]; -1 becomes all zeros."""
    vasopressor, fluid = schema.action_levels(action)
    valid = (action >= 0)[..., None]
    pair = [jax.nn.one_hot(level, schema.NUM_LEVELS) for level in (vasopressor, fluid)]
    return jnp.where(valid, jnp.concatenate(pair, axis=-1), 0.0)


def measured_entries(episodes: Episodes) -> jax.Array:
    """[N, T, 39] bool; urine counts where it is above 0 mL.

    A step without a urine record is written as 0 mL, which is no measurement of anuria.
    """
    urine = episodes.dynamic[..., schema.URINE :] > 0
    return jnp.concatenate([episodes.measured, urine], axis=-1) & episodes.valid[..., None]


@partial(jax.jit, static_argnames="padding")
def to_sequences(
    episodes: Episodes, scaler: Scaler, *, padding: int = schema.OUTCOME_WINDOW - 1
) -> Sequences:
    """Scales episodes and pads them on the left by `padding` zero rows."""
    valid = episodes.valid

    def padded(values: jax.Array, fill: float = 0) -> jax.Array:
        mask = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2))
        widths = [(0, 0), (padding, 0), *[(0, 0)] * (values.ndim - 2)]
        blank = jnp.asarray(fill, values.dtype)
        return jnp.pad(jnp.where(mask, values, blank), widths, constant_values=blank)

    return Sequences(
        obs=padded(scaler.normalize(episodes.dynamic)),
        measured=padded(measured_entries(episodes)),
        action=padded(episodes.action, fill=-1),
        ventilated=padded(episodes.ventilated),
        static=scaler.normalize_static(episodes.static),
        length=episodes.length,
        died_90d=episodes.died_90d,
        padding=padding,
    )


def transition_index(episodes: Episodes) -> Int[np.ndarray, "K 2"]:
    """All (stay, step) pairs with a recorded next row: [K, 2] int32."""
    length = np.asarray(episodes.length)
    pairs = np.argwhere(np.arange(episodes.num_steps) < length[:, None] - 1)
    return pairs.astype(np.int32)


def require_transitions(index: Int[np.ndarray, "K 2"], split: str) -> Int[np.ndarray, "K 2"]:
    """`index` itself, once it is known to hold a transition.

    Raises:
      InputError: it holds none; `split` is named.
    """
    if not len(index):
        raise InputError(f"the {split} split has no stay of two steps; use a larger cohort")
    return index


def last_step_index(episodes: Episodes) -> Int[np.ndarray, "N 2"]:
    """The last (stay, step) of every stay: [N, 2] int32."""
    length = np.asarray(episodes.length)
    return np.stack([np.arange(len(length)), length - 1], axis=1).astype(np.int32)


def every_step_index(episodes: Episodes) -> Int[np.ndarray, "K 2"]:
    """All recorded (stay, step) pairs: [K, 2] int32."""
    return np.argwhere(np.asarray(episodes.valid)).astype(np.int32)
