"""Advantage assignment: from the rewards of stays to an advantage of every decision."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from policy.agent.dialogue import COMPLETED, Decision, Stay
from worldmodel import schema
from worldmodel.clinical.rules import breaks_guideline
from worldmodel.configuration import require
from worldmodel.errors import InputError

Labels = Sequence[Hashable] | np.ndarray
"""[N] one label per entry; equal labels belong together."""


def group_relative(
    returns: Num[np.ndarray, " N"],
    groups: Labels,
    *,
    scale: bool = True,
    leave_one_out: bool = False,
    epsilon: float = 1e-4,
) -> Float[np.ndarray, " N"]:
    """Returns minus the mean of their group.

    Args:
      returns: [N].
      groups: [N].
      scale: divide by the group's standard deviation (of a sample, n - 1) plus epsilon, as GRPO
        does (arXiv 2402.03300); Dr. GRPO (2503.20783) does not, since it gives more weight to
        groups whose returns are nearly equal.
      leave_one_out: subtract the mean of the others (RLOO, 2402.14740) instead.
      epsilon: in units of returns.

    Returns:
      [N] float32; 0 where a group has one member.

    Raises:
      InputError: lengths differ, or a return is not finite.
    """
    values, index = _grouped(returns, groups)
    count = np.bincount(index)
    centred = values - (np.bincount(index, values) / count)[index]
    advantage = centred
    others = np.maximum(count - 1, 1)
    if leave_one_out:
        advantage = centred * (count / others)[index]
    if scale:
        deviation = np.sqrt(np.bincount(index, centred**2) / others)
        advantage = advantage / (deviation + epsilon)[index]
    return np.where(count[index] > 1, advantage, 0.0).astype(np.float32)


def informative(
    returns: Num[np.ndarray, " N"], groups: Labels, *, tolerance: float = 1e-6
) -> Bool[np.ndarray, " N"]:
    """Mask of returns whose group is not constant; others have no gradient (DAPO, 2503.14476).

    Args:
      returns: [N].
      groups: [N].
      tolerance: a group counts as constant if its range is at most this.

    Returns:
      [N] bool.

    Raises:
      InputError: as `group_relative`.
    """
    values, index = _grouped(returns, groups)
    lowest, highest = (np.full(index.max(initial=-1) + 1, end) for end in (np.inf, -np.inf))
    np.minimum.at(lowest, index, values)
    np.maximum.at(highest, index, values)
    result: np.ndarray = (highest - lowest > tolerance)[index]
    return result


def returns_to_go(
    rewards: Num[np.ndarray, " M"], episodes: Labels, *, discount: float
) -> Float[np.ndarray, " M"]:
    """Discounted sum of the rewards from each step to the end of its episode.

    Args:
      rewards: [M] of steps, those of an episode in order (other episodes may lie between).
      episodes: [M].
      discount: per step, within [0, 1].

    Returns:
      [M] float32.

    Raises:
      InputError: as `group_relative`, or the discount is out of range.
    """
    if not 0 <= discount <= 1:
        raise InputError(f"discount: got {discount}, expected within [0, 1]")
    values, index = _grouped(rewards, episodes)
    later = np.zeros(index.max(initial=-1) + 1)
    found = np.empty(len(values))
    for step in range(len(values) - 1, -1, -1):
        later[index[step]] = values[step] + discount * later[index[step]]
        found[step] = later[index[step]]
    return found.astype(np.float32)


def step_relative(
    to_go: Num[np.ndarray, " M"],
    anchors: Labels,
    groups: Labels,
    *,
    scale: bool = True,
    epsilon: float = 1e-4,
) -> Float[np.ndarray, " M"]:
    """Returns to go, relative to those of other steps that began in an equal state.

    Args:
      to_go: [M] of `returns_to_go`.
      anchors: [M] label of the state before each step; real-valued states are equal only where
        they are rounded, or where rollouts begin.
      groups: [M]; anchors are compared within a group.
      scale, epsilon: as for `group_relative`.

    Returns:
      [M] float32; 0 where no other step began in that state.

    Raises:
      InputError: as `group_relative`.
    """
    if len(anchors) != len(groups):
        raise InputError(f"anchors: got {len(anchors)}, expected {len(groups)} as for groups")
    places = list(zip(_listed(groups), _listed(anchors), strict=True))
    return group_relative(to_go, places, scale=scale, epsilon=epsilon)


def gigpo(
    returns: Num[np.ndarray, " N"],
    groups: Labels,
    to_go: Num[np.ndarray, " M"],
    anchors: Labels,
    episodes: Int[np.ndarray, " M"],
    *,
    weight: float = 1.0,
    scale: bool = True,
    epsilon: float = 1e-4,
) -> Float[np.ndarray, " M"]:
    """Advantages of steps: that of the episode plus that of the step (GiGPO, arXiv 2505.10978).

    Args:
      returns: [N] of whole episodes.
      groups: [N] of episodes.
      to_go: [M] of steps.
      anchors: [M] the state before each step.
      episodes: [M] int, the index within N of each step's episode.
      weight: of the advantage of the step.
      scale, epsilon: as for `group_relative`.

    Returns:
      [M] float32.

    Raises:
      InputError: as `step_relative`, or an index of an episode is out of range.
    """
    places = np.asarray(episodes)
    if places.size and not (places.min() >= 0 and places.max() < len(returns)):
        raise InputError(f"episodes: expected indices below {len(returns)}")
    whole = group_relative(returns, groups, scale=scale, epsilon=epsilon)
    labels = _listed(groups)
    step = step_relative(
        to_go, anchors, [labels[place] for place in places], scale=scale, epsilon=epsilon
    )
    result: np.ndarray = whole[places] + np.float32(weight) * step
    return result


def _grouped(values: np.ndarray, groups: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Values as float64, and the index of each value's group."""
    checked = np.asarray(values, np.float64)
    if checked.ndim != 1 or len(checked) != len(groups):
        raise InputError(
            f"returns or rewards: got shape {checked.shape} and {len(groups)} labels, expected [N]"
        )
    if not np.isfinite(checked).all():
        bad = int((~np.isfinite(checked)).sum())
        raise InputError(f"returns or rewards: {bad} of {len(checked)} are not finite")
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(label, len(numbers)) for label in _listed(groups)]
    return checked, np.array(index, np.int64)


