"""What a language model's treatment is worth, and how well it keeps to form and rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from policy.agent.dialogue import COMPLETED, Stay
from policy.agent.records import to_record
from policy.agent.summary import summarize
from policy.serving.backend import Backend
from policy.serving.batching import Lockstep
from policy.train.clinic import Clinic
from sepsis_jax.ope.intervals import mean_of

FAILED_RETURN = -15.0
"""Of a stay that failed: as bad as a death, so that failing cannot look good."""


@dataclass(frozen=True)
class Evaluation:
    """Of N stays; rates in percent, NaN where there is nothing to count."""

    stays: int
    value: float  # mean total reward, failed stays with FAILED_RETURN
    low: float  # 95% interval
    high: float
    completed: float
    valid: float  # of all calls and replies, those that were not refused
    adherence: float
    unsafe: float
    deaths: float  # of completed stays
    decisions: float  # mean per stay
    simulations: float  # mean per decision
    completion_tokens: float  # in all
    returns: np.ndarray = field(repr=False)  # [N] total reward of each stay, in order

    def figures(self) -> dict[str, float]:
        """All but the returns, by name."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "returns"}


def judged(stays: Sequence[Stay]) -> Evaluation:
    """What stays amount to."""
    found = summarize(to_record(stay) for stay in stays)
    returns = np.array(
        [stay.total_reward if stay.status == COMPLETED else FAILED_RETURN for stay in stays],
        np.float64,
    )
    value = mean_of(returns)
    refused = sum(found["invalid"].values())
    answered = found["tool_calls"]
    return Evaluation(
        stays=len(stays),
        value=value.value,
        low=value.low,
        high=value.high,
        completed=100.0 * found["completed"] / len(stays),
        valid=100.0 * answered / max(answered + refused, 1),
        decisions=found["decisions"] / len(stays),
        completion_tokens=float(found["completion_tokens"]),
        returns=returns,
        **{name: _number(found[name]) for name in ("adherence", "unsafe", "deaths", "simulations")},
    )


async def evaluate(
    clinic: Clinic, backend: Backend, patients: int, *, lockstep: Lockstep | None = None
) -> Evaluation:
    """The first patients of a clinic under a model."""
    stays = await clinic.treat(
        backend, np.arange(patients), seeds=[0] * patients, lockstep=lockstep
    )
    return judged(stays)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
