"""Summary of an agent run: reward, deaths, guideline rules, tool calls, failures, tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from policy.agent.dialogue import COMPLETED, DEATH
from worldmodel import schema
from worldmodel.clinical import sofa
from worldmodel.clinical.safety import Prescriptions, judge

RATES = ("adherence", "unsafe", "underdosing", "overdosing", "g1", "g2", "dose_jump",
         "abrupt_stop", "early_fluid_missed")  # fmt: skip
"""Columns of the safety report that are included, in percent of prescriptions."""


def summarize(
    records: Iterable[Mapping[str, Any]],
    *,
    step_hours: float = schema.STEP_HOURS,
    dose_edges: schema.DoseEdges = schema.DEFAULT_DOSE_EDGES,
) -> dict[str, Any]:
    """Figures of a run from its records; rewards, deaths and rates are of completed stays.

    Args:
      records: the last attempt at each stay.
      step_hours: hours per step.
      dose_edges: their mid-interval doses stand for the fluid levels.

    Returns:
      Numbers by name, None where there is nothing to count: `stays`, `completed`, `failed`,
      `reward` (mean of total rewards) with `reward_se` (standard error over stays), `deaths`
      (percent of completed stays), the rates of `RATES`; `failures` and `invalid` by reason, with
      `failure_example`, the first one in words; mean
      `simulations` and `invalid_calls` per decision; `decisions`, `tool_calls`, `replies`,
      `prompt_tokens`, `completion_tokens` in all, failed stays included.
    """
    done: list[_Done] = []
    decisions: list[Mapping[str, Any]] = []
    failures, invalid, usage = Counter[str](), Counter[str](), Counter[str]()
    tool_calls = replies = 0
    example: str | None = None
    for record in records:
        if record["status"] == COMPLETED:
            died = record["outcome"] == DEATH
            done.append(_Done(record["total_reward"], died, record["decisions"]))
        else:
            failures[record["failure"]] += 1
            example = example or f"patient {record['patient']}: {record['detail']}"
        decisions += record["decisions"]
        invalid.update(record["invalid"])
        tool_calls += record["tool_calls"]
        replies += len(record["turns"])
        for turn in record["turns"]:
            usage.update(turn["reply"]["usage"])
    rewards = np.array([stay.total_reward for stay in done], np.float64)
    return {
        "stays": len(done) + failures.total(),
        "completed": len(done),
        "failed": failures.total(),
        "reward": float(rewards.mean()) if len(done) else None,
        "reward_se": float(rewards.std(ddof=1) / len(done) ** 0.5) if len(done) > 1 else None,
        "deaths": 100.0 * sum(stay.died for stay in done) / len(done) if done else None,
        **_rates(done, step_hours, dose_edges),
        "decisions": len(decisions),
        "simulations": _mean(decision["simulations"] for decision in decisions),
        "invalid_calls": sum(invalid.values()) / len(decisions) if decisions else None,
        "tool_calls": tool_calls,
        "replies": replies,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "failures": dict(failures),
        "failure_example": example,
        "invalid": dict(invalid),
    }


class _Done(NamedTuple):
    """Fields of a completed stay that are needed, without its turns."""

    total_reward: float
    died: bool
    decisions: Sequence[Mapping[str, Any]]


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None


def _rates(
    done: list[_Done], step_hours: float, dose_edges: schema.DoseEdges
) -> dict[str, float | None]:
    lengths = np.array([len(stay.decisions) for stay in done], np.int32)
    if not lengths.sum():
        return dict.fromkeys(RATES)
    valid = np.arange(lengths.max()) < lengths[:, None]

    def rows(name: str, dtype: Any = np.float32) -> jax.Array:
        values = np.zeros(valid.shape, dtype)
        values[valid] = [decision[name] for stay in done for decision in stay.decisions]
        return jnp.asarray(values)

    vasopressor, fluid = schema.action_levels(rows("action", np.int32))
    dose = jnp.where(valid, jnp.asarray(schema.level_doses(dose_edges.fluid))[fluid], 0.0)
    prescriptions = Prescriptions(
        meanbp=rows("meanbp"),
        lactate=rows("lactate"),
        pf_ratio=sofa.pf_ratio(rows("pao2"), rows("fio2")),
        vasopressor=vasopressor,
        previous_vasopressor=rows("previous_vasopressor", np.int32),
        fluid=fluid,
        fluid_dose=dose,
        cumulative_fluid=jnp.cumsum(dose, -1) - dose,
        step=rows("step", np.int32),
        valid=jnp.asarray(valid),
    )
    report = judge(prescriptions, step_hours).table()
    return {name: report[name] for name in RATES}
