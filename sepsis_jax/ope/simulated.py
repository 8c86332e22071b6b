"""World-model Monte Carlo: a policy's value by simulating it in the learned model.

V = mean over patients and noise of the total reward of rollouts from ICU admission. No importance
weights, and no protection from the model's errors either: the spread over ensemble members is a
lower bound of them. Common random numbers make policies comparable (same key, same noise).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.world_model import WorldModel
from worldmodel.observation import PolicyFn
from worldmodel.resources import in_blocks
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import rollout
from worldmodel.simulate.stays import FOLLOW_CLINICIAN

SUPPORTED = 0.01  # least probability, under the clinician, of a supported treatment


class SimulatedValue(NamedTuple):
    """Value of a policy in the world model."""

    value: float
    se: float  # over patients
    members: np.ndarray  # [E] value in each ensemble member
    total: np.ndarray  # [N] mean total reward per patient, for paired comparisons
    supported: float = float("nan")  # share of decisions that clinicians take at least 1% of the
    # time, as a recurrent model knows them; elsewhere it extrapolates

    @property
    def spread(self) -> float:
        """Standard deviation over ensemble members; 0 for a single model."""
        return float(self.members.std(ddof=1)) if len(self.members) > 1 else 0.0


def whole_stay(world_model: WorldModel, episodes: Episodes) -> int:
    """Steps in which simulated stays end: by the model's hazards, or else after a mean length.

    The recurrent variant ends its stays itself, at the latest with its recorded window. Models that
    read windows have no end of their own: the terminal reward is asked at the last step.
    """
    if world_model.is_recurrent:
        return world_model.stay_steps or episodes.num_steps
    return max(round(float(np.mean(episodes.length))) - 1, 1)


def simulated_value(
    world_model: WorldModel,
    key: jax.Array,
    episodes: Episodes,
    policy: PolicyFn | None,
    *,
    horizon: int | None = None,
    samples: int = 64,
    block: int = 1024,
) -> SimulatedValue:
    """Plays the stays of `episodes` forward from admission under a policy.

    Args:
      world_model: to simulate in; sample s runs in ensemble member s mod E.
      key: of the noise; the same key gives every policy the same noise.
      episodes: whose first rows are the starts.
      policy: `(key, observation) -> [25]`, traced into the rollout; None is the clinician as the
        recurrent variant knows them.
      horizon: steps; None for `whole_stay`.
      samples: futures per patient, a multiple of the ensemble size.
      block: patients per call; bounds the memory, changes no number.

    Raises:
      InputError: no policy, and a model that does not know the clinician.
    """
    if policy is None and not world_model.is_recurrent:
        raise InputError("policy: none given, and only the recurrent variant knows the clinician")
    horizon = horizon or whole_stay(world_model, episodes)
    plan: PolicyFn | np.ndarray = np.full((1, horizon), FOLLOW_CLINICIAN)
    if policy is not None:
        plan = policy

    def simulate(rows: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
        start = start_history(world_model, episodes.select(rows), 0)
        futures = rollout(
            world_model, key, start, plan, horizon=horizon, samples=samples, features=()
        )
        total = futures.total_reward[:, 0]
        if futures.support is None or futures.alive is None:
            return total, jnp.full(len(total), jnp.nan), jnp.ones(len(total))
        alive = futures.alive[:, 0]
        known = jnp.where(futures.support[:, 0] >= SUPPORTED, alive, 0.0)
        return total, known.sum((1, 2)), alive.sum((1, 2))

    count = episodes.num_stays
    total, known, decisions = in_blocks(simulate, count, min(block, count))  # [N, S], [N], [N]
    total = total.astype(np.float64)
    by_patient = total.mean(1)
    members = total.reshape(len(total), -1, world_model.num_members).mean((0, 1))
    error = by_patient.std(ddof=1) / np.sqrt(len(by_patient)) if len(by_patient) > 1 else np.nan
    return SimulatedValue(
        float(by_patient.mean()), float(error), members, by_patient,
        supported=float(known.sum() / decisions.sum()),
    )  # fmt: skip
