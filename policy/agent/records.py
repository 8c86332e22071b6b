"""Records of an agent run, and the summary of a run.

Records are an append-only file of JSON lines, one per attempt at a stay. A line is written when the
attempt ends, so that a killed run loses only the stays in progress. A stay that failed may have
several attempts, of which the last counts.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from policy.agent.dialogue import COMPLETED, DEATH, Decision, Stay, Turn
from policy.serving.backend import Reply, ToolCall
from worldmodel import schema
from worldmodel.clinical import sofa
from worldmodel.clinical.safety import Prescriptions, judge
from worldmodel.errors import InputError

VERSION = 1
RECORDS_FILE = "records.jsonl"


class Record(TypedDict):
    """One attempt at a stay, as a line of the file; decisions and turns as JSON holds them."""

    version: int
    patient: int
    attempt: int
    status: str
    failure: str | None
    detail: str | None
    outcome: str | None
    mortality: float | None
    total_reward: float | None  # of a completed stay
    tool_calls: int
    invalid: dict[str, int]
    decisions: list[dict[str, Any]]  # fields of several types; see `Decision`
    turns: list[dict[str, Any]]  # see `Turn`
    closing: str
    can_simulate: NotRequired[bool]  # true where it is missing
    real: NotRequired[object]  # the recorded course


def to_record(stay: Stay, *, attempt: int = 0, **extra: object) -> Record:
    """A stay as JSON-ready data, with `extra` fields.

    `turns[i].prompt_ids` has the ids since the previous reply. If the prompt does not begin with
    all earlier ids, it has the whole prompt and `restarts` is true.
    """
    record = {
        "version": VERSION,
        "patient": stay.patient,
        "attempt": attempt,
        "status": stay.status,
        "failure": stay.failure,
        "detail": stay.detail,
        "outcome": stay.outcome,
        "mortality": stay.mortality,
        "total_reward": stay.total_reward if stay.status == COMPLETED else None,
        "tool_calls": stay.tool_calls,
        "invalid": dict(stay.invalid),
        "decisions": [asdict(decision) for decision in stay.decisions],
        "turns": _turns(stay.turns),
        "closing": stay.closing,
        "can_simulate": stay.can_simulate,
        **extra,
    }
    return cast("Record", record)


def from_record(record: Record) -> Stay:
    """The stay of a record; the inverse of `to_record`."""
    read: tuple[int, ...] = ()
    turns: list[Turn] = []
    for turn in record["turns"]:
        fields = dict(turn["reply"])
        restarts = fields.pop("restarts")
        for name in ("prompt_ids", "token_ids", "logprobs"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        if fields["prompt_ids"] is not None:
            fields["prompt_ids"] = (*(() if restarts else read), *fields["prompt_ids"])
            read = (*fields["prompt_ids"], *(fields["token_ids"] or ()))
        fields["tool_calls"] = tuple(ToolCall(**call) for call in fields["tool_calls"])
        reply = Reply(**fields)
        opens, refused = turn.get("opens", not turns), turn.get("refused", False)
        turns.append(Turn(tuple(turn["messages"]), reply, turn["seed"], opens, refused))
    decisions = []
    for decision in record["decisions"]:
        values: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in decision.items()
        }
        decisions.append(Decision(**values))
    return Stay(
        patient=record["patient"],
        status=record["status"],
        failure=record["failure"],
        detail=record["detail"],
        outcome=record["outcome"],
        mortality=record["mortality"],
        closing=record["closing"],
        decisions=decisions,
        turns=turns,
        invalid=Counter(record["invalid"]),
        tool_calls=record["tool_calls"],
        can_simulate=record.get("can_simulate", True),
    )


class Records:
    """The records file of a run.

    Args:
      path: the file, created if it is missing. An incomplete last line is removed.

    Raises:
      InputError: a line is no record.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_off_half_line(path)
        self.completed: set[int] = set()
        self.attempts: dict[int, int] = {}
        for record in read_records(path):
            self._count(record)

    def append(self, record: Record) -> None:
        """Writes one attempt and flushes it to the disk.

        Raises:
          InputError: the stay was completed before.
        """
        if record["patient"] in self.completed:
            raise InputError(f"{self.path}: stay {record['patient']} was completed before")
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        with self.path.open("a", encoding="utf-8", errors="surrogatepass") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._count(record)

    def _count(self, record: Record) -> None:
        patient = int(record["patient"])
        self.attempts[patient] = self.attempts.get(patient, 0) + 1
        if record["status"] == COMPLETED:
            self.completed.add(patient)


