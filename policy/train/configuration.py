"""How a language model learns, whatever the stage."""

from __future__ import annotations

from dataclasses import dataclass

from worldmodel.configuration import require
from worldmodel.errors import InputError

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class LearnerConfig:
    """How to learn.

    Attributes:
      steps: updates; the schedule ends with the last.
      learning_rate: peak of a linear warm-up and a cosine decay.
      warm_up: updates until the peak.
      final_share: of the peak, that remains at the end.
      weight_decay: decoupled, on matrices only.
      beta1, beta2: decay of Adam's moments.
      clip_norm: of the gradient over all parameters.
      accumulate: micro-batches per update; their tokens weigh alike, wherever they are.
      report_every: updates between two reports, and between two checks of the loss.
      save_every: updates between two checkpoints, a multiple of `report_every`; 0 for one at the
        end alone.
      param_dtype: of trained matrices; bfloat16 is rounded stochastically after each update.
        Norms are float32 in any case.
      moment_dtype: of Adam's moments of matrices, likewise.
      seed: of the rounding.
    """

    steps: int = 1000
    learning_rate: float = 1e-5
    warm_up: int = 20
    final_share: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    accumulate: int = 1
    report_every: int = 10
    save_every: int = 0
    param_dtype: str = "float32"
    moment_dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda n: n >= 1, "steps", "accumulate", "report_every")
        require(self, "0 or more", lambda x: x >= 0, "learning_rate", "warm_up", "weight_decay")
        require(self, "above 0", lambda x: x > 0, "clip_norm")
        require(self, "within [0, 1]", lambda x: 0 <= x <= 1, "final_share")
        require(self, "within [0, 1)", lambda x: 0 <= x < 1, "beta1", "beta2")
        require(self, f"one of {DTYPES}", DTYPES.__contains__, "param_dtype", "moment_dtype")
        if self.warm_up > self.steps:
            raise InputError(f"warm_up: got {self.warm_up}, more than the {self.steps} steps")
        if self.save_every < 0 or self.save_every % self.report_every:
            raise InputError(
                f"save_every: got {self.save_every}, expected a multiple of report_every "
                f"({self.report_every}), so that no report spans a checkpoint; or 0"
            )
