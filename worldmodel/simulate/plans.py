"""Treatment plans: one patient's plan as text, and sets of plans for many starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError

CLINICIAN = "clinician"


class Plan(NamedTuple):
    """A named sequence of joint actions."""

    name: str
    actions: np.ndarray  # [H] int, 0-24


def is_clinician(text: str) -> bool:
    """Whether a plan is the recorded treatment."""
    return text.strip().lower() == CLINICIAN


def parse_plan(text: str, *, horizon: int, stay: Episodes, step: int) -> Plan:
    """Reads a plan.

    Args:
      text: `NAME=V,F;V,F;...` with vasopressor and fluid levels 0-4 per step, the last pair
        standing for all later steps (`NAME=` may be left out); or `clinician`, what was really
        given from `step` on.
      horizon: steps H.
      stay: one stay, for `clinician`.
      step: its row to start from.

    Raises:
      InputError: the text is malformed, a level is outside 0-4, the plan is longer than the
        horizon, or the record ends too early for `clinician`.
    """
    if is_clinician(text):
        recorded = int(stay.length[0]) - step
        if recorded < 1:
            raise InputError(f"plan clinician: the stay has no step {step}; start earlier")
        if recorded < horizon:
            raise InputError(
                f"plan clinician: the stay has {recorded} steps from step {step} on, the horizon "
                f"is {horizon}; use a horizon of {recorded} or start earlier"
            )
        return Plan(CLINICIAN, np.asarray(stay.action[0, step : step + horizon]))
    return parse_sequence(text, horizon=horizon)


def parse_sequence(text: str, *, horizon: int) -> Plan:
    """Reads `NAME=V,F;V,F;...`, as `parse_plan` describes it.

    Raises:
      InputError: the text is malformed, a level is outside 0-4, or the plan is longer than the
        horizon.
    """
    name, sign, body = text.partition("=")
    if not sign:
        name, body = text, text
    if not name.strip():
        raise InputError(f"plan {text!r}: has no name before '='")
    pairs = [pair for pair in body.split(";") if pair.strip()]
    if not pairs or len(pairs) > horizon:
        raise InputError(f"plan {text!r}: {len(pairs)} steps for a horizon of {horizon}")
    actions = [_action(pair, text) for pair in pairs]
    actions += [actions[-1]] * (horizon - len(actions))
    return Plan(name.strip(), np.array(actions))


def _action(pair: str, text: str) -> int:
    try:
        vasopressor, fluid = (int(part) for part in pair.split(","))
    except ValueError:
        raise InputError(
            f"plan {text!r}: {pair!r} is not V,F; write levels such as 2,1 or name=2,1;1,1"
        ) from None
    for level in (vasopressor, fluid):
        if not 0 <= level < schema.NUM_LEVELS:
            raise InputError(f"plan {text!r}: level {level} is outside 0 to 4")
    result: int = schema.action_index(vasopressor, fluid)
    return result


RECORDED = -1  # in a plan: what was really given
CONSTANT, DEVIATIONS = "constant", "deviations"  # sets of 25 plans


class PlanSet(NamedTuple):
    """K named plans, to be followed from any start."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]  # constant, deviation, clinician or sequence
    actions: np.ndarray  # [K, H] int32 joint actions, or RECORDED


def read_plan_set(texts: Sequence[str], *, horizon: int, then: str = "") -> PlanSet:
    """Reads a set of plans.

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
    return PlanSet(names, tuple(kind for _, kind, _ in found), table)


def _sequence(text: str, horizon: int) -> tuple[str, np.ndarray]:
    try:
        plan = parse_sequence(text, horizon=horizon)
    except InputError as error:
        if "=" in text:
            raise
        raise InputError(f"{error}; or one of {CONSTANT}, {DEVIATIONS}, {CLINICIAN}") from None
    return plan.name, plan.actions


def plans_from(
    actions: Int[np.ndarray, "K H"],
    episodes: Episodes,
    stay: Int[np.ndarray, " P"],
    step: Int[np.ndarray, " P"],
) -> tuple[Int[np.ndarray, "P K H"], Float[np.ndarray, "P K"]]:
    """Plans at starts, with the record filled in.

    Where the record ends before the plan, the last recorded treatment is repeated.

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
