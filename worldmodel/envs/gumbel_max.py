"""The gumbel-max sepsis simulator (Oberst & Sontag, ICML 2019): exact tables, and an environment.

Four vital signs and three treatments that are on or off, in patients with and without diabetes:
1,440 states, 8 actions. Treatments move a vital sign, stopping them lets it slip back, and what no
treatment holds fluctuates. Three abnormal signs are death (-1); none, with all treatments off, is
discharge (+1). Given the treatments, signs move independently, so that the tables of the whole
process are products of small ones.

Probabilities are those of the published simulator (github.com/clinicalml/gumbel-max-scm), which
depart from its description in one place: without diabetes, glucose that rises stops at "low".
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from worldmodel import keys, struct
from worldmodel.envs.base import Timestep, first_timestep
from worldmodel.envs.tables import MDP, TableState, draw, policy_iteration
from worldmodel.errors import InputError

MAX_STEPS = 20  # where the paper cuts episodes off
DIABETES = 0.2  # share of patients
PUBLISHED_GAMMA = 0.99  # of the policy that the physician's is made from

# The digits of a state's number, the first counting most. Levels go from low to high.
LEVELS = {
    "diabetes": 2, "heart_rate": 3, "pressure": 3, "oxygen": 2, "glucose": 5,
    "antibiotics": 2, "vasopressor": 2, "ventilation": 2,
}  # fmt: skip
NUM_STATES = math.prod(LEVELS.values())
NUM_ACTIONS = 8  # 4 * antibiotics + 2 * ventilation + vasopressor


class Factors(NamedTuple):
    """Transitions [..., from, to] of each vital sign; before = the step before, now = the action.

    NumPy arrays, or on the device with cumulative rows.
    """

    heart_rate: np.ndarray | jax.Array  # [antibiotics before, now, 3, 3]
    # [diabetes, antibiotics before, now, vasopressor before, now, 3, 3]
    pressure: np.ndarray | jax.Array
    oxygen: np.ndarray | jax.Array  # [ventilation before, now, 2, 2]
    glucose: np.ndarray | jax.Array  # [diabetes, vasopressor now, 5, 5]


def _steps(levels: int, fall: float, rise: float, highest: int | None = None) -> np.ndarray:
    """[L, L] one level down or up, within the range; risen levels are at most `highest`."""
    moves = np.eye(levels) * (1 - fall - rise)
    for level in range(levels):
        moves[level, max(level - 1, 0)] += fall
        moves[level, min(level + 1, levels - 1 if highest is None else highest)] += rise
    return moves


def factors(*, capped_glucose: bool = True) -> Factors:
    """Transitions of the vital signs; see `gumbel_max`."""
    started = np.array([[1, 0, 0], [0, 1, 0], [0, 0.5, 0.5]])  # antibiotics: high to normal
    stopped = np.array([[1, 0, 0], [0, 0.9, 0.1], [0, 0, 1]])
    free, same = _steps(3, 0.1, 0.1), np.eye(3)
    raised = np.array(  # by a vasopressor, without and with diabetes
        [[[0.3, 0.7, 0], [0, 0.3, 0.7], [0, 0, 1]], [[0.1, 0.5, 0.4], [0, 0.1, 0.9], [0, 0, 1]]]
    )
    heart_rate = np.array([[free, started], [stopped, started]])
    pressure = np.empty((2, 2, 2, 2, 2, 3, 3))
    for diabetes, before, now, vaso_before, vaso in np.ndindex(2, 2, 2, 2, 2):
        first = started if now else stopped if before else same
        slips = _steps(3, (0.1, 0.05)[diabetes], 0.0) if vaso_before else same
        treated = first @ (raised[diabetes] if vaso else slips)
        untouched = not (before or now or vaso_before or vaso)
        pressure[diabetes, before, now, vaso_before, vaso] = free if untouched else treated
    helped, weaned = np.array([[0.3, 0.7], [0, 1]]), _steps(2, 0.1, 0.0)
    oxygen = np.array([[_steps(2, 0.1, 0.1), helped], [weaned, helped]])
    glucose = np.array([
        [_steps(5, 0.1, 0.1, 1 if capped_glucose else None), np.eye(5)],
        [_steps(5, 0.3, 0.3), _steps(5, 0.0, 0.5)],
    ])  # fmt: skip
    return Factors(heart_rate, pressure, oxygen, glucose)


def _digits() -> dict[str, np.ndarray]:
    """[S] of every variable."""
    values = np.unravel_index(np.arange(NUM_STATES), tuple(LEVELS.values()))
    return dict(zip(LEVELS, values, strict=True))


def outcome() -> Float[np.ndarray, " S"]:
    """[S] -1 where the patient has died, 1 where discharged, else 0."""
    at = _digits()
    normal = {"heart_rate": 1, "pressure": 1, "oxygen": 1, "glucose": 2}
    abnormal = np.sum([at[name] != level for name, level in normal.items()], 0)
    untreated = at["antibiotics"] + at["vasopressor"] + at["ventilation"] == 0
    died, discharged = abnormal >= 3, (abnormal == 0) & untreated
    found: np.ndarray = discharged.astype(float) - died
    return found


def transitions(given: Factors) -> Float[np.ndarray, "S A T"]:
    """[S, A, S] float64; rows of death and discharge go on as if nothing had ended."""
    at = _digits()
    found = np.zeros((NUM_STATES, NUM_ACTIONS, NUM_STATES))
    rows = np.arange(NUM_STATES)[:, None]
    vitals = at["diabetes"][:, None] * 90 + np.arange(90)  # of the next state
    for antibiotics, ventilation, vasopressor in np.ndindex(2, 2, 2):
        moved = (
            given.heart_rate[at["antibiotics"], antibiotics, at["heart_rate"]],
            given.pressure[
                at["diabetes"], at["antibiotics"], antibiotics, at["vasopressor"], vasopressor,
                at["pressure"],
            ],
            given.oxygen[at["ventilation"], ventilation, at["oxygen"]],
            given.glucose[at["diabetes"], vasopressor, at["glucose"]],
        )  # fmt: skip
        action = 4 * antibiotics + 2 * ventilation + vasopressor
        treated = 4 * antibiotics + 2 * vasopressor + ventilation
        both = np.einsum("sh,sp,so,sg->shpog", *moved).reshape(NUM_STATES, 90)
        found[rows, action, 8 * vitals + treated] = both
    return found


def start() -> Float[np.ndarray, " S"]:
    """[S] probabilities at admission: no treatment, neither death nor discharge."""
    sign = (0.25, 0.5, 0.25)
    healthy, diabetic = (0.05, 0.15, 0.6, 0.15, 0.05), (0.01, 0.05, 0.15, 0.6, 0.19)
    patient = np.array([healthy, diabetic]) * np.array([1 - DIABETES, DIABETES])[:, None]
    off = np.eye(8)[0]
    every = np.einsum("dg,h,p,o,t->dhpogt", patient, sign, sign, (0.2, 0.8), off).reshape(-1)
    every *= outcome() == 0
    found: np.ndarray = every / every.sum()
    return found


def gumbel_max(*, exploration: float = 0.05, capped_glucose: bool = True) -> MDP:
    """The whole process, diabetes known, with the paper's physician.

    The physician follows the policy that is best at a discount of 0.99 where death and discharge
    end nothing, as the published one does, and takes each other action with an equal share of
    `exploration`. Of equally good actions the first counts.

    Args:
      exploration: share of the physician's decisions that are not the best action.
      capped_glucose: without diabetes, glucose that rises becomes "low" at most, as in the
        published simulator, so that normal glucose can only fall; False: it rises by one level, as
        its description says.

    Raises:
      InputError: `exploration` is no share.
    """
    if not 0 <= exploration <= 1:
        raise InputError(f"exploration: got {exploration}, expected within [0, 1]")
    moves, reached = transitions(factors(capped_glucose=capped_glucose)), outcome()
    best = policy_iteration(moves, moves @ reached, PUBLISHED_GAMMA)
    others = exploration / (NUM_ACTIONS - 1)
    return MDP(
        transition=moves,
        reward=np.broadcast_to(reached, moves.shape),
        start=start(),
        terminal=reached != 0,
        clinician=np.where(best > 0, 1 - exploration, others),
    )


def visible(hidden: tuple[str, ...] = ()) -> tuple[Int[np.ndarray, " S"], int]:
    """[S] number of what is seen of each state, and how many numbers there are.

    Args:
      hidden: variables of `LEVELS` that are not seen. The paper hides "diabetes" and "glucose".

    Raises:
      InputError: an unknown variable.
    """
    unknown = set(hidden) - set(LEVELS)
    if unknown:
        raise InputError(f"hidden: got {sorted(unknown)[0]!r}, expected among {', '.join(LEVELS)}")
    at, number, count = _digits(), np.zeros(NUM_STATES, np.int64), 1
    for name, levels in LEVELS.items():
        if name not in hidden:
            number, count = number * levels + at[name], count * levels
    return number, count


@struct.dataclass
class GumbelMaxDynamics:
    """The simulator; the observation is the number of what is seen of the state."""

    moves: Factors  # cumulative
    start: jax.Array  # [S] cumulative
    outcome: jax.Array  # [S] -1, 0 or 1
    seen: jax.Array  # [S] int32
    clinician: jax.Array  # [S, A]
    num_states: int = struct.field(pytree_node=False)  # that can be told apart

    num_actions = NUM_ACTIONS

    def reset(self, key: jax.Array) -> tuple[TableState, Timestep]:
        """Draws a patient at admission."""
        number = draw(self.start, jax.random.fold_in(key, keys.START_STATE))
        return TableState(number, jnp.int32(0), key), self._shown(number)

    def step(self, state: TableState, action: Int[Array, ""]) -> tuple[TableState, Timestep]:
        """One transition; the noise depends on the key and the step alone."""
        before = jnp.unravel_index(state.number, tuple(LEVELS.values()))
        at = dict(zip(LEVELS, before, strict=True))
        antibiotics, ventilation, vasopressor = jnp.unravel_index(action, (2, 2, 2))
        rows = (
            self.moves.heart_rate[at["antibiotics"], antibiotics, at["heart_rate"]],
            self.moves.pressure[
                at["diabetes"], at["antibiotics"], antibiotics, at["vasopressor"], vasopressor,
                at["pressure"],
            ],
            self.moves.oxygen[at["ventilation"], ventilation, at["oxygen"]],
            self.moves.glucose[at["diabetes"], vasopressor, at["glucose"]],
        )  # fmt: skip
        own = jax.random.split(jax.random.fold_in(state.key, state.step + 1), len(rows))
        vitals = [draw(row, key) for row, key in zip(rows, own, strict=True)]
        after = (at["diabetes"], *vitals, antibiotics, vasopressor, ventilation)
        number = jnp.ravel_multi_index(after, tuple(LEVELS.values()), mode="clip")
        number = number.astype(jnp.int32)
        earned, start = self.outcome[number], self._shown(number)
        info = replace(
            start.info,
            reward_terms=start.info.reward_terms.at[-1].set(earned),
            mortality=jnp.where(earned == 0, jnp.nan, (1 - earned) / 2),
            support=self.clinician[state.number, action],
        )
        timestep = replace(start, reward=earned, terminated=earned != 0, info=info)
        return TableState(number, state.step + 1, state.key), timestep

    def _shown(self, number: jax.Array) -> Timestep:
        return first_timestep(self.seen[number], sofa=jnp.full((), jnp.nan))


def gumbel_max_dynamics(
    *, hidden: tuple[str, ...] = (), capped_glucose: bool = True
) -> GumbelMaxDynamics:
    """The simulator with some variables hidden; see `visible` and `gumbel_max`.

    Raises:
      InputError: an unknown variable.
    """
    seen, count = visible(hidden)
    ahead = (jnp.asarray(each.cumsum(-1), jnp.float32) for each in factors(
        capped_glucose=capped_glucose
    ))  # fmt: skip
    return GumbelMaxDynamics(
        moves=Factors(*ahead),
        start=jnp.asarray(start().cumsum(), jnp.float32),
        outcome=jnp.asarray(outcome(), jnp.float32),
        seen=jnp.asarray(seen, jnp.int32),
        clinician=jnp.asarray(gumbel_max(capped_glucose=capped_glucose).clinician, jnp.float32),
        num_states=count,
    )
