"""Settings of the planner."""

from __future__ import annotations

from dataclasses import dataclass

from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.errors import InputError

SEARCHES = ("one-step", "cross-entropy", "sequential-halving")


@dataclass(frozen=True)
class PlannerConfig:
    """How to search.

    Attributes:
      search: one of `SEARCHES`.
      horizon: steps of a sequence; 1 for the one-step search.
      samples: noise samples per member and sequence; in sequential halving those of the first
        round. 0 for the noise-free path.
      candidates: sequences per iteration of cross-entropy, first actions of sequential halving.
      iterations: of cross-entropy.
      elites: best sequences that the next iteration is drawn around.
      prior_weight: w, reward units per nat of leaving the clinician's habit.
      risk: k, reward units per standard deviation over ensemble members.
      support: least probability of an action, as a share of the clinician's likeliest one's.
      gamma: discount per step.
      temperature: probabilities are softmax(J / temperature) over first actions; 0 for the best.
      ridge: of the advantage.
    """

    search: str = "one-step"
    horizon: int = 1
    samples: int = 0
    candidates: int = 32
    iterations: int = 3
    elites: int = 6
    prior_weight: float = 0.5
    risk: float = 0.0
    support: float = 0.01
    gamma: float = 0.99
    temperature: float = 0.0
    ridge: float = 100.0

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise InputError(f"search: got {self.search!r}, expected one of {', '.join(SEARCHES)}")
        counts = ("horizon", "candidates", "iterations", "elites")
        require(self, "at least 1", lambda count: count >= 1, *counts)
        if self.search == "one-step" and self.horizon != 1:
            raise InputError(
                f"horizon: got {self.horizon}, the one-step search has 1; longer sequences need "
                "search=cross-entropy or search=sequential-halving"
            )
        if self.elites > self.candidates:
            raise InputError(
                f"elites: got {self.elites}, expected at most the {self.candidates} candidates"
            )
        if self.search == "sequential-halving" and self.candidates > schema.NUM_ACTIONS:
            raise InputError(f"candidates: got {self.candidates}, there are 25 first actions")
        sizes = ("samples", "prior_weight", "risk", "temperature", "ridge")
        require(self, "0 or more", lambda size: size >= 0, *sizes)
        require(self, "within [0, 1]", lambda share: 0 <= share <= 1, "support", "gamma")
