"""The patient chart and the prompts of the agent, from Jinja2 templates that users can replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from policy.agent.forecast import Forecast
from policy.agent.tools import MAX_OPTIONS, SCHEMAS, load_schemas, schemas
from worldmodel import schema
from worldmodel.envs.base import Timestep
from worldmodel.errors import InputError

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
    features: dict[str, Expected]  # by name, rounded
    values: dict[str, float]  # means of all 39 features by name, not rounded
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
        observation = first.observation
        age, male, charlson = (float(value) for value in observation.static)
        chart = cls(age=age, male=male > 0.5, charlson=round(charlson))
        past, step = observation.past, int(observation.step)
        if past is not None:
            for row in np.flatnonzero(np.asarray(past.valid))[:-1]:
                chart._write(past.dynamic[row])
                levels = (int(past.vasopressor[row]), int(past.fluid[row]))
                chart.treatments.append(Treatment(*levels))
        chart._see(observation, step)
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

    def values(self, name: str) -> list[float]:
        """A feature over time, oldest first, not rounded."""
        column = schema.INDEX[name]
        return [float(row[column]) for row in self.dynamic]

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

    # an observation with leaves of NumPy
    def _see(self, observation: Any, step: int) -> None:
        self._write(observation.dynamic)
        self.sofa.append(float(observation.sofa))
        self.ventilated.append(bool(observation.ventilated))
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
                values=dict(zip(schema.FEATURE_NAMES, forecast.mean[k].tolist(), strict=True)),
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


def _texts(values: jax.Array | np.ndarray, formats: tuple[str, ...] = _FORMATS) -> list[str]:
    """Rounded to the features' decimals."""
    numbers = np.asarray(values).tolist()
    return [form % number for form, number in zip(formats, numbers, strict=True)]


_OWN = Path(__file__).parent / "templates"
OWN_SETS: tuple[str, ...] = ("full", "compact")
MESSAGES: tuple[str, ...] = ("first", "simulation", "prescription", "error")


class Prompts:
    """Messages of a dialogue.

    A set of templates is a folder with `first`, `simulation`, `prescription` and `error`, each
    `.md.j2`; an optional `system.md.j2` goes before the first, and an optional `tools.json` has the
    tools as the model is told of them. Users' templates run in Jinja2's sandbox.

    Args:
      templates: "full" (SepsisAgent's contents in our words), "compact" (for small models), or a
        folder.
      hours: per step.
      max_simulations: calls per decision, as shown to the agent.
      support_limit: probability under the clinicians' policy below which a simulated treatment
        comes with a warning.
      intervals: tell 90% intervals, not the mean alone.

    Raises:
      InputError: no such set, or a template that cannot be parsed.
    """

    def __init__(
        self,
        templates: str | Path = "full",
        *,
        hours: float = schema.STEP_HOURS,
        max_simulations: int = 10,
        support_limit: float = 0.01,
        intervals: bool = True,
    ):
        own = templates in OWN_SETS
        folder = _OWN / templates if own else Path(templates)
        environment = (Environment if own else SandboxedEnvironment)(
            loader=FileSystemLoader(folder), undefined=StrictUndefined, autoescape=False
        )
        environment.globals.update(
            hours=f"{hours:g}",
            levels=schema.LEVEL_NAMES,
            max_options=MAX_OPTIONS,
            max_simulations=max_simulations,
            support_limit=support_limit,
            intervals=intervals,
            feature_names=schema.FEATURE_NAMES,
            units={feature.name: feature.unit for feature in schema.FEATURES},
        )
        tools = folder / "tools.json"
        self._tools = load_schemas(tools) if tools.is_file() else SCHEMAS
        names = [*MESSAGES, *(["system"] if (folder / "system.md.j2").exists() else [])]
        for name in names:
            if not (folder / f"{name}.md.j2").is_file():
                raise InputError(
                    f"{folder}: no {name}.md.j2; give a folder of templates or one of "
                    f"{', '.join(OWN_SETS)}"
                )
        try:
            self._templates = {name: environment.get_template(f"{name}.md.j2") for name in names}
        except TemplateError as error:
            raise InputError(f"{folder}: {error}") from None
        self._folder, self.hours = folder, hours

    def first(self, chart: Chart, *, can_simulate: bool) -> list[dict[str, str]]:
        """The messages that begin a dialogue."""
        context = {"chart": chart, "can_simulate": can_simulate}
        messages = [{"role": "user", "content": self._render("first", **context)}]
        if "system" in self._templates:
            system = {"role": "system", "content": self._render("system", **context)}
            messages.insert(0, system)
        return messages

    def tools(self, can_simulate: bool) -> Sequence[Mapping[str, object]]:
        """The tools of a dialogue with or without a simulator, in OpenAI's form."""
        return schemas(can_simulate, self._tools)

    def simulation(self, options: Sequence[Option]) -> str:
        """The answer of a simulation."""
        return self._render("simulation", options=options)

    def prescription(self, chart: Chart, *, done: bool, outcome: str = "") -> str:
        """The answer of a prescription."""
        return self._render("prescription", chart=chart, done=done, outcome=outcome)

    def error(self, message: str) -> str:
        """The answer to what cannot be done."""
        return self._render("error", message=message)

    def _render(self, name: str, **context: object) -> str:
        try:
            return self._templates[name].render(**context).strip()
        except TemplateError as error:
            raise InputError(f"{self._folder}: {name}.md.j2: {error}") from None
