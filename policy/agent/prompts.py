"""What the agent is told, from Jinja2 templates that users can replace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from policy.agent.chart import Chart, Option
from policy.agent.tools import MAX_OPTIONS
from worldmodel import schema
from worldmodel.errors import InputError

_OWN = Path(__file__).parent / "templates"
OWN_SETS: tuple[str, ...] = ("full", "compact")
MESSAGES: tuple[str, ...] = ("first", "simulation", "prescription", "error")


class Prompts:
    """Messages of a dialogue.

    A set of templates is a folder with `first`, `simulation`, `prescription` and `error`, each
    `.md.j2`; an optional `system.md.j2` goes before the first. Users' templates run in Jinja2's
    sandbox.

    Args:
      templates: "full" (SepsisAgent's contents in our words), "compact" (for small models), or a
        folder.
      hours: per step.
      max_simulations: calls per decision, as the agent is told.
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
        )
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