def read_records(path: Path) -> Iterator[Record]:
    """All attempts in the order they ended.

    Raises:
      InputError: the file is missing, or a line is no record.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield _record(line, path, number)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name the folder of an agent's run") from None


def last_attempts(path: Path) -> dict[int, Record]:
    """The last attempt at each stay, by patient, sorted.

    Raises:
      InputError: there is no such file, or a line is no record.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; name a folder that `sepsis-jax agent run` has written"
        )
    found = {record["patient"]: record for record in read_records(path)}
    return dict(sorted(found.items()))


def _record(line: bytes, path: Path, number: int) -> Record:
    try:
        record = json.loads(line.decode("utf-8", errors="surrogatepass"))
    except ValueError as error:
        raise InputError(f"{path}: line {number} is not JSON ({error})") from None
    known = isinstance(record, dict) and record.get("version") == VERSION
    if not known or not isinstance(record.get("patient"), int):
        raise InputError(f"{path}: line {number} is no record of version {VERSION}")
    return cast("Record", record)


def _cut_off_half_line(path: Path) -> None:
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end:
            start = max(end - 65_536, 0)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def newly_read(turns: Sequence[Turn]) -> Iterator[tuple[tuple[int, ...] | None, bool]]:
    """Yields for each turn the prompt ids since the previous reply, None if unknown.

    With them comes whether the prompt restarted, which means that it does not begin with all
    earlier ids; then the whole prompt is yielded.
    """
    before: tuple[int, ...] = ()
    for turn in turns:
        prompt = turn.reply.prompt_ids
        restarts = prompt is not None and prompt[: len(before)] != before
        yield prompt if prompt is None or restarts else prompt[len(before) :], restarts
        before = (*(prompt or ()), *(turn.reply.token_ids or ()))


def _turns(turns: list[Turn]) -> list[dict[str, object]]:
    return [
        {
            "messages": list(turn.messages),
            # Not `asdict`, which copies every token.
            "reply": {
                **vars(turn.reply),
                "tool_calls": tuple(asdict(call) for call in turn.reply.tool_calls),
                "prompt_ids": prompt,
                "restarts": restarts,
            },
            "seed": turn.seed,
            "opens": turn.opens,
            "refused": turn.refused,
        }
        for turn, (prompt, restarts) in zip(turns, newly_read(turns), strict=True)
    ]


RATES = ("adherence", "unsafe", "underdosing", "overdosing", "g1", "g2", "dose_jump",
         "abrupt_stop", "early_fluid_missed")  # fmt: skip
"""Columns of the safety report that are included, in percent of prescriptions."""


def summarize(
    records: Iterable[Record],
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
    decisions: list[Mapping[str, float]] = []
    failures, invalid, usage = Counter[str](), Counter[str](), Counter[str]()
    tool_calls = replies = 0
    example: str | None = None
    for record in records:
        if record["status"] == COMPLETED:
            died = record["outcome"] == DEATH
            done.append(_Done(cast("float", record["total_reward"]), died, record["decisions"]))
        else:
            failures[cast("str", record["failure"])] += 1
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
    decisions: Sequence[Mapping[str, float]]


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

    def rows(name: str, dtype: DTypeLike = np.float32) -> jax.Array:
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
