"""ICU-Sepsis (Choudhary, Gupta & Thomas 2024): its tables, and an environment.

716 states and 25 treatments estimated from MIMIC-III, reward 1 for survival. The tables come from
the package `icu-sepsis`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from worldmodel.envs.tables import MDP, TableDynamics
from worldmodel.errors import InputError

MAX_STEPS = 500  # where the package `icu-sepsis` cuts episodes off


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
