"""Floating-point operations of a rollout, counted by hand from the shapes.

Matrix products alone are counted, two operations per multiplication and addition; gates, noise
and scores come on top and are what a bound from products leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from worldmodel import schema
from worldmodel.models.clinical_model import ModelConfig

_ROW = schema.NUM_FEATURES + schema.NUM_MASKED + schema.ACTION_WIDTH


class Shape(NamedTuple):
    """Branches of a workload: P patients under K plans with S samples each."""

    patients: int
    plans: int
    samples: int

    @property
    def branches(self) -> int:
        """P K S."""
        return self.patients * self.plans * self.samples


def plain_flops(config: ModelConfig, horizon: int) -> float:
    """Per branch-step, with whole windows run in each step, as `torch.nn.GRU` runs them.

    Args:
      config: shape of the model.
      horizon: steps H, over which the Outcome Model's one look is spread.
    """
    state = _window(config, schema.STATE_WINDOW)
    state += config.hidden * config.head + config.head  # ventilation
    state += (config.hidden + 1) * config.hidden  # transition
    state += config.hidden * 2 * schema.NUM_FEATURES
    if config.variant == "residual":
        state += (config.linear_rows * _ROW + schema.NUM_STATIC) * schema.NUM_FEATURES
    outcome = _window(config, schema.OUTCOME_WINDOW)
    outcome += config.hidden * config.head + config.head
    return 2.0 * (state + outcome / horizon)


def _window(config: ModelConfig, rows: int) -> int:
    """Multiplications of embedding and running a window."""
    gates = 3 * config.hidden
    first = (config.row_width + config.hidden) * gates
    above = (config.layers - 1) * 2 * config.hidden * gates
    embedded = rows * schema.ACTION_WIDTH * config.embed + schema.NUM_STATIC * config.embed
    return embedded + rows * (first + above)


def minimal_flops(config: ModelConfig, shape: Shape, horizon: int) -> float:
    """Per branch-step, of what `worldmodel.simulate.fused_gru` cannot do without.

    Every row moves each window that it belongs to by one step; the first step of a window needs
    no recurrent product, windows that would end after the horizon are not begun, and what
    branches share is done once: by patient before the first treatment, by plan after it, by
    branch once noise has been added. Under plans, with noise common to them.

    Args:
      config: shape of the model.
      shape: branches.
      horizon: steps H.
    """
    count = _Count(config, shape)
    patient, plan, branch = count.levels
    in_flight: list[int] = []  # of each window in flight, how many different hidden states it has
    window = schema.STATE_WINDOW
    for _ in range(window - 1):
        count.project(patient, patient, patient, lags=count.lags)
        for index, level in enumerate(in_flight):
            in_flight[index] = count.advance(level, patient)
        in_flight.append(count.start(patient))
    in_flight = in_flight[:horizon]
    obs = patient
    trail: list[tuple[int, int]] = []  # of every row, how many observations and actions
    for h in range(horizon):
        trail.append((obs, plan))
        count.project(obs, plan, patient, lags=count.lags)
        projected = max(obs, plan)
        in_flight = [count.advance(level, projected) for level in in_flight]
        if h + window <= horizon:
            in_flight.append(count.start(projected))
        count.heads(in_flight.pop(0))
        obs = branch
    rows = [(patient, patient)] * (schema.OUTCOME_WINDOW - 1) + [*trail, (obs, plan)]
    chain: int | None = None
    for seen, treated in rows[-schema.OUTCOME_WINDOW :]:
        count.project(seen, treated, patient, lags=0)
        projected = max(seen, treated)
        chain = count.start(projected) if chain is None else count.advance(chain, projected)
    assert chain is not None
    count.add(chain, config.hidden * config.head)
    return 2.0 * count.total / (shape.branches * horizon)


@dataclass
class _Count:
    """Multiplications so far."""

    config: ModelConfig
    shape: Shape
    total: int = 0

    @property
    def levels(self) -> tuple[int, int, int]:
        """Different rows by patient, by plan and by branch."""
        patients, plans, _ = self.shape
        return patients, patients * plans, self.shape.branches

    @property
    def lags(self) -> int:
        """Columns of the autoregression in a row's projection, in multiples of 39."""
        return self.config.linear_rows if self.config.variant == "residual" else 0

    def add(self, rows: int, products: int) -> None:
        self.total += rows * products

    def project(self, obs: int, action: int, fixed: int, *, lags: int) -> None:
        """A row into all that reads it; masks and static features are the patient's."""
        width = 3 * self.config.hidden + lags * schema.NUM_FEATURES
        self.add(obs, schema.NUM_FEATURES * width)
        self.add(action, schema.ACTION_WIDTH * width)
        self.add(fixed, (schema.NUM_MASKED + schema.NUM_STATIC) * width)

    def start(self, projected: int) -> int:
        """A window's first step; returns how many hidden states it has then."""
        self.add(projected, (self.config.layers - 1) * self._square)
        return projected

    def advance(self, hidden: int, projected: int) -> int:
        """A window's next step: layer 1 reads `projected` rows, the others what is below them."""
        moved = max(hidden, projected)
        self.add(hidden, self.config.layers * self._square)
        self.add(moved, (self.config.layers - 1) * self._square)
        return moved

    def heads(self, hidden: int) -> None:
        """Ventilation, transition, mu and log sigma."""
        width = self.config.head + self.config.hidden + 2 * schema.NUM_FEATURES
        self.add(hidden, self.config.hidden * width)

    @property
    def _square(self) -> int:
        return self.config.hidden * 3 * self.config.hidden
