"""Evaluation of a language model that treats patients: return, valid calls, guideline rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import SupportsFloat

import numpy as np

from policy.agent.dialogue import COMPLETED, Stay
from policy.agent.records import summarize, to_record
from policy.serving.backend import Backend, Lockstep
from policy.train.episodes import EpisodeRunner
from policy.train.rl.advantages import breaks_rules
from sepsis_jax.ope.intervals import delta, ends, mean_of, share_of

FAILED_RETURN = -15.0
"""Return of a failed stay, equal to that of a death, so that failures never improve the mean."""

OF_STAYS = ("returns", "prescriptions", "broken")
"""Fields with one value per stay, from which stages are compared patient by patient."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of N stays; rates in percent, NaN where there is nothing to count."""

    stays: int
    value: float  # mean total reward, failed stays with FAILED_RETURN
    low: float  # 95% interval
    high: float
    completed: float
    valid: float  # of all calls and replies, those that were not refused
    adherence: float
    adherence_low: float  # 95% interval
    adherence_high: float
    unsafe: float
    deaths: float  # of completed stays
    decisions: float  # mean per stay
    simulations: float  # mean per decision
    completion_tokens: float  # in all
    returns: np.ndarray = field(repr=False)  # [N] total reward of each stay, in order
    prescriptions: np.ndarray = field(repr=False)  # [N] how many; 0 of failed stays
    broken: np.ndarray = field(repr=False)  # [N] of these, that broke a rule

    def figures(self) -> dict[str, float]:
        """Figures of all stays together, by name."""
        return {
            one.name: getattr(self, one.name) for one in fields(self) if one.name not in OF_STAYS
        }


def evaluate_stays(stays: Sequence[Stay]) -> Evaluation:
    """Figures of stays."""
    found = summarize(to_record(stay) for stay in stays)
    returns = np.array(
        [stay.total_reward if stay.status == COMPLETED else FAILED_RETURN for stay in stays],
        np.float64,
    )
    value = mean_of(returns)
    done = [stay.decisions if stay.status == COMPLETED else [] for stay in stays]
    prescriptions = np.array([len(decisions) for decisions in done])
    broken = np.array([breaks_rules(decisions).sum() if decisions else 0 for decisions in done])
    low, high = _percent(_adherence(broken, prescriptions))[1:]
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
        adherence_low=low,
        adherence_high=high,
        returns=returns,
        prescriptions=prescriptions,
        broken=broken,
        **{name: _number(found[name]) for name in ("adherence", "unsafe", "deaths", "simulations")},
    )


async def evaluate(
    runner: EpisodeRunner, backend: Backend, patients: int, *, lockstep: Lockstep | None = None
) -> Evaluation:
    """Lets a model treat the first patients of a runner, and evaluates the stays."""
    stays = await runner.treat(
        backend, np.arange(patients), seeds=[0] * patients, lockstep=lockstep
    )
    return evaluate_stays(stays)


def gains(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Paired gains of another model on the same patients and random numbers, with 95% intervals.

    Args:
      before, after: values per stay, by the names of `OF_STAYS`.

    Returns:
      `gain`, `gain_low`, `gain_high`, and as much of `adherence_gain`, in percentage points.
    """
    (base, of_base), (new, of_new) = (
        _adherence(one["broken"], one["prescriptions"]) for one in (before, after)
    )
    adherence = _percent((new - base, of_new - of_base))
    gain = interval("gain", after["returns"] - before["returns"])
    return gain | dict(zip(ends("adherence_gain"), adherence, strict=True))


def value_of(returns: np.ndarray) -> dict[str, float]:
    """`stays`, `value`, `low` and `high` of total rewards [N], with a 95% interval."""
    found = mean_of(returns)
    return {"stays": len(returns), "value": found.value, "low": found.low, "high": found.high}


def interval(name: str, values: np.ndarray) -> dict[str, float]:
    """`NAME`, `NAME_low` and `NAME_high`: the mean of values [N] with its 95% interval."""
    found = mean_of(values)
    return dict(zip(ends(name), (found.value, found.low, found.high), strict=True))


def _adherence(broken: np.ndarray, prescriptions: np.ndarray) -> tuple[float, np.ndarray]:
    """Share of prescriptions that keep to the rules, and its influences [N]; NaN without any."""
    if not prescriptions.any():
        return float("nan"), np.full(len(prescriptions), np.nan)
    return share_of(prescriptions - broken, prescriptions)


def _percent(found: tuple[float, np.ndarray]) -> tuple[float, float, float]:
    share, influence = found
    low, high = delta(np.asarray(share), influence)
    return 100.0 * share, 100.0 * float(low), 100.0 * float(high)


def _number(value: SupportsFloat) -> float:
    return float("nan") if value is None else float(value)
