"""Credit for what a model did: from the rewards of stays to an advantage of every decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from policy.agent.dialogue import Stay
from policy.train.advantages import gigpo, group_relative, informative, returns_to_go
from policy.train.trajectories import rewards
from worldmodel.configuration import require
from worldmodel.errors import InputError

EPISODE, STEP, COUNTERFACTUAL = KINDS = ("episode", "step", "counterfactual")


@dataclass(frozen=True)
class CreditConfig:
    """Who deserves what.

    Attributes:
      kind: "episode": a stay's return beside those of the same patient (GRPO, 2402.03300); "step":
        with it, each decision's return beside those from an equal state (GiGPO, 2505.10978);
        "counterfactual": each decision beside the other 24 actions from the same state
        (`policy.train.counterfactual`).
      scale: divide by a standard deviation: of the group for the first two (Dr. GRPO, 2503.20783,
        leaves it out), of all decisions of the batch for the third.
      step_weight: of a decision's share, in "step".
      failure: reward of a stay that fails.
      refusal: reward of a refused call or reply.
    """

    kind: str = COUNTERFACTUAL
    scale: bool = True
    step_weight: float = 1.0
    failure: float = -15.0
    refusal: float = -1.0

    def __post_init__(self) -> None:
        require(self, f"one of {', '.join(KINDS)}", KINDS.__contains__, "kind")
        require(self, "0 or more", lambda x: x >= 0, "step_weight")
        require(self, "0 or less", lambda x: x <= 0, "failure", "refusal")


class Credits(NamedTuple):
    """Advantages by stay, and whom there is something to learn from."""

    of_decisions: list[np.ndarray]  # [decisions (+ 1 of a failed stay)] float32 each
    kept: np.ndarray  # [stays] bool; not where all of a group earned the same


def credits(stays: Sequence[Stay], config: CreditConfig) -> Credits:
    """Advantages of all decisions of a batch of stays.

    Args:
      stays: those of the same patient form a group, and had the same luck.
      config: settings.

    Raises:
      InputError: counterfactual credit, but the ward had no observer.
    """
    earned = [rewards(stay, failure=config.failure, refusal=config.refusal) for stay in stays]
    if config.kind == COUNTERFACTUAL:
        found = _counterfactual(stays, earned, config)
        return Credits(found, np.array([len(one) > 0 for one in found]))
    groups = [stay.patient for stay in stays]
    totals = np.array([one.sum() for one in earned])
    episodes = np.repeat(np.arange(len(stays)), [len(one) for one in earned])
    if config.kind == EPISODE:
        flat = group_relative(totals, groups, scale=config.scale)[episodes]
    else:
        to_go = returns_to_go(np.concatenate(earned), episodes, discount=1.0)
        flat = gigpo(
            totals, groups, to_go, _anchors(stays, earned), episodes,
            weight=config.step_weight, scale=config.scale,
        )  # fmt: skip
    found = np.split(flat, np.cumsum([len(one) for one in earned])[:-1])
    return Credits(found, informative(totals, groups))


def _counterfactual(
    stays: Sequence[Stay], earned: list[np.ndarray], config: CreditConfig
) -> list[np.ndarray]:
    """An action's advantage and the price of the refusals before it; of a failure, its price."""
    found = []
    for stay, reward in zip(stays, earned, strict=True):
        values = []
        for decision in stay.decisions:
            if decision.values is None:
                raise InputError("credit: counterfactual needs a ward with an observer of values")
            values.append(decision.values[decision.action] + config.refusal * decision.invalid)
        found.append(np.array([*values, *reward[len(values) :]], np.float32))
    if config.scale:
        spread = float(np.concatenate(found).std())
        found = [one / max(spread, 1e-6) for one in found]
    return found


def _anchors(stays: Sequence[Stay], earned: list[np.ndarray]) -> list[tuple[int, ...]]:
    """States before all decisions: with equal luck, equal actions lead to equal states."""
    return [
        tuple(decision.action for decision in stay.decisions[:taken])
        for stay, one in zip(stays, earned, strict=True)
        for taken in range(len(one))
    ]
