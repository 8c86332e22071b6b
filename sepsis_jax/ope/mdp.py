"""Decision processes with discrete states, whose policy values can be computed exactly.

ICU-Sepsis (Choudhary, Gupta & Thomas 2024) is one: 716 states and 25 treatments estimated from
MIMIC-III, reward 1 for survival. Its tables come from the package `icu-sepsis`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.estimators import Values
from worldmodel.errors import InputError


class MDP(NamedTuple):
    """A finite decision process; NumPy arrays."""

    transition: np.ndarray  # [S, A, S]
    reward: np.ndarray  # [S, A, S], earned on the way into the next state
    start: np.ndarray  # [S]
    terminal: np.ndarray  # [S] bool
    clinician: np.ndarray  # [S, A] the policy the records come from


class Sample(NamedTuple):
    """Recorded stays of a decision process."""

    data: OPEData
    state: np.ndarray  # [N, T] int32, 0 on padding

    def probs(self, policy: np.ndarray) -> np.ndarray:
        """[N, T, A] probabilities of a policy [S, A] along the stays."""
        return policy[self.state].astype(np.float32)


def icu_sepsis(*, exploration: float = 0.1) -> MDP:
    """ICU-Sepsis with a clinician who gives every action some probability.

    Args:
      exploration: share of the clinician's decisions that are uniform; support for all policies.

    Raises:
      InputError: the package `icu-sepsis` is not installed.
    """
    spec = find_spec("icu_sepsis")
    if spec is None or spec.origin is None:
        raise InputError(
            "ICU-Sepsis: its tables are not there; get them with pip install --no-deps icu-sepsis"
        )
    file = Path(spec.origin).parent / "envs" / "assets" / "dynamics.npz"
    with np.load(file, allow_pickle=False) as tables:
        transition, reward = tables["tx_mat"], tables["r_mat"]
        start, expert = tables["d_0"], tables["expert_policy"]
    states, actions = expert.shape
    terminal = np.zeros(states, bool)
    terminal[-3:] = True  # death, survival, and the state after both
    total = expert.sum(1, keepdims=True)
    expert = np.where(total > 0, expert / np.where(total > 0, total, 1.0), 1.0 / actions)
    clinician = (1 - exploration) * expert + exploration / actions
    return MDP(transition, reward, start / start.sum(), terminal, clinician)


def small_mdp(seed: int = 0, *, states: int = 6, actions: int = 25) -> MDP:
    """A random process of a few states with a slowly won end, for quick checks."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(states, 0.5), (states, actions))
    terminal = np.zeros(states, bool)
    terminal[-1] = True
    reward = np.broadcast_to(rng.normal(size=(states, actions, 1)), transition.shape) + 0.0
    start = np.append(np.full(states - 1, 1 / (states - 1)), 0.0)
    clinician = 0.8 * rng.dirichlet(np.ones(actions), states) + 0.2 / actions
    return MDP(transition, reward, start, terminal, clinician)


def exact(mdp: MDP, policy: np.ndarray, *, horizon: int, gamma: float = 1.0) -> np.ndarray:
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


def true_value(mdp: MDP, policy: np.ndarray, *, horizon: int, gamma: float = 1.0) -> float:
    """Exact value of a policy over a horizon."""
    first = (policy * exact(mdp, policy, horizon=horizon, gamma=gamma)[0]).sum(-1)
    return float(mdp.start @ first)


def best_policy(mdp: MDP, *, horizon: int = 200, gamma: float = 0.999) -> np.ndarray:
    """[S, A] the greedy policy after value iteration, one action per state."""
    gain = (mdp.transition * mdp.reward).sum(-1)
    value = np.zeros(len(mdp.start))
    for _ in range(horizon):
        q = (gain + gamma * mdp.transition @ value) * ~mdp.terminal[:, None]
        value = q.max(-1)
    return np.eye(q.shape[1])[q.argmax(-1)]


def sample(mdp: MDP, stays: int, *, horizon: int, seed: int) -> Sample:
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
