"""Recorded stays of decision processes with discrete states, and their exact values."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import Values
from worldmodel.mdp import MDP, exact


class Sample(NamedTuple):
    """Recorded stays of a decision process."""

    data: OPEData
    state: np.ndarray  # [N, T] int32, 0 on padding

    def probs(self, policy: np.ndarray) -> np.ndarray:
        """[N, T, A] probabilities of a policy [S, A] along the stays."""
        return policy[self.state].astype(np.float32)


def sample(mdp: MDP, stays: int, *, horizon: int, seed: int | tuple[int, ...]) -> Sample:
    """Stays under the clinician, cut at the horizon."""
    rng = np.random.default_rng(seed)
    policy = mdp.clinician.cumsum(-1)
    ahead = mdp.transition.cumsum(-1, dtype=np.float32)

    def draw(cumulative: np.ndarray) -> np.ndarray:
        total = cumulative[:, -1:]
        return (cumulative < rng.random((len(cumulative), 1)) * total).sum(-1)

    shape = (stays, horizon)
    state, action = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    reward, alive = np.zeros(shape, np.float32), np.zeros(shape, bool)
    now = draw(np.broadcast_to(mdp.start.cumsum(), (stays, len(mdp.start))))
    on = ~mdp.terminal[now]
    for t in range(horizon):
        chosen = draw(policy[now])
        following = draw(ahead[now, chosen])
        alive[:, t] = on
        state[:, t], action[:, t] = np.where(on, now, 0), np.where(on, chosen, 0)
        reward[:, t] = np.where(on, mdp.reward[now, chosen, following], 0.0)
        now = np.where(on, following, now)
        on = on & ~mdp.terminal[now]
    probs = mdp.clinician[state].astype(np.float32)
    taken = np.take_along_axis(probs, action[..., None], -1)[..., 0]
    data = OPEData(
        reward=jnp.asarray(reward),
        alive=jnp.asarray(alive),
        action=jnp.asarray(action),
        behavior_prob=jnp.asarray(np.where(alive, taken, 1.0)),
        behavior_probs=jnp.asarray(probs),
    )
    return Sample(data, state)


def exact_values(
    mdp: MDP, drawn: Sample, policies: list[np.ndarray], *, gamma: float = 1.0
) -> Values:
    """[K, N, T] exact Q(s_t, a_t) and V(s_t) of policies along recorded stays."""
    steps = drawn.state.shape[1]
    action, alive = np.asarray(drawn.data.action), np.asarray(drawn.data.alive)
    q, v = [], []
    for policy in policies:
        table = exact(mdp, policy, horizon=steps, gamma=gamma)
        rows = table[np.arange(steps), drawn.state]  # [N, T, A]
        q.append(np.take_along_axis(rows, action[..., None], -1)[..., 0] * alive)
        v.append((policy[drawn.state] * rows).sum(-1) * alive)
    return Values(jnp.asarray(np.stack(q), jnp.float32), jnp.asarray(np.stack(v), jnp.float32))
