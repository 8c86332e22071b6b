"""What a branch comes to, folded step by step so that no trajectory is kept."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from worldmodel import schema
from worldmodel.clinical import reward
from worldmodel.simulate.play import Shape, Step

MAP_TARGET = 65.0  # mmHg

_MEANBP = schema.INDEX["meanbp"]


@struct.dataclass
class BranchSummary:
    """Of branches [P, K, S]; sums and means are over the H simulated steps."""

    final: jax.Array  # [P, K, S, F] physical units of the features asked for, in the last row
    sofa: jax.Array  # [P, K, S] in the last row
    lowest_map: jax.Array  # [P, K, S] mmHg
    below_target: jax.Array  # [P, K, S] share of steps with MAP < 65 mmHg
    ventilation: jax.Array  # [P, K, S] mean probability
    shaping: jax.Array  # [P, K, S] sum of the steps' rewards
    first_action: jax.Array  # [P, K, S] int32 joint action
    vasopressor: jax.Array  # [P, K, S] mean level
    fluid: jax.Array  # [P, K, S] mean level
    projected: jax.Array  # [P, K, S] int32 entries moved into their physiologic range
    mortality: jax.Array  # [P, K, S] probability of death within 90 days; NaN if not asked

    @property
    def total_reward(self) -> jax.Array:
        """[P, K, S] shaping plus the expected terminal reward."""
        return self.shaping + reward.terminal_reward(self.mortality)


def empty_summary(shape: Shape, features: tuple[str, ...]) -> BranchSummary:
    """Before the first step."""

    def full(value: float) -> jax.Array:
        return jnp.full(shape, value, jnp.float32)

    return BranchSummary(
        final=jnp.zeros((*shape, len(features))),
        sofa=full(0),
        lowest_map=full(jnp.inf),
        below_target=full(0),
        ventilation=full(0),
        shaping=full(0),
        first_action=jnp.full(shape, -1, jnp.int32),
        vasopressor=full(0),
        fluid=full(0),
        projected=jnp.zeros(shape, jnp.int32),
        mortality=full(jnp.nan),
    )


def fold_step(summary: BranchSummary, step: Step, features: tuple[str, ...]) -> BranchSummary:
    """The summary with one step added; sums, not yet means."""
    columns = np.array([schema.INDEX[name] for name in features], np.int32)
    map_ = step.dynamic[..., _MEANBP]
    vasopressor, fluid = schema.action_levels(step.action)
    return replace(
        summary,
        final=jnp.broadcast_to(step.dynamic[..., columns], summary.final.shape),
        sofa=jnp.broadcast_to(step.sofa, summary.sofa.shape),
        lowest_map=jnp.minimum(summary.lowest_map, map_),
        below_target=summary.below_target + (map_ < MAP_TARGET),
        ventilation=summary.ventilation + step.ventilation,
        shaping=summary.shaping + step.reward,
        first_action=jnp.where(summary.first_action < 0, step.action, summary.first_action),
        vasopressor=summary.vasopressor + vasopressor,
        fluid=summary.fluid + fluid,
        projected=summary.projected + step.projected,
    )


def finish_summary(
    summary: BranchSummary, mortality: jax.Array | None, horizon: int
) -> BranchSummary:
    """Sums become means, and the outcome is added."""
    return replace(
        summary,
        below_target=summary.below_target / horizon,
        ventilation=summary.ventilation / horizon,
        vasopressor=summary.vasopressor / horizon,
        fluid=summary.fluid / horizon,
        mortality=summary.mortality if mortality is None else mortality,
    )
