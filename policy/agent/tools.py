"""The agent's two tools: JSON schemas, strict parsing of calls, prescription probabilities."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from policy.serving.backend import ToolCall
from policy.serving.client import MalformedError, member
from policy.serving.tokens import ChatTokens, TokenBackend, write_call
from worldmodel import schema
from worldmodel.errors import InputError

SIMULATION, PRESCRIPTION = "simulation", "prescription"
MAX_OPTIONS = 3  # actions in one simulation call
MAX_CHARACTERS = 4_096  # of a call's arguments

_LEVEL = {"type": "integer", "minimum": 0, "maximum": schema.NUM_LEVELS - 1}
_PAIR = r"\[ ?[0-4] ?, ?[0-4] ?\]"
_READ_PAIR = re.compile(r"\[ ?([0-4]) ?, ?([0-4]) ?\]", re.ASCII)

SCHEMAS: tuple[Mapping[str, object], ...] = (
    {
        "type": "function",
        "function": {
            "name": SIMULATION,
            "description": "Predicts the patient's state four hours ahead under up to "
            f"{MAX_OPTIONS} treatments.",
            "parameters": {
                "type": "object",
                "properties": {
                    "actions": {
                        "type": "array",
                        "description": 'Treatments as "[vasopressor level, fluid level]", such as '
                        '"[1, 2]".',
                        "items": {"type": "string", "pattern": f"^{_PAIR}$"},
                        "minItems": 1,
                        "maxItems": MAX_OPTIONS,
                    }
                },
                "required": ["actions"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": PRESCRIPTION,
            "description": "Gives a treatment for the next four hours.",
            "parameters": {
                "type": "object",
                "properties": {
                    "vasopressor": {**_LEVEL, "description": "Vasopressor level."},
                    "iv_fluid": {**_LEVEL, "description": "Intravenous fluid level."},
                },
                "required": ["vasopressor", "iv_fluid"],
                "additionalProperties": False,
            },
        },
    },
)
"""Both tools in OpenAI's form."""


def schemas(
    can_simulate: bool, tools: Sequence[Mapping[str, object]] = SCHEMAS
) -> Sequence[Mapping[str, object]]:
    """The tools of a dialogue with or without a simulator, in the order given."""
    return [tool for tool in tools if can_simulate or _name(tool) != SIMULATION]


def load_schemas(path: Path) -> tuple[Mapping[str, object], ...]:
    """Tools as a file has them: their order, descriptions and whatever else a model is told.

    Calls are read as ever, so the tools and their arguments keep their names.

    Raises:
      InputError: the file is no JSON list of both tools with their arguments.
    """
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tools, list):
            raise MalformedError("no list")
        found = {_name(tool): _parameters(tool) for tool in tools}
    except (ValueError, MalformedError) as error:
        raise InputError(f"{path}: not tools in OpenAI's form ({error})") from None
    expected = {_name(tool): _parameters(tool) for tool in SCHEMAS}
    if found != expected or len(tools) != len(expected):
        names = "; ".join(f"{name}({', '.join(sorted(expected[name]))})" for name in expected)
        raise InputError(f"{path}: expected the tools {names}, each once")
    return tuple(tools)


def _name(tool: Mapping[str, object]) -> str:
    return member(member(tool, "function", dict), "name", str)


def _parameters(tool: Mapping[str, object]) -> set[str]:
    parameters = member(member(tool, "function", dict), "parameters", dict)
    return set(member(parameters, "properties", dict))


