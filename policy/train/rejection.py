"""Which stays are good enough to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policy.agent.dialogue import COMPLETED, Stay
from policy.agent.published import g1, g2
from worldmodel.configuration import require
from worldmodel.errors import InputError


@dataclass(frozen=True)
class RejectionConfig:
    """Bounds that a stay must keep.

    Attributes:
      invalid: refused calls and replies.
      violations: decisions against the guideline rules G1 and G2.
      total_reward: at least; none if not given.
    """

    invalid: int = 0
    violations: int = 0
    total_reward: float | None = None

    def __post_init__(self) -> None:
        require(self, "0 or more", lambda n: n >= 0, "invalid", "violations")


def accepted(stays: Sequence[Stay], config: RejectionConfig) -> list[Stay]:
    """The completed stays within the bounds.

    Raises:
      InputError: there is none.
    """
    least = config.total_reward
    found = [
        stay
        for stay in stays
        if stay.status == COMPLETED
        and sum(stay.invalid.values()) <= config.invalid
        and sum(g1(vars(one)) + g2(vars(one)) for one in stay.decisions) <= config.violations
        and (least is None or stay.total_reward >= least)
    ]
    if not found:
        raise InputError(f"rejection: none of {len(stays)} stays is good enough; widen the bounds")
    return found
