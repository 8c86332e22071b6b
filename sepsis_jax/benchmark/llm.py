"""The language model beside its peers on CPUs: sampler, dialogues and learner, in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from flax import nnx

from policy.qwen3 import Qwen3, Qwen3Config, save_hf
from policy.serving.vllm import ServerOptions, find_environment
from policy.serving.vllm.command import variables
from sepsis_jax.benchmark import llm_worker
from sepsis_jax.benchmark.timing import Summary, summary
from sepsis_jax.runs import JsonDict, Progress, silent
from worldmodel.configuration import require
from worldmodel.errors import InputError

OURS = ("embedded", "learner")
RESULT = "bench_llm.json"
MODEL = Qwen3Config(
    vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64, rope_theta=1e6,
    tie_word_embeddings=True, max_position_embeddings=16_384,
)  # fmt: skip
"""42 million parameters."""

Answer = dict[str, float]


@dataclass(frozen=True)
class LlmBenchOptions:
    """What to measure.

    Attributes:
      repeats: timed runs of each contender.
      rows, prompt, new: prompts of a batch, their tokens, and the tokens drawn after each.
      dialogues, turns, said: dialogues at a time, their turns, and the tokens said in each before
        `new` are drawn.
      update_rows, update_length: rows and tokens of an update.
      long_row: tokens of the single row of another update; 0 for none.
      seed: of token ids.
      only: contenders to measure; () for all that are installed.
    """

    repeats: int = 3
    rows: int = 32
    prompt: int = 256
    new: int = 64
    dialogues: int = 4
    turns: int = 8
    said: int = 160
    update_rows: int = 4
    update_length: int = 1024
    long_row: int = 8192
    seed: int = 0
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = ("repeats", "rows", "prompt", "new", "dialogues", "turns", "said", "update_rows")
        require(self, "at least 1", lambda n: n >= 1, *counts)
        require(self, "at least 2", lambda n: n >= 2, "update_length")
        require(self, "0 or at least 2", lambda n: n == 0 or n >= 2, "long_row")
        known = {*llm_worker.SAMPLERS, *llm_worker.LEARNERS}
        require(self, f"names of {sorted(known)}", lambda names: known >= set(names), "only")

    def tasks(self) -> dict[str, tuple[tuple[str, ...], llm_worker.Task]]:
        """By name: contenders, and what each of them does in a repeat."""
        always = {"vocab": MODEL.vocab_size, "seed": self.seed, "turns": 1, "new": 0}
        samplers, learners = tuple(llm_worker.SAMPLERS), tuple(llm_worker.LEARNERS)
        found = {
            f"{self.rows} prompts of {self.prompt} tokens, {self.new} new": (
                samplers,
                always | {"rows": self.rows, "length": self.prompt, "new": self.new},
            ),
            f"{self.dialogues} dialogues of {self.turns} turns, {self.said} + {self.new}": (
                samplers,
                always
                | {"rows": self.dialogues, "length": self.said, "new": self.new}
                | {"turns": self.turns},
            ),
            f"update on {self.update_rows} x {self.update_length}": (
                learners,
                always | {"rows": self.update_rows, "length": self.update_length},
            ),
        }
        if self.long_row:
            found[f"update on 1 x {self.long_row}"] = (
                learners,
                always | {"rows": 1, "length": self.long_row},
            )
        return found


class _Worker:
    """A contender's process."""

    def __init__(self, name: str, folder: Path, task: llm_worker.Task, errors: Path):
        self.name, self._errors = name, errors
        python, environment = _place(name)
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [python, llm_worker.__file__, name, str(folder), json.dumps(task)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment,
                text=True,
            )  # fmt: skip

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, repeat: int) -> Answer:
        """Does the work once.

        Raises:
          InputError: the process ended instead.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(repeat, file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = self._errors.read_text(errors="replace").strip().splitlines()[-1:]
            raise InputError(f"{self.name}: ended without a result: {' '.join(last)}")
        return cast(Answer, json.loads(line))


def _place(name: str) -> tuple[str, dict[str, str]]:
    """The Python that runs a contender, and its environment, in which there are only CPUs."""
    python, environment = sys.executable, dict(os.environ)
    if name == "vLLM":
        serving = find_environment()
        python = str(serving.python)
        environment = variables(serving, ServerOptions(Path(), cpu_cache_gib=4.0), key="")
    return python, {**environment, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def installed(name: str) -> bool:
    """Whether a contender can run here."""
    if name == "vLLM":
        try:
            return find_environment().cpu
        except InputError:
            return False
    needed = {"transformers": ("torch", "transformers"), "torch": ("torch", "transformers")}
    return all(find_spec(module) is not None for module in needed.get(name, ()))


def run_llm_bench(options: LlmBenchOptions, progress: Progress = silent) -> JsonDict:
    """Times all contenders that are installed.

    Args:
      options: what to measure.
      progress: called with (phase, share done).

    Returns:
      `table`, a row per task and contender: median, least and most seconds and processor seconds
      of a repeat, and the most bytes of the process; `ratios`, seconds of ours over those of each
      other, by repeat; `parameters` of the model.

    Raises:
      InputError: `only` names what is not installed, or a contender ended early; the message has
        the last line it wrote.
    """
    missing = [name for name in options.only if not installed(name)]
    if missing:
        raise InputError(f"only: {missing[0]} is not installed for CPUs")
    rows: list[JsonDict] = []
    ratios: list[JsonDict] = []
    tasks = options.tasks()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model = Qwen3(MODEL, rngs=nnx.Rngs(0))
        save_hf(model, folder)
        parameters = sum(leaf.size for leaf in nnx.to_flat_state(nnx.state(model)).leaves)
        del model
        for number, (task, (names, figures)) in enumerate(tasks.items()):
            there = [
                name
                for name in names
                if installed(name) and (not options.only or name in options.only)
            ]

            def of_task(phase: str, share: float, task: str = task, number: int = number) -> None:
                progress(f"{task}: {phase}", (number + share) / len(tasks))

            found = _in_turns(there, folder, figures, options.repeats, of_task)
            rows += [{"task": task, "contender": name, **_row(found[name])} for name in there]
            ratios += _ratios(task, found)
    return {"parameters": parameters, "table": rows, "ratios": ratios}


def _in_turns(
    names: Sequence[str],
    folder: Path,
    task: llm_worker.Task,
    repeats: int,
    progress: Progress,
) -> dict[str, list[Answer]]:
    """Answers of each contender, after one run that does not count."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(_Worker(name, folder, task, folder.parent / f"{name}.txt"))
            for name in names
        ]
        runs = len(workers) * (repeats + 1)
        found: dict[str, list[Answer]] = {name: [] for name in names}
        for repeat in range(repeats + 1):
            for index, worker in enumerate(workers):
                progress(worker.name, (repeat * len(workers) + index) / runs)
                answer = worker.run(repeat)
                if repeat:
                    found[worker.name].append(answer)
    return found


def _row(answers: Sequence[Answer]) -> JsonDict:
    kinds = ("seconds", "processor_seconds")
    spread: dict[str, Summary] = {
        kind: summary([answer[kind] for answer in answers]) for kind in kinds
    }
    return {
        **spread,
        "memory_bytes": max(answer["memory_bytes"] for answer in answers),
        "loss": answers[-1]["loss"],
    }


def _ratios(task: str, found: dict[str, list[Answer]]) -> list[JsonDict]:
    ours = next((name for name in found if name in OURS), None)
    if ours is None:
        return []
    return [
        {
            "task": task,
            "ours": ours,
            "other": other,
            "memory": max(a["memory_bytes"] for a in found[ours])
            / max(b["memory_bytes"] for b in answers),
            **summary(
                [a["seconds"] / b["seconds"] for a, b in zip(found[ours], answers, strict=True)]
            ),
        }
        for other, answers in found.items()
        if other != ours
    ]