REASONS: dict[str, str] = {
    "malformed": "the call is not a JSON object with a name and arguments",
    "unknown_tool": "there is no such tool; the tools are simulation and prescription",
    "too_long": "the arguments are too long",
    "not_json": "the arguments are not a JSON object",
    "duplicate_argument": "an argument is given twice",
    "missing_argument": "an argument is missing",
    "extra_argument": "there is an argument that the tool does not have",
    "wrong_type": "a value has the wrong type",
    "out_of_range": "levels go from 0 to 4",
    "no_actions": "no treatment to simulate is given",
    "too_many_actions": f"at most {MAX_OPTIONS} treatments can be simulated in one call",
    "no_call": "no tool was called",
    "truncated": "the reply was cut off before it ended",
    "too_many_simulations": "no more simulations at this decision; prescribe",
    "not_alone": "a prescription must be the only call of a reply",
    "stay_over": "the stay is over",
}
"""Reasons of refusals, with the message to the model."""


class InvalidCallError(Exception):
    """A reply or call that asks for nothing that can be done.

    Attributes:
      reason: a key of `REASONS`.
    """

    def __init__(self, reason: str):
        super().__init__(REASONS[reason])
        self.reason = reason


@dataclass(frozen=True)
class Simulate:
    """A question to the world model."""

    actions: tuple[int, ...]  # joint actions 0-24, one to three


@dataclass(frozen=True)
class Prescribe:
    """A treatment for the next step."""

    action: int  # joint action 0-24


def read_call(call: ToolCall) -> Simulate | Prescribe:
    """What a call asks for.

    Raises:
      InvalidCallError: it is not exactly what a schema allows.
    """
    if not call.name:
        raise InvalidCallError("malformed")
    if call.name not in (SIMULATION, PRESCRIPTION):
        raise InvalidCallError("unknown_tool")
    arguments = _arguments(call.arguments)
    if call.name == SIMULATION:
        (actions,) = _take(arguments, "actions")
        return Simulate(_pairs(actions))
    levels = [_level(value) for value in _take(arguments, "vasopressor", "iv_fluid")]
    return Prescribe(schema.action_index(*levels))


def prescription_arguments(action: int) -> str:
    """The arguments of the call that prescribes a joint action, as JSON."""
    vasopressor, fluid = schema.action_levels(int(action))
    return json.dumps({"vasopressor": int(vasopressor), "iv_fluid": int(fluid)})


def simulation_arguments(actions: tuple[int, ...]) -> str:
    """The arguments of the call that simulates joint actions, as JSON."""
    pairs = [list(map(int, schema.action_levels(int(action)))) for action in actions]
    return json.dumps({"actions": [json.dumps(pair) for pair in pairs]})


def _arguments(text: object) -> dict[str, object]:
    if not isinstance(text, str):
        raise InvalidCallError("not_json")
    if len(text) > MAX_CHARACTERS:
        raise InvalidCallError("too_long")
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidCallError("not_json") from None
    if not isinstance(value, dict):
        raise InvalidCallError("not_json")
    return value


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise InvalidCallError("duplicate_argument")
    return dict(pairs)


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _take(arguments: dict[str, object], *names: str) -> list[object]:
    if any(name not in arguments for name in names):
        raise InvalidCallError("missing_argument")
    if len(arguments) > len(names):
        raise InvalidCallError("extra_argument")
    return [arguments[name] for name in names]


def _level(value: object) -> int:
    if type(value) is not int:  # neither 2.0 nor true is a level
        raise InvalidCallError("wrong_type")
    if not 0 <= value < schema.NUM_LEVELS:
        raise InvalidCallError("out_of_range")
    return value