def _listed(labels: Labels) -> Sequence[Hashable]:
    return labels.tolist() if isinstance(labels, np.ndarray) else labels


SMALLEST_SPREAD = 0.1
"""Smallest divisor when advantages are scaled, in units of reward."""

EPISODE, STEP, COUNTERFACTUAL = KINDS = ("episode", "step", "counterfactual")


@dataclass(frozen=True)
class AdvantageConfig:
    """Settings of advantages and of the penalties in them.

    Attributes:
      kind: "episode": a stay's return relative to those of the same patient (GRPO, 2402.03300);
        "step": also each decision's return relative to those from an equal state (GiGPO,
        2505.10978);
        "counterfactual": each decision relative to the other 24 actions from the same state
        (`policy.train.rl.counterfactual`).
      scale: divide by a standard deviation: of the group for the first two (Dr. GRPO, 2503.20783,
        leaves it out); for the third, of all decisions of the batch, whose mean is subtracted.
      bound: on the absolute value of advantages, after scaling; none if not given. Tokens of a
        failed dialogue are improbable, and a large negative advantage there harms the rest.
      step_weight: weight of the advantage of the step, for "step".
      failure: reward of a stay that fails.
      refusal: reward of a refused call or reply.
      violation: reward of breaking a guideline rule, G1 or G2, in addition to the reward of the
        environment.
    """

    kind: str = COUNTERFACTUAL
    scale: bool = True
    bound: float | None = None
    step_weight: float = 1.0
    failure: float = -15.0
    refusal: float = -1.0
    violation: float = 0.0

    def __post_init__(self) -> None:
        require(self, f"one of {', '.join(KINDS)}", KINDS.__contains__, "kind")
        require(self, "0 or more", lambda x: x >= 0, "step_weight")
        require(self, "0 or less", lambda x: x <= 0, "failure", "refusal", "violation")
        if self.bound is not None:
            require(self, "above 0", lambda x: x > 0, "bound")


class Advantages(NamedTuple):
    """Advantages by stay, and which stays have a gradient."""

    of_decisions: list[np.ndarray]  # [decisions (+ 1 of a failed stay)] float32 each
    kept: np.ndarray  # [stays] bool; false where all returns of a group are equal


