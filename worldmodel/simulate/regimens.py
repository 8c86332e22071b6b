"""Plans for many starts at once: constant treatment, one-step deviations, sequences, records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.simulate.plans import CLINICIAN, is_clinician, parse_sequence

RECORDED = -1  # in a plan: what was really given
CONSTANT, DEVIATIONS = "constant", "deviations"  # sets of 25 plans


class Regimens(NamedTuple):
    """K named plans, to be followed from any start."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]  # constant, deviation, clinician or sequence
    actions: np.ndarray  # [K, H] int32 joint actions, or RECORDED


def read_regimens(texts: Sequence[str], *, horizon: int, then: str = "") -> Regimens:
    """Plans as people ask for them.

    Args:
      texts: "constant" (each of the 25 actions held), "deviations" (each of the 25 actions once,
        then what was really given), "clinician" (what was really given), or `NAME=V,F;V,F;...`
        as `parse_sequence` reads it.
      horizon: steps H.
      then: "V,F" that follows the first action of the deviations instead of what was given.

    Raises:
      InputError: a text is malformed, or two plans have one name.
    """
    if horizon < 1:
        raise InputError(f"horizon: got {horizon}, expected at least 1")
    follow = RECORDED if not then else int(_sequence(f"then={then}", 1)[1][0])
    found: list[tuple[str, str, np.ndarray]] = []
    for text in texts:
        word = text.strip().lower()
        if word in (CONSTANT, DEVIATIONS):
            kind = word.removesuffix("s")
            later = {CONSTANT: None, DEVIATIONS: follow}[word]
            for action in range(schema.NUM_ACTIONS):
                actions = np.full(horizon, action if later is None else later)
                actions[0] = action
                vasopressor, fluid = schema.action_levels(action)
                found.append((f"{kind} {vasopressor},{fluid}", kind, actions))
        elif is_clinician(text):
            found.append((CLINICIAN, CLINICIAN, np.full(horizon, RECORDED)))
        else:
            name, actions = _sequence(text, horizon)
            found.append((name, "sequence", actions))
    names = tuple(name for name, _, _ in found)
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"plan {name!r}: there are two of that name")
    table = np.array([plan for _, _, plan in found], np.int32).reshape(-1, horizon)
    return Regimens(names, tuple(kind for _, kind, _ in found), table)


def _sequence(text: str, horizon: int) -> tuple[str, np.ndarray]:
    try:
        plan = parse_sequence(text, horizon=horizon)
    except InputError as error:
        if "=" in text:
            raise
        raise InputError(f"{error}; or one of {CONSTANT}, {DEVIATIONS}, {CLINICIAN}") from None
    return plan.name, plan.actions


def plans_from(
    actions: np.ndarray, episodes: Episodes, stay: np.ndarray, step: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Plans at starts, with the record filled in.

    Where the record ends before the plan, what was given last goes on.

    Args:
      actions: [K, H] joint actions, or RECORDED.
      episodes: where the starts are.
      stay, step: [P] rows of the episodes and of the stays.

    Returns:
      [P, K, H] int32 joint actions, and [P, K] float64 steps of the plan that lie within the
      record; NaN for plans that do not follow it.
    """
    length = np.asarray(episodes.length)[stay]
    rows = np.minimum(step[:, None] + np.arange(actions.shape[1]), length[:, None] - 1)
    given = schema.action_index(
        np.asarray(episodes.vasopressor)[stay[:, None], rows],
        np.asarray(episodes.fluid)[stay[:, None], rows],
    )
    plans = np.where(actions == RECORDED, given[:, None], actions).astype(np.int32)
    within = np.minimum(actions.shape[1], length - step)[:, None].astype(np.float64)
    return plans, np.where((actions == RECORDED).any(-1), within, np.nan)