def _pairs(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise InvalidCallError("wrong_type")
    if not value:
        raise InvalidCallError("no_actions")
    if len(value) > MAX_OPTIONS:
        raise InvalidCallError("too_many_actions")
    return tuple(_pair(item) for item in value)


def _pair(value: object) -> int:
    if not isinstance(value, str):
        raise InvalidCallError("wrong_type")
    found = _READ_PAIR.fullmatch(value)
    if found is None:
        numbers = re.fullmatch(r"\[ ?-?\d+ ?, ?-?\d+ ?\]", value, re.ASCII)
        raise InvalidCallError("out_of_range" if numbers else "wrong_type")
    result: int = schema.action_index(int(found[1]), int(found[2]))
    return result


def prescription_calls(tokens: ChatTokens) -> list[tuple[int, ...]]:
    """[25] ids of the reply that is the prescription of each action and nothing else."""
    return [
        (*tokens.encode(write_call(PRESCRIPTION, prescription_arguments(a))), tokens.end_id)
        for a in range(schema.NUM_ACTIONS)
    ]


class DecisionTokens(NamedTuple):
    """How prescriptions look in a model's tokens.

    A prescription has about twenty tokens of which two decide, and of these all 25 combinations can
    be judged: their loss is taken from wanted probabilities of all levels.
    """

    levels: tuple[int, ...]  # [5] ids of the levels 0-4
    calls: tuple[tuple[int, ...], ...]  # [25] ids of each call with the end of the reply
    places: tuple[int, int]  # of the vasopressor's and the fluid's level in a call

    @classmethod
    def of(cls, tokens: ChatTokens) -> DecisionTokens:
        """From a tokenizer.

        Raises:
          InputError: a level is not one token, or not the same one for both drugs.
        """
        calls = prescription_calls(tokens)
        if len({len(call) for call in calls}) == 1:
            table = np.array(calls).reshape(schema.NUM_LEVELS, schema.NUM_LEVELS, -1)
            differs = np.flatnonzero((table != table[0, 0]).any((0, 1)))
            if len(differs) == 2:
                first, second = differs.tolist()
                levels = table[:, 0, first]
                grid = np.stack(np.meshgrid(levels, levels, indexing="ij"), -1)
                if (table[..., differs] == grid).all():
                    return cls(tuple(levels.tolist()), tuple(calls), (first, second))
        raise InputError(
            "tokenizer: a level of a prescription is not a single token, so decisions cannot be "
            "learned by their probabilities; choose decision_loss=sampled"
        )

    def places_in(self, reply_ids: Sequence[int], action: int) -> tuple[int, int] | None:
        """Indices of both levels in a reply; None unless it ends with the call as we write it."""
        call = self.calls[action]
        start = len(reply_ids) - len(call)
        if start < 0 or tuple(reply_ids[start:]) != call:
            return None
        first, second = self.places
        return start + first, start + second


def level_targets(
    probabilities: Float[np.ndarray, " 25"] | Sequence[float], action: int
) -> Float[np.ndarray, "2 5"]:
    """Wanted probabilities of the levels that an action's call writes one after the other.

    Args:
      probabilities: [25] wanted of all actions.
      action: that was written, 0-24.

    Returns:
      [2, 5] float32: of the vasopressor's level, and of the fluid's given that vasopressor, or
      whatever the vasopressor where the one that was written is never wanted.
    """
    table = np.asarray(probabilities, np.float64).reshape(schema.NUM_LEVELS, schema.NUM_LEVELS)
    vasopressor = int(schema.action_levels(action)[0])
    row = table[vasopressor] if table[vasopressor].sum() > 0 else table.sum(0)
    fluid = row / row.sum()
    return np.stack([table.sum(1) / table.sum(), fluid]).astype(np.float32)


class ActionScorer:
    """Probabilities of the 25 prescriptions at a point of a dialogue.

    The probability of an action is that of the reply which is the call and nothing else, in the
    form of `write_call`, at temperature 1, given that the reply is one of the 25. What a model
    says before its call, reasoning for instance, has to be in the prompt already.

    Args:
      backend: whose generator scores.
    """

    def __init__(self, backend: TokenBackend):
        self._generator = backend.generator
        self._calls = prescription_calls(backend.tokens)

    async def __call__(self, prompt_ids: Sequence[int]) -> np.ndarray:
        """[25] float64 probabilities after a prompt that ends where the model speaks.

        Raises:
          BackendError: the model could not be reached.
        """
        logprobs = np.array(await self._generator.score(prompt_ids, self._calls), np.float64)
        weights = np.exp(logprobs - logprobs.max())
        result: np.ndarray = weights / weights.sum()
        return result
