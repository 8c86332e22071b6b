"""Decision processes of which records show only a part: what the records suggest, and the truth.

Whoever takes the recorded part for the whole state counts its transitions, and gets a process of
its own with a best policy of its own. Oberst & Sontag (2019) learn policies so: transitions by
counts, actions that were never seen lead to death, policy iteration at a discount of 0.99. What
such a policy is worth in the whole process is computed exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from worldmodel.envs.tables import MDP, expected_reward, policy_iteration

GAMMA = 0.99  # of learned policies
DIED, DISCHARGED = -2, -1  # places of both ends among the recorded states


class Recorded(NamedTuple):
    """The recorded part of every state."""

    number: np.ndarray  # [S] of the recorded state; ends are numbered apart, as the last two
    states: int  # Z recorded states, both ends included

    def whole(self, policy: Float[np.ndarray, "Z A"]) -> Float[np.ndarray, "S A"]:
        """[S, A] a policy of recorded states [Z, A] as one of whole states."""
        found: np.ndarray = policy[self.number]
        return found


def recorded(mdp: MDP, number: Int[np.ndarray, " S"], count: int) -> Recorded:
    """Recorded states of a process whose rewards are -1 for death and 1 for discharge.

    Args:
      mdp: the whole process.
      number: [S] of what is recorded.
      count: how many numbers there are.
    """
    reached = mdp.reward[0, 0]  # the reward is of the state that is reached
    ends = np.where(reached < 0, count + 2 + DIED, count + 2 + DISCHARGED)
    return Recorded(np.where(mdp.terminal, ends, number), count + 2)


def expected_counts(mdp: MDP, seen: Recorded, *, horizon: int) -> Float[np.ndarray, "Z A Z"]:
    """[Z, A, Z] transitions per stay that the clinician's stays show on average."""
    here, visits = mdp.start, np.zeros_like(mdp.start)
    for _ in range(horizon):
        here = here * ~mdp.terminal
        visits += here
        here = (here[:, None] * mdp.clinician).reshape(-1) @ mdp.transition.reshape(-1, len(here))
    into = np.eye(seen.states)[seen.number]
    moved = (visits[:, None] * mdp.clinician)[..., None] * (mdp.transition @ into)
    found = np.zeros((seen.states, *moved.shape[1:]))
    np.add.at(found, seen.number, moved)
    return found


def counts(
    state: Int[np.ndarray, "N T"],
    action: Int[np.ndarray, "N T"],
    alive: Bool[np.ndarray, "N T"],
    last: Int[np.ndarray, " N"],
    size: tuple[int, int],
) -> Float[np.ndarray, "Z A Z"]:
    """[Z, A, Z] transitions of stays.

    Args:
      state, action: [N, T].
      alive: [N, T] which steps count.
      last: [N] state after the last step.
      size: Z and A.
    """
    length = alive.sum(1)
    after = np.concatenate([state[:, 1:], last[:, None]], 1)
    after[np.arange(len(state)), length - 1] = last
    found = np.zeros((*size, size[0]))
    np.add.at(found, (state[alive], action[alive], after[alive]), 1.0)
    return found


def suggested(count: Float[np.ndarray, "Z A Z"], start: Num[np.ndarray, " Z"]) -> MDP:
    """The process that counts suggest; its clinician is the one counted.

    Actions never seen in a state lead to death.

    Args:
      count: [Z, A, Z] transitions.
      start: [Z] probabilities or counts of recorded states at admission.
    """
    states, actions, _ = count.shape
    terminal = np.zeros(states, bool)
    terminal[[DIED, DISCHARGED]] = True
    taken = count.sum(-1)
    known = taken > 0
    transition = count / np.where(known, taken, 1.0)[..., None]
    transition[~known, DIED] = 1.0
    transition[terminal] = np.eye(states)[terminal][:, None]
    reward = np.zeros(states)
    reward[DIED], reward[DISCHARGED] = -1.0, 1.0
    visits = taken.sum(1, keepdims=True)
    clinician = np.where(visits > 0, taken / np.where(visits > 0, visits, 1.0), 1 / actions)
    return MDP(
        transition, np.broadcast_to(reward, count.shape), start / start.sum(), terminal, clinician
    )


def learned(process: MDP, *, gamma: float = GAMMA) -> Float[np.ndarray, "Z A"]:
    """[Z, A] the best policy of a suggested process."""
    gain = expected_reward(process) * ~process.terminal[:, None]
    return policy_iteration(process.transition, gain, gamma)
