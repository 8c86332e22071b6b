"""Questions about patients with answers from their records, worded by Jinja2 templates."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from policy.agent.prompts import Chart
from worldmodel import schema


class Asked(NamedTuple):
    """A feature that is asked for."""

    name: str
    short: str
    steady: float  # a smaller change is none, in the feature's unit

    @property
    def unit(self) -> str:
        """Physical unit of the feature."""
        return schema.FEATURES[schema.INDEX[self.name]].unit


ASKED: tuple[Asked, ...] = (
    Asked("meanbp", "MAP", 5),
    Asked("heart_rate", "HR", 5),
    Asked("spo2", "SpO2", 2),
    Asked("lactate", "lactate", 0.3),
    Asked("creatinine", "creatinine", 0.2),
    Asked("ph", "pH", 0.03),
    Asked("output_4hourly", "urine", 60),
)
"""What charts show in both sets; changes as large as measurement and rounding make are steady."""

_COLUMNS = [schema.INDEX[asked.name] for asked in ASKED]
_DECIMALS = [schema.FEATURES[i].decimals for i in _COLUMNS]


class QAPrompts:
    """Messages of questions.

    Args:
      charts: a set of the agent's templates, whose `chart` shows the patient.
      hours: per step.
      window: steps in which a vasopressor counts.
    """

    def __init__(self, charts: str, *, hours: float, window: int):
        self._environment = Environment(
            loader=ChoiceLoader(
                [
                    PackageLoader("policy.train", "templates"),
                    PackageLoader("policy.agent", f"templates/{charts}"),
                ]
            ),
            undefined=StrictUndefined,
            autoescape=False,
        )
        self._environment.globals.update(
            hours=f"{hours:g}", window=f"{window * hours:g}", levels=schema.LEVEL_NAMES
        )
        self._system = self._render("system")

    def messages(self, kind: str, chart: Chart, **context: object) -> tuple[dict[str, str], ...]:
        """The system's and the user's message; context as the kind's template wants it."""
        return (
            {"role": "system", "content": self._system},
            {"role": "user", "content": self._render(kind, chart=chart, **context)},
        )

    def _render(self, name: str, **context: object) -> str:
        return self._environment.get_template(f"{name}.md.j2").render(**context).strip()


def short_state(values: np.ndarray, which: np.ndarray) -> str:
    """Values [F] of `ASKED`, of those at the indices `which`, within their physiologic ranges."""
    clipped = np.clip(values, schema.LOW[_COLUMNS], schema.HIGH[_COLUMNS])
    return " ".join(f"{ASKED[i].short} {clipped[i]:.{_DECIMALS[i]}f}" for i in which)
