"""Decision processes with discrete states: tables, exact values, and an environment over them.

Values of policies in such a process can be computed exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from worldmodel import keys, struct
from worldmodel.envs.base import Timestep, first_timestep


class MDP(NamedTuple):
    """A finite decision process; NumPy arrays."""

    transition: np.ndarray  # [S, A, S]
    reward: np.ndarray  # [S, A, S], on the transition to the next state
    start: np.ndarray  # [S]
    terminal: np.ndarray  # [S] bool
    clinician: np.ndarray  # [S, A] the policy the records come from
    admissible: np.ndarray | None = None  # [S, A] bool, treatments that the records support
    sofa: np.ndarray | None = None  # [S] mean SOFA of the patients in a state


def small_mdp(seed: int = 0, *, states: int = 6, actions: int = 25) -> MDP:
    """A random process of a few states with a rarely reached goal, for quick checks."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(states, 0.5), (states, actions))
    terminal = np.zeros(states, bool)
    terminal[-1] = True
    reward = np.broadcast_to(rng.normal(size=(states, actions, 1)), transition.shape) + 0.0
    start = np.append(np.full(states - 1, 1 / (states - 1)), 0.0)
    clinician = 0.8 * rng.dirichlet(np.ones(actions), states) + 0.2 / actions
    return MDP(transition, reward, start, terminal, clinician)


def expected_reward(mdp: MDP) -> Float[np.ndarray, "S A"]:
    """[S, A] mean reward of the step after an action."""
    found: np.ndarray = np.einsum("sat,sat->sa", mdp.transition, mdp.reward)
    return found


def exact(
    mdp: MDP, policy: Float[np.ndarray, "S A"], *, horizon: int, gamma: float = 1.0
) -> Float[np.ndarray, "H S A"]:
    """[H, S, A] Q-values of a policy [S, A] with t steps gone, by backward induction in float64."""
    gain = expected_reward(mdp)
    goes_on = ~mdp.terminal
    value = np.zeros(len(mdp.start))
    out = []
    for _ in range(horizon):
        q = (gain + gamma * (mdp.transition @ value)) * goes_on[:, None]
        value = (policy * q).sum(-1)
        out.append(q)
    return np.stack(out[::-1])


def true_value(
    mdp: MDP, policy: Float[np.ndarray, "S A"], *, horizon: int, gamma: float = 1.0
) -> float:
    """Exact value of a policy over a horizon."""
    first = (policy * exact(mdp, policy, horizon=horizon, gamma=gamma)[0]).sum(-1)
    return float(mdp.start @ first)


def best_policy(mdp: MDP, *, horizon: int = 200, gamma: float = 0.999) -> Float[np.ndarray, "S A"]:
    """[S, A] the greedy policy after value iteration, one action per state."""
    gain = expected_reward(mdp)
    value = np.zeros(len(mdp.start))
    for _ in range(horizon):
        q = (gain + gamma * (mdp.transition @ value)) * ~mdp.terminal[:, None]
        value = q.max(-1)
    result: np.ndarray = np.eye(q.shape[1])[q.argmax(-1)]
    return result


_TIE = 1e-9  # by which values of equally good actions differ at most


def policy_iteration(
    transition: Float[np.ndarray, "S A T"], gain: Float[np.ndarray, "S A"], gamma: float
) -> Float[np.ndarray, "S A"]:
    """[S, A] the best policy of an endless process; of equally good actions the first.

    Args:
      transition: [S, A, S].
      gain: [S, A] mean reward of the step.
      gamma: discount, below 1.
    """
    rows = np.arange(len(gain))
    choice = gain.argmax(1)
    while True:
        follow = np.eye(len(gain)) - gamma * transition[rows, choice]
        q = gain + gamma * (transition @ np.linalg.solve(follow, gain[rows, choice]))
        better = (q >= q.max(1, keepdims=True) - _TIE).argmax(1)
        if (better == choice).all():
            result: np.ndarray = np.eye(gain.shape[1])[choice]
            return result
        choice = better


@struct.dataclass
class TableState:
    """State of one patient."""

    number: jax.Array  # [] int32 state
    step: jax.Array  # [] int32
    key: jax.Array  # [] of the episode


@struct.dataclass
class TableDynamics:
    """Tables of S states and A actions; the observation is the number of the state."""

    next_state: jax.Array  # [S, A, S] cumulative probabilities of the next state
    reward: jax.Array  # [S, A, S]
    start: jax.Array  # [S] cumulative
    terminal: jax.Array  # [S] bool
    admissible: jax.Array  # [S, A] 1 where the action occurs in the records
    sofa: jax.Array  # [S]

    @property
    def num_states(self) -> int:
        """Number of states S."""
        return self.terminal.shape[0]

    @property
    def num_actions(self) -> int:
        """Number of actions A."""
        return self.next_state.shape[1]

    def reset(self, key: jax.Array) -> tuple[TableState, Timestep]:
        """Draws a start state."""
        number = draw(self.start, jax.random.fold_in(key, keys.START_STATE))
        state = TableState(number, jnp.int32(0), key)
        return state, first_timestep(number, sofa=self.sofa[number])

    def step(self, state: TableState, action: Int[Array, ""]) -> tuple[TableState, Timestep]:
        """One transition; the noise depends on the key and the step alone."""
        key = jax.random.fold_in(state.key, state.step + 1)
        number = draw(self.next_state[state.number, action], key)
        earned = self.reward[state.number, action, number]
        ended = self.terminal[number]
        start = first_timestep(number, sofa=self.sofa[number])
        info = replace(
            start.info,
            reward_terms=start.info.reward_terms.at[-1].set(earned),
            mortality=jnp.where(ended, 1.0 - earned, jnp.nan),
            support=self.admissible[state.number, action],
        )
        timestep = replace(start, reward=earned, terminated=ended, info=info)
        return TableState(number, state.step + 1, state.key), timestep


def draw(cumulative: jax.Array, key: jax.Array) -> jax.Array:
    """[] int32 index by the inverse of cumulative probabilities [S]."""
    chance = jax.random.uniform(key) * cumulative[-1]
    return (cumulative <= chance).sum().astype(jnp.int32)
