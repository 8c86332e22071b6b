"""Settings of offline reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass

from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.errors import InputError

NAMES = ("dqn", "wd3qne", "cql", "iql", "bcq")


@dataclass(frozen=True)
class OfflineConfig:
    """What to train and how.

    Attributes:
      algorithm: one of `NAMES`; see `policy.offline.algorithms`.
      hidden: widths of the networks' layers.
      updates: number of gradient steps.
      batch_size: transitions per step.
      learning_rate: peak of a warm-up and cosine schedule.
      weight_decay: decoupled, on matrices only.
      gamma: discount per step.
      polyak: share of the networks that their targets take over after every step.
      copy_every: copy the targets whole every so many steps instead; 0 for Polyak.
      cql_alpha: weight of CQL's penalty.
      expectile: of IQL's value.
      beta: how sharply IQL's actor follows the advantage.
      support: BCQ allows an action where its behaviour probability is at least this share of the
        likeliest one's.
      past: rows that the features look back on, the newest included; 0 for the state alone.
      seeds: networks trained side by side; the policy averages their scores.
      seed: of initialisation and minibatches.
    """

    algorithm: str = "iql"
    hidden: tuple[int, ...] = (128, 128)
    updates: int = 4000
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    gamma: float = 0.99
    polyak: float = 0.01
    copy_every: int = 0
    cql_alpha: float = 1.0
    expectile: float = 0.7
    beta: float = 1.0
    support: float = 0.3
    past: int = 4
    seeds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in NAMES:
            raise InputError(
                f"algorithm: got {self.algorithm!r}, expected one of {', '.join(NAMES)}"
            )
        require(self, "at least 1", lambda count: count >= 1, "updates", "batch_size", "seeds")
        require(self, "widths of at least 1", lambda widths: widths and min(widths) >= 1, "hidden")
        if not self.copy_every and not self.polyak:
            raise InputError("polyak: got 0, so that targets never move; set it or copy_every")
        if self.copy_every > self.updates:
            raise InputError(
                f"copy_every: got {self.copy_every}, expected at most the {self.updates} updates"
            )
        shares = ("gamma", "polyak", "expectile", "support")
        require(self, "within [0, 1]", lambda share: 0 <= share <= 1, *shares)
        sizes = ("learning_rate", "weight_decay", "copy_every", "cql_alpha", "beta")
        require(self, "0 or more", lambda size: size >= 0, *sizes)
        most = schema.OUTCOME_WINDOW
        require(self, f"0 to {most} rows", lambda rows: 0 <= rows <= most, "past")
