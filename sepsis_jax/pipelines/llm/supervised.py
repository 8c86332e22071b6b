"""Stages I and II: supervised training on questions about records and on dialogues."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from policy.agent.prompts import Prompts
from policy.agent.records import RECORDS_FILE, from_record, last_attempts
from policy.agent.tools import DecisionTokens
from policy.planner import PlannerConfig
from policy.qwen3.config import load_config
from policy.serving.tokens import ChatTokens
from policy.train.data.packing import Dialogue, cached, written
from policy.train.data.qa_sampling import QuestionConfig, as_dialogue, ask
from policy.train.episodes import DemonstrationConfig, RejectionConfig, accepted
from policy.train.loop.distributed import wait
from policy.train.loop.metrics import Report
from sepsis_jax.pipelines.llm.setup import (
    KEPT,
    RunnerOptions,
    SupervisedOptions,
    learn,
    open_policy,
    open_runner,
)
from sepsis_jax.runs import Progress, plain, run_folder, silent
from worldmodel.configuration import require
from worldmodel.episode_files import EPISODES_FILE, load_episodes, load_manifest
from worldmodel.errors import InputError
from worldmodel.files import digest_file

SFT_KIND = "sepsis-jax language model, stage I"


@dataclass(frozen=True)
class SFTOptions:
    """Stage I.

    Attributes:
      questions: what is asked of the training split.
      training: how the answers are learned.
      seed: of questions and batches.
    """

    questions: QuestionConfig = field(default_factory=QuestionConfig)
    training: SupervisedOptions = field(default_factory=SupervisedOptions)
    seed: int = 0


def run_sft(
    out: Path,
    options: SFTOptions,
    *,
    llm: Path,
    episodes: Path,
    resume: bool = False,
    progress: Progress = silent,
) -> list[Report]:
    """Trains on questions; writes `out/model` and what `learn` writes.

    Args:
      out: folder to write, or to go on with.
      options: settings.
      llm: Hugging Face folder to start from.
      episodes: folder of recorded stays.
      resume: go on with an earlier run of the same request.
      progress: called with questions and updates.

    Raises:
      InputError: inputs that cannot be read, another run in the folder, or a training that fails.
    """
    load_config(llm)
    load_manifest(episodes)
    request = {
        "options": plain(options),
        "llm": str(llm.resolve()),
        "episodes": str(episodes.resolve()),
    }
    with run_folder(out, SFT_KIND, request, resume=resume, keeps=KEPT):
        wait(f"begun {out}")  # all processes, before the first leaves something to resume
        progress("questions", 0.0)
        dialogues = question_dialogues(
            out / "cache", options.questions, llm=llm, episodes=episodes, seed=options.seed
        )
        return learn(
            out, llm, dialogues, options.training,
            request=request, seed=options.seed, progress=progress,
        )  # fmt: skip


def question_dialogues(
    cache: Path, questions: QuestionConfig, *, llm: Path, episodes: Path, seed: int
) -> list[Dialogue]:
    """Questions of the training split as sequences of a model's tokens, from the cache."""

    def make() -> list[Dialogue]:
        tokens = ChatTokens.load(llm)
        recorded = load_episodes(episodes).of_split("train")
        return [as_dialogue(question, tokens) for question in ask(recorded, questions, seed=seed)]

    found = cached(
        cache, make, tokenizer=llm, source=digest_file(episodes / EPISODES_FILE),
        settings=plain(questions) | {"seed": seed},
    )  # fmt: skip
    return list(found)


BC_KIND = "sepsis-jax language model, stage II"


@dataclass(frozen=True)
class BCOptions:
    """Stage II.

    Attributes:
      demonstrator: policy that is imitated: guideline, titration, clinician (cloned from the
        episodes), planner (that searches the world model), random, or the folder of a policy.
      planner: settings of the planner, if it demonstrates; with a temperature above 0 it is
        imitated by its preferences among all actions, not by the best one alone.
      patients: number of patients that the demonstrator treats.
      demonstration: how the demonstrator's dialogues are held.
      runner: environment and dialogue settings of the demonstrations.
      rejection: bounds that recorded stays must keep to be learned from.
      replay: questions of stage I that are mixed with the dialogues, so that they are not
        forgotten; without episodes there are none.
      training: settings of the supervised training.
      seed: of the order of the batches.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "teacher": "demonstrator",
        "clinic": "runner",
    }

    demonstrator: str = "guideline"
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    patients: int = 256
    demonstration: DemonstrationConfig = field(default_factory=DemonstrationConfig)
    runner: RunnerOptions = field(default_factory=RunnerOptions)
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    replay: QuestionConfig = field(default_factory=QuestionConfig)
    training: SupervisedOptions = field(default_factory=SupervisedOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda n: n >= 1, "patients")


def run_bc(
    out: Path,
    options: BCOptions,
    *,
    llm: Path,
    model: Path | None = None,
    episodes: Path | None = None,
    records: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> list[Report]:
    """Trains on demonstrations; writes `out/model` and what `learn` writes.

    Args:
      out: folder to write, or to go on with.
      options: settings.
      llm: Hugging Face folder to start from, such as stage I left it.
      model: world model that answers simulations in the demonstrations.
      episodes: recorded stays, for replayed questions and for the "learned" world.
      records: run of an agent (`sepsis-jax agent run`), such as of a strong model behind an
        endpoint; its accepted stays replace the demonstrations.
      resume: go on with an earlier run of the same request.
      progress: called with dialogues and updates.

    Raises:
      InputError: inputs that cannot be read, another run in the folder, no stay that is good
        enough, or a training that fails.
    """
    if (model is None) == (records is None):
        raise InputError(
            "model or records: give one of a world model for demonstrations and a run of an agent"
        )
    load_config(llm)
    if records is not None:
        last_attempts(records / RECORDS_FILE)
    if episodes is not None:
        load_manifest(episodes)
    inputs = {"llm": llm, "model": model, "episodes": episodes, "records": records}
    request = {
        "options": plain(options),
        **{name: path and str(path.resolve()) for name, path in inputs.items()},
    }
    with run_folder(out, BC_KIND, request, resume=resume, keeps=KEPT):
        wait(f"begun {out}")  # all processes, before the first leaves something to resume
        progress("dialogues", 0.0)
        tokens = ChatTokens.load(llm)
        decisions, how = None, replace(options.demonstration, exploration=0.0)
        if records is None:
            with suppress(InputError):  # a tokenizer without a token for each level
                decisions, how = DecisionTokens.of(tokens), options.demonstration

        def make() -> list[Dialogue]:
            if records is not None:
                tools = Prompts(options.runner.templates).tools
                found = last_attempts(records / RECORDS_FILE).values()
                stays = accepted([from_record(record) for record in found], options.rejection)
            else:
                assert model is not None
                runner = open_runner(options.runner, model, episodes)
                tools = runner.prompts.tools
                demonstrator = open_policy(options.demonstrator, episodes, model, options.planner)
                stays = runner.demonstrate(demonstrator, np.arange(options.patients), how)
            return [one for stay in stays for one in written(stay, tokens, decisions, tools)]

        source = records / RECORDS_FILE if records is not None else None
        dialogues = list(
            cached(
                out / "cache",
                make,
                tokenizer=llm,
                source="" if source is None else digest_file(source),
                settings=request,
            )
        )
        if episodes is not None:
            dialogues += question_dialogues(
                out / "cache", options.replay, llm=llm, episodes=episodes, seed=options.seed + 1
            )
        return learn(
            out, llm, dialogues, options.training,
            request=request, seed=options.seed, progress=progress, decisions=decisions,
        )  # fmt: skip
