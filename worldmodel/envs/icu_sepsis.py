"""ICU-Sepsis (Choudhary, Gupta & Thomas 2024): its tables, exact values, and an environment.

716 states and 25 treatments estimated from MIMIC-III, reward 1 for survival. The tables come from
the package `icu-sepsis`. Values of policies in such a process with discrete states can be computed
exactly.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from worldmodel import keys, struct
from worldmodel.envs.base import Timestep, first_timestep
from worldmodel.errors import InputError


class MDP(NamedTuple):
    """A finite decision process; NumPy arrays."""

    transition: np.ndarray  # [S, A, S]
    reward: np.ndarray  # [S, A, S], on the transition to the next state
    start: np.ndarray  # [S]
    terminal: np.ndarray  # [S] bool
    clinician: np.ndarray  # [S, A] the policy the records come from
    admissible: np.ndarray | None = None  # [S, A] bool, treatments that the records support
    sofa: np.ndarray | None = None  # [S] mean SOFA of the patients in a state


def icu_sepsis(*, exploration: float = 0.1) -> MDP:
    """ICU-Sepsis with a clinician policy of full support.

    Treatments that the records do not support lead where the supported ones of the state lead on
    average (the tables hold that mean).

    Args:
      exploration: share of the clinician's decisions that are uniform, support for all policies;
        0 is the published expert.

    Raises:
      InputError: the package `icu-sepsis` is not installed.
    """
    spec = find_spec("icu_sepsis")
    if spec is None or spec.origin is None:
        raise InputError(
            "ICU-Sepsis: its tables are missing; install them with pip install --no-deps icu-sepsis"
        )
    folder = Path(spec.origin).parent / "envs" / "assets"
    with np.load(folder / "dynamics.npz", allow_pickle=False) as tables:
        transition, reward = tables["tx_mat"], tables["r_mat"]
        start, expert = tables["d_0"], tables["expert_policy"]
        sofa = tables["sofa_scores"]
    states, actions = expert.shape
    terminal = np.zeros(states, bool)
    terminal[-3:] = True  # death, survival, and the state after both
    total = expert.sum(1, keepdims=True)
    expert = np.where(total > 0, expert / np.where(total > 0, total, 1.0), 1.0 / actions)
    clinician = (1 - exploration) * expert + exploration / actions
    admissible = np.zeros(expert.shape, bool)
    # The first line holds the number of actions per state, the others the actions.
    lines = (folder / "admissible_actions.txt").read_text().splitlines()[1:]
    for state, line in zip(range(states), lines, strict=True):
        admissible[state, [int(action) for action in line.split()]] = True
    return MDP(transition, reward, start / start.sum(), terminal, clinician, admissible, sofa)


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


def exact(
    mdp: MDP, policy: Float[np.ndarray, "S A"], *, horizon: int, gamma: float = 1.0
) -> Float[np.ndarray, "H S A"]:
    """[H, S, A] Q-values of a policy [S, A] with t steps gone, by backward induction in float64."""
    gain = (mdp.transition * mdp.reward).sum(-1)
    goes_on = ~mdp.terminal
    value = np.zeros(len(mdp.start))
    out = []
    for _ in range(horizon):
        q = (gain + gamma * mdp.transition @ value) * goes_on[:, None]
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
    gain = (mdp.transition * mdp.reward).sum(-1)
    value = np.zeros(len(mdp.start))
    for _ in range(horizon):
        q = (gain + gamma * mdp.transition @ value) * ~mdp.terminal[:, None]
        value = q.max(-1)
    result: np.ndarray = np.eye(q.shape[1])[q.argmax(-1)]
    return result


MAX_STEPS = 500  # where the package `icu-sepsis` cuts episodes off


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

    def reset(self, key: jax.Array) -> tuple[TableState, Timestep]:
        """Draws a start state."""
        number = _draw(self.start, jax.random.fold_in(key, keys.START_STATE))
        state = TableState(number, jnp.int32(0), key)
        return state, first_timestep(number, sofa=self.sofa[number])

    def step(self, state: TableState, action: Int[Array, ""]) -> tuple[TableState, Timestep]:
        """One transition; the noise depends on the key and the step alone."""
        key = jax.random.fold_in(state.key, state.step + 1)
        number = _draw(self.next_state[state.number, action], key)
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


def icu_sepsis_dynamics() -> TableDynamics:
    """The tables of the package `icu-sepsis`.

    Raises:
      InputError: it is not installed.
    """
    mdp = icu_sepsis(exploration=0.0)
    return TableDynamics(
        next_state=jnp.asarray(mdp.transition.cumsum(-1), jnp.float32),
        reward=jnp.asarray(mdp.reward, jnp.float32),
        start=jnp.asarray(mdp.start.cumsum(), jnp.float32),
        terminal=jnp.asarray(mdp.terminal),
        admissible=jnp.asarray(mdp.admissible, jnp.float32),
        sofa=jnp.asarray(np.asarray(mdp.sofa), jnp.float32),
    )


def _draw(cumulative: jax.Array, key: jax.Array) -> jax.Array:
    """[] int32 index by the inverse of cumulative probabilities [S]."""
    chance = jax.random.uniform(key) * cumulative[-1]
    return (cumulative <= chance).sum().astype(jnp.int32)
