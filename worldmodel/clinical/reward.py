"""Reward: +15 / -15 at the end, SOFA and lactate in between (Raghu et al., arXiv 1711.09602).

A step that does not end the episode has the reward

    r = -0.025 [SOFA' = SOFA and SOFA' > 0] - 0.125 (SOFA' - SOFA) - 2 tanh(lactate' - lactate)

and the step that ends it has the terminal reward alone. The total is not discounted.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, Shaped

from worldmodel import schema
from worldmodel.episodes import Episodes

TERMINAL = 15.0


def step_reward(
    sofa_t: Num[Array, "*#b"],
    sofa_tp1: Num[Array, "*#b"],
    lactate_t: Num[Array, "*#b"],
    lactate_tp1: Num[Array, "*#b"],
) -> Float[Array, "*#b"]:
    """Reward of a step that does not end the episode.

    Args:
      sofa_t, sofa_tp1: [...] SOFA before and after the step.
      lactate_t, lactate_tp1: [...] lactate before and after the step, mmol/L.
    """
    return sum(step_terms(sofa_t, sofa_tp1, lactate_t, lactate_tp1), start=jnp.float32(0))


def step_terms(
    sofa_t: Num[Array, "*#b"],
    sofa_tp1: Num[Array, "*#b"],
    lactate_t: Num[Array, "*#b"],
    lactate_tp1: Num[Array, "*#b"],
) -> tuple[Float[Array, "*#b"], Float[Array, "*#b"], Float[Array, "*#b"]]:
    """Terms [...] of `step_reward`: for unchanged SOFA, for its change, for that of lactate."""
    return (
        jnp.where((sofa_tp1 == sofa_t) & (sofa_tp1 > 0), -0.025, 0.0),
        -0.125 * (sofa_tp1 - sofa_t),
        -2.0 * jnp.tanh(lactate_tp1 - lactate_t),
    )


def terminal_reward(died: Shaped[Array, "*#b"]) -> Float[Array, "*#b"]:
    """-15 for death within 90 days, +15 for survival; `died` may be a probability."""
    return TERMINAL * (1.0 - 2.0 * jnp.asarray(died, jnp.float32))


def episode_rewards(episodes: Episodes) -> Float[Array, "N T"]:
    """[N, T] `trajectory_rewards` of recorded stays."""
    lactate = episodes.dynamic[..., schema.INDEX["lactate"]]
    return trajectory_rewards(episodes.sofa, lactate, episodes.length, episodes.died_90d)


def trajectory_rewards(
    sofa: Num[Array, "N T"],
    lactate: Num[Array, "N T"],
    length: Int[Array, " N"],
    died: Shaped[Array, " N"],
) -> Float[Array, "N T"]:
    """Rewards of recorded trajectories.

    Args:
      sofa, lactate: [N, T] per step.
      length: [N] recorded steps.
      died: [N] bool, death within 90 days.

    Returns:
      [N, T] float32: shaping for the step from row t to row t + 1, the terminal reward in
      the last recorded row, zero afterwards.
    """
    shaping = step_reward(sofa[:, :-1], sofa[:, 1:], lactate[:, :-1], lactate[:, 1:])
    shaping = jnp.pad(shaping, ((0, 0), (0, 1)))
    step = jnp.arange(sofa.shape[1])
    last = length[:, None] - 1
    reward = jnp.where(step < last, shaping, 0.0)
    return jnp.where(step == last, terminal_reward(died)[:, None], reward)
