"""One patient's chart: what was seen and given so far, as people read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from policy.agent.forecast import Forecast
from worldmodel import schema
from worldmodel.envs.base import Timestep

VITALS: tuple[str, ...] = tuple(
    feature.name
    for feature in schema.FEATURES
    if feature.group == "vital" and not feature.name.startswith("gcs")
)
LABS: tuple[str, ...] = tuple(
    feature.name for feature in schema.FEATURES if feature.group == "lab" and feature.name != "inr"
)
URINE: tuple[str, ...] = ("output_4hourly",)
SHOWN: tuple[str, ...] = (*VITALS, *LABS, *URINE)
"""Features in a chart, in SepsisAgent's choice: no parts of the GCS, no INR."""

FORECAST: tuple[str, ...] = (
    *(name for name in VITALS if name != "fio2"),
    "lactate", "creatinine", "bilirubin_total", "platelet", "ph", "pao2", *URINE,
)  # fmt: skip
"""Features in the answer of a simulation, likewise."""


class Row(NamedTuple):
    """A feature over time, or in one row."""

    name: str
    unit: str
    texts: tuple[str, ...]  # rounded to the feature's decimals, oldest first


@dataclass(frozen=True)
class Treatment:
    """Levels given for four hours."""

    vasopressor: int
    fluid: int

    @classmethod
    def of(cls, action: int) -> Treatment:
        """From a joint action 0-24."""
        return cls(*(int(level) for level in schema.action_levels(action)))

    @property
    def vasopressor_name(self) -> str:
        """Such as Low."""
        return schema.LEVEL_NAMES[self.vasopressor]

    @property
    def fluid_name(self) -> str:
        """Such as Low."""
        return schema.LEVEL_NAMES[self.fluid]


class Expected(NamedTuple):
    """A feature four hours ahead."""

    name: str
    unit: str
    mean: str
    low: str  # 5% quantile
    high: str  # 95% quantile


@dataclass(frozen=True)
class Option:
    """A treatment and what the world model expects of it."""

    treatment: Treatment
    features: dict[str, Expected]  # by name
    sofa: float
    ventilation: float
    disagreement: float
    support: float | None  # probability that a clinician gives it

    def table(self, intervals: bool = True) -> str:
        """The features as lines; many times faster than a loop in a template."""
        return "\n".join(
            f"- {name} [{unit}]: {mean}" + (f" ({low} to {high})" if intervals else "")
            for name, unit, mean, low, high in self.features.values()
        )


@dataclass
class Chart:
    """A patient from admission on; grows by one row per treatment."""

    age: float  # years
    male: bool
    charlson: int
    dynamic: list[np.ndarray] = field(default_factory=list)  # [39] each, physical units
    texts: list[list[str]] = field(default_factory=list)  # of `dynamic`, rounded
    sofa: list[float] = field(default_factory=list)
    ventilated: list[bool] = field(default_factory=list)
    treatments: list[Treatment] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    step: int = 0  # of the newest row, since admission

    @classmethod
    def of(cls, first: Timestep) -> Chart:
        """A chart with its first row, from what an environment shows at reset.

        Rows of the past that the patient brings along are written down too.
        """
        view = first.observation
        age, male, charlson = (float(value) for value in view.static)
        chart = cls(age=age, male=male > 0.5, charlson=round(charlson))
        past, step = view.past, int(view.step)
        if past is not None:
            for row in np.flatnonzero(np.asarray(past.valid))[:-1]:
                chart._write(past.dynamic[row])
                levels = (int(past.vasopressor[row]), int(past.fluid[row]))
                chart.treatments.append(Treatment(*levels))
        chart._see(view, step)
        return chart

    def add(self, action: int, after: Timestep) -> None:
        """A treatment and what followed; the last one of an episode is followed by no row."""
        self.treatments.append(Treatment.of(action))
        self.rewards.append(float(after.reward))
        if not after.done:
            self._see(after.observation, int(after.observation.step))

    def rows(self, names: tuple[str, ...] = SHOWN, last: int | None = None) -> list[Row]:
        """Features over time, oldest first; `last` keeps only so many rows."""
        over_time = list(zip(*(self.texts if last is None else self.texts[-last:]), strict=True))
        columns = [schema.INDEX[name] for name in names]
        return [
            Row(name, schema.FEATURES[i].unit, over_time[i])
            for name, i in zip(names, columns, strict=True)
        ]

    def table(self) -> str:
        """`rows()` as lines; many times faster than a loop in a template."""
        return "\n".join(
            f"{name} [{unit}]: {', '.join(texts)}" for name, unit, texts in self.rows()
        )

    def value(self, name: str) -> str:
        """A feature in the newest row, rounded."""
        return self.texts[-1][schema.INDEX[name]]

    def number(self, name: str) -> float:
        """A feature in the newest row."""
        return float(self.dynamic[-1][schema.INDEX[name]])

    @property
    def given(self) -> Treatment:
        """The treatment before the newest row; none at admission."""
        return self.treatments[-1] if self.treatments else Treatment(0, 0)

    def _see(self, view: Any, step: int) -> None:
        self._write(view.dynamic)
        self.sofa.append(float(view.sofa))
        self.ventilated.append(bool(view.ventilated))
        self.step = step

    def _write(self, dynamic: np.ndarray) -> None:
        self.dynamic.append(np.asarray(dynamic))
        self.texts.append(_texts(dynamic))


def options(actions: tuple[int, ...], forecast: Forecast) -> list[Option]:
    """What the world model said, for people; `forecast` has leaves [K, ...]."""
    found = []
    for k, action in enumerate(actions):
        texts = zip(
            *(
                _texts(value[k, _COLUMNS], _FORECAST_FORMATS)
                for value in (forecast.mean, forecast.low, forecast.high)
            ),
            strict=True,
        )
        features = {
            name: Expected(name, unit, *of_feature)
            for name, unit, of_feature in zip(FORECAST, _UNITS, texts, strict=True)
        }
        support = float(forecast.support[k])
        found.append(
            Option(
                treatment=Treatment.of(action),
                features=features,
                sofa=float(forecast.sofa[k]),
                ventilation=float(forecast.ventilation[k]),
                disagreement=float(forecast.disagreement[k]),
                support=None if np.isnan(support) else support,
            )
        )
    return found


_FORMATS = tuple(f"%.{feature.decimals}f" for feature in schema.FEATURES)
_COLUMNS = [schema.INDEX[name] for name in FORECAST]
_FORECAST_FORMATS = tuple(_FORMATS[i] for i in _COLUMNS)
_UNITS = tuple(schema.FEATURES[i].unit for i in _COLUMNS)


def _texts(values: np.ndarray, formats: tuple[str, ...] = _FORMATS) -> list[str]:
    """Rounded to the features' decimals."""
    numbers = np.asarray(values).tolist()
    return [form % number for form, number in zip(formats, numbers, strict=True)]
