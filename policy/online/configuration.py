"""Settings of reinforcement learning inside the simulator."""

from __future__ import annotations

from dataclasses import dataclass

from worldmodel import schema
from worldmodel.configuration import require


@dataclass(frozen=True)
class PPOConfig:
    """How proximal policy optimisation plays and learns.

    Attributes:
      hidden: widths of the networks' layers.
      iterations: rounds of playing and learning.
      patients: fresh patients per round, played side by side from their first row on.
      steps: most steps of an episode that are played; a longer one is cut off there, and the
        critic values what would have followed.
      minibatches: gradient steps per round.
      batch_size: rows per gradient step, drawn from those of the round.
      learning_rate: at the start; falls linearly to `final_rate` of it.
      final_rate: share of the learning rate that is left at the end.
      gamma: discount per step.
      trace: lambda of generalised advantage estimation.
      clip: how far the probability ratio of an action may pay.
      value_weight: of the critic's Huber loss.
      entropy: weight of the entropy bonus at the start; falls linearly to 0.
      clip_norm: largest norm of a gradient.
      past: rows that the features look back on, the newest included; 0 for the state alone.
    """

    hidden: tuple[int, ...] = (128, 128)
    iterations: int = 50
    patients: int = 6144
    steps: int = 20
    minibatches: int = 60
    batch_size: int = 2048
    learning_rate: float = 3e-4
    final_rate: float = 1.0
    gamma: float = 1.0
    trace: float = 0.97
    clip: float = 0.2
    value_weight: float = 0.05
    entropy: float = 0.01
    clip_norm: float = 1.0
    past: int = 4

    def __post_init__(self) -> None:
        counts = ("iterations", "patients", "steps", "minibatches", "batch_size")
        require(self, "at least 1", lambda count: count >= 1, *counts)
        require(self, "widths of at least 1", lambda widths: widths and min(widths) >= 1, "hidden")
        shares = ("final_rate", "gamma", "trace")
        require(self, "within [0, 1]", lambda share: 0 <= share <= 1, *shares)
        require(self, "more than 0", lambda value: value > 0, "learning_rate", "clip", "clip_norm")
        require(self, "0 or more", lambda weight: weight >= 0, "value_weight", "entropy")
        most = schema.OUTCOME_WINDOW
        require(self, f"0 to {most} rows", lambda rows: 0 <= rows <= most, "past")
