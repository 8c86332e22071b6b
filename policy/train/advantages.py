"""Advantages from returns of rollouts that began alike: how much better than its group each did.

A group holds rollouts from one start, such as one patient treated several times; all functions
take flat arrays, so groups may differ in size. Sums are made in float64.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from worldmodel.errors import InputError

Labels = Sequence[Hashable] | np.ndarray
"""[N] one label per entry; equal labels belong together."""


def group_relative(
    returns: np.ndarray,
    groups: Labels,
    *,
    scale: bool = True,
    leave_one_out: bool = False,
    epsilon: float = 1e-4,
) -> np.ndarray:
    """Returns less their group's mean.

    Args:
      returns: [N].
      groups: [N].
      scale: divide by the group's standard deviation (of a sample, n - 1) plus epsilon, as GRPO
        does (arXiv 2402.03300); Dr. GRPO (2503.20783) does not, since it favours groups that
        hardly differ.
      leave_one_out: subtract the mean of the others (RLOO, 2402.14740) instead.
      epsilon: in units of returns.

    Returns:
      [N] float32; 0 where a group has one member, which nothing can be compared with.

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


def informative(returns: np.ndarray, groups: Labels, *, tolerance: float = 1e-6) -> np.ndarray:
    """Whose group differs in its returns; the others have no gradient (DAPO, arXiv 2503.14476).

    Args:
      returns: [N].
      groups: [N].
      tolerance: on the range within a group.

    Returns:
      [N] bool.

    Raises:
      InputError: as `group_relative`.
    """
    values, index = _grouped(returns, groups)
    lowest, highest = (np.full(index.max(initial=-1) + 1, end) for end in (np.inf, -np.inf))
    np.minimum.at(lowest, index, values)
    np.maximum.at(highest, index, values)
    return (highest - lowest > tolerance)[index]


def returns_to_go(rewards: np.ndarray, episodes: Labels, *, discount: float) -> np.ndarray:
    """Discounted sums of each step's reward and those after it in its episode.

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
    ahead = np.zeros(index.max(initial=-1) + 1)
    found = np.empty(len(values))
    for step in range(len(values) - 1, -1, -1):
        ahead[index[step]] = values[step] + discount * ahead[index[step]]
        found[step] = ahead[index[step]]
    return found.astype(np.float32)


def step_relative(
    to_go: np.ndarray,
    anchors: Labels,
    groups: Labels,
    *,
    scale: bool = True,
    epsilon: float = 1e-4,
) -> np.ndarray:
    """Returns to go beside those of other steps that began in an equal state.

    Args:
      to_go: [M] of `returns_to_go`.
      anchors: [M] the state before each step; states of real numbers meet again only where they
        are rounded, or where rollouts begin.
      groups: [M]; anchors are compared within a group.
      scale, epsilon: as for `group_relative`.

    Returns:
      [M] float32; 0 where nobody else was in that state.

    Raises:
      InputError: as `group_relative`.
    """
    if len(anchors) != len(groups):
        raise InputError(f"anchors: got {len(anchors)}, expected {len(groups)} as for groups")
    places = list(zip(_listed(groups), _listed(anchors), strict=True))
    return group_relative(to_go, places, scale=scale, epsilon=epsilon)


def gigpo(
    returns: np.ndarray,
    groups: Labels,
    to_go: np.ndarray,
    anchors: Labels,
    episodes: np.ndarray,
    *,
    weight: float = 1.0,
    scale: bool = True,
    epsilon: float = 1e-4,
) -> np.ndarray:
    """Advantages of steps: that of the episode plus that of the step (GiGPO, arXiv 2505.10978).

    Args:
      returns: [N] of whole episodes.
      groups: [N] of episodes.
      to_go: [M] of steps.
      anchors: [M] the state before each step.
      episodes: [M] int, the index within N of each step's episode.
      weight: of the step's part.
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
    return whole[places] + np.float32(weight) * step


def _grouped(values: np.ndarray, groups: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Values as float64, and the number of each one's group."""
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
