"""Treatment plans as people write them: `name=2,1;1,1` or `clinician`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError

CLINICIAN = "clinician"


class Plan(NamedTuple):
    """A named sequence of joint actions."""

    name: str
    actions: np.ndarray  # [H] int, 0-24


def is_clinician(text: str) -> bool:
    """Whether a plan asks for what was really given."""
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
            raise InputError(f"plan clinician: the stay has no step {step}; use an earlier --step")
        if recorded < horizon:
            raise InputError(
                f"plan clinician: the stay has {recorded} steps from step {step} on, the horizon "
                f"is {horizon}; use --horizon {recorded} or an earlier --step"
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
    return schema.action_index(vasopressor, fluid)