def assign_advantages(stays: Sequence[Stay], config: AdvantageConfig) -> Advantages:
    """Advantages of all decisions of a batch of stays.

    Args:
      stays: those of the same patient form a group, and had the same random numbers.
      config: settings.

    Raises:
      InputError: counterfactual advantages, but the pool had no state scorer.
    """
    if config.kind == COUNTERFACTUAL:
        found = _counterfactual(stays, config)
        return Advantages(_bounded(found, config), np.array([len(one) > 0 for one in found]))
    step_rewards = [rewards(stay, config) for stay in stays]
    groups = [stay.patient for stay in stays]
    totals = np.array([one.sum() for one in step_rewards])
    episodes = np.repeat(np.arange(len(stays)), [len(one) for one in step_rewards])
    if config.kind == EPISODE:
        flat = group_relative(totals, groups, scale=config.scale)[episodes]
    else:
        to_go = returns_to_go(np.concatenate(step_rewards), episodes, discount=1.0)
        flat = gigpo(
            totals, groups, to_go, _anchors(stays, step_rewards), episodes,
            weight=config.step_weight, scale=config.scale,
        )  # fmt: skip
    found = np.split(flat, np.cumsum([len(one) for one in step_rewards])[:-1])
    return Advantages(_bounded(found, config), informative(totals, groups))


def _bounded(found: list[np.ndarray], config: AdvantageConfig) -> list[np.ndarray]:
    if config.bound is None:
        return found
    return [np.clip(one, -config.bound, config.bound) for one in found]


def rewards(stay: Stay, config: AdvantageConfig) -> Float[np.ndarray, " D"]:
    """[decisions (+ 1)] reward of each decision; a failed stay has one more, of its failure.

    Args:
      stay: completed or failed; refused calls and replies count for the next decision.
      config: penalties.
    """
    step_rewards = [decision.reward for decision in stay.decisions] + penalties(
        stay.decisions, config
    )
    return np.append(step_rewards, _of_failure(stay, config)).astype(np.float32)


def penalties(decisions: Sequence[Decision], config: AdvantageConfig) -> Float[np.ndarray, " D"]:
    """[decisions] rewards, 0 or less, of refused replies and of broken rules."""
    refused = np.array([decision.invalid for decision in decisions])
    return config.refusal * refused + config.violation * breaks_rules(decisions)


def breaks_rules(decisions: Sequence[Decision]) -> Bool[np.ndarray, " D"]:
    """[decisions] bool; whether G1 or G2 is broken; never both at once."""

    # NumPy arrays, which the rules take as JAX arrays
    def column(name: str) -> Any:
        return np.array([getattr(decision, name) for decision in decisions])

    vasopressor, fluid = schema.action_levels(column("action"))
    found = breaks_guideline(
        column("meanbp"), column("lactate"), vasopressor, fluid, column("previous_vasopressor"),
        column("step"),
    )  # fmt: skip
    return np.asarray(found)


def of_all_actions(decision: Decision, config: AdvantageConfig) -> Float[np.ndarray, " 25"]:
    """[25] advantages of a decision's actions with the penalty of a broken rule.

    Args:
      decision: with the advantages of all actions in `values`.
      config: with the penalty.
    """
    every = [replace(decision, action=action) for action in range(schema.NUM_ACTIONS)]
    found: np.ndarray = np.asarray(decision.values) + config.violation * breaks_rules(every)
    return found


def _of_failure(stay: Stay, config: AdvantageConfig) -> list[float]:
    if stay.status == COMPLETED:
        return []
    refused = sum(stay.invalid.values()) - sum(decision.invalid for decision in stay.decisions)
    return [config.failure + config.refusal * refused]


def _counterfactual(stays: Sequence[Stay], config: AdvantageConfig) -> list[np.ndarray]:
    """Per stay: the advantage of each decision plus its penalties, and the penalty of a failure."""
    found = []
    for stay in stays:
        gains = []
        for decision in stay.decisions:
            if decision.values is None:
                raise InputError(
                    "advantages: counterfactual needs a pool with a state scorer of values"
                )
            gains.append(decision.values[decision.action])
        one = np.append(gains + penalties(stay.decisions, config), _of_failure(stay, config))
        found.append(one.astype(np.float32))
    if config.scale:
        flat = np.concatenate(found)
        center, spread = float(flat.mean()), float(flat.std())
        found = [(one - center) / max(spread, SMALLEST_SPREAD) for one in found]
    return found


def _anchors(stays: Sequence[Stay], step_rewards: list[np.ndarray]) -> list[tuple[int, ...]]:
    """Labels of states: with equal random numbers, equal actions lead to equal states."""
    return [
        tuple(decision.action for decision in stay.decisions[:taken])
        for stay, one in zip(stays, step_rewards, strict=True)
        for taken in range(len(one))
    ]
